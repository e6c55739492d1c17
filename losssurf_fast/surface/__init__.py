"""The loss surface around networks: planes, lines and rays in weight space, measured and drawn."""

from losssurf_fast.surface.line import Line, line
from losssurf_fast.surface.plane import Plane
from losssurf_fast.surface.rays import Rays, rays
from losssurf_fast.surface.surface import Projection, Surface

__all__ = ["Line", "Plane", "Projection", "Rays", "Surface", "line", "rays"]
