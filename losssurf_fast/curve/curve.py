"""A path between networks as a module: its weights are made anew for every forward (ops/curve.py has the formulas)."""

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from losssurf_fast.averaging import tensors
from losssurf_fast.averaging.ensemble import Ensemble
from losssurf_fast.averaging.swap import restored
from losssurf_fast.curve.bends import Places, parameter_tree
from losssurf_fast.curve.geometry import Geometry, as_points, even_points
from losssurf_fast.ops.curve import check_kind, check_t, curve_coefficients, curve_weights

T_SAMPLINGS = ("uniform", "arc_length")


class Curve(nn.Module):
    """A curve in weight space whose bends are parameters."""

    def __init__(
        self,
        models: Sequence[nn.Module],
        *,
        kind: str = "bezier",
        num_bends: int = 3,
        fix_start: bool = True,
        fix_end: bool = True,
        init: str = "linear",
        t_sampling: str = "uniform",
    ):
        super().__init__()
        check_kind("Curve", num_bends, kind)
        if t_sampling not in T_SAMPLINGS:
            raise ValueError(f"Curve: t_sampling must be one of {T_SAMPLINGS}, got {t_sampling!r}")
        self.kind, self.num_bends, self.t_sampling = kind, num_bends, t_sampling
        start, end = (tensors.named_parameters(model) for model in models)
        tensors.match("Curve", start, end)
        trainable = {name: p.requires_grad for name, p in start.items()}
        trees = []
        for j in range(num_bends):
            at = j / (num_bends - 1)
            fixed = (j == 0 and fix_start) or (j == num_bends - 1 and fix_end)
            values = {name: torch.lerp(p.detach(), end[name].detach(), at) for name, p in start.items()}
            trees.append(parameter_tree({n: nn.Parameter(v, trainable[n] and not fixed) for n, v in values.items()}))
        self.bends = nn.ModuleList(trees)
        self.module = copy.deepcopy(tensors.unwrap(models[0]))
        object.__setattr__(self, "_places", Places(self.module))

    def coefficients(self, t: float | torch.Tensor) -> torch.Tensor:
        device = next(self.bends.parameters()).device
        return curve_coefficients(check_t("Curve", t).to(device), self.num_bends, self.kind)

    def weights(self, t: float | torch.Tensor) -> dict[str, torch.Tensor]:
        """The weights at ``t``, by the model's names; gradients flow to the bends and to t."""
        bends = [dict(bend.named_parameters()) for bend in self.bends]
        found = curve_weights([list(bend.values()) for bend in bends], self.coefficients(t))
        return dict(zip(bends[0], found, strict=True))

    def sample_t(self) -> torch.Tensor:
        """A t in [0, 1], uniform or (``t_sampling="arc_length"``) uniform in arc length."""
        u = torch.rand((), device=next(self.bends.parameters()).device)
        if self.t_sampling == "uniform":
            return u
        with torch.no_grad():
            return self.geometry().quantile(u)

    def forward(self, *args, t: float | torch.Tensor | None = None, **kwargs):
        self._places.install(self.weights(self.sample_t() if t is None else t))
        return self.module(*args, **kwargs)

    def geometry(self) -> Geometry:
        """Lengths of the curve as it is now, from one pass over the bends; gradients flow to those that need them."""
        return Geometry.of([list(bend.parameters()) for bend in self.bends], self.kind)

    def length(self, num_points: int | None = None) -> torch.Tensor:
        """The curve's length over its parameters, a float64 scalar that gradients flow through.

        None gives the arc length (exact for a chain, by quadrature for a bezier curve); a number that of the straight
        lines between so many points at even steps of t, the sum of ``dl`` in :func:`losssurf_fast.evaluate_curve`.
        """
        if num_points is None:
            return self.geometry().length()
        geometry = self.geometry()
        return geometry.chords(even_points("Curve.length", num_points).to(geometry.gram.device)).sum()

    def arc_weight(self, t: float | torch.Tensor) -> torch.Tensor:
        """|w'(t)| / length in t's shape, float64: the density of t under which the curve's points are uniform.

        ``loss_fn(curve(x, t=t), y) * curve.arc_weight(t)`` with uniform t has the talk's loss by arc length as its
        mean, and its gradient that of this loss: the weight is differentiable in the bends (not if these are sharded)
        and in t. ``t_sampling="arc_length"`` draws t with this density instead: a gradient of less variance, in which
        the density counts as fixed.
        """
        geometry = self.geometry()
        return geometry.arc_weight(check_t("Curve.arc_weight", t).to(geometry.gram.device))

    @contextlib.contextmanager
    def at(self, t: float | torch.Tensor) -> Iterator[nn.Module]:
        """``module`` with the weights at ``t``, without gradients, for a ``with`` block."""
        with torch.no_grad():
            self._places.install(self.weights(t))
        try:
            yield self.module
        finally:
            self._places.remove()

    def predict(
        self,
        data: torch.Tensor | Iterable,
        ts: Sequence[float] | torch.Tensor,
        *,
        bn_loader: Iterable | None = None,
        recalibrate: bool = True,
        subset: float | int | None = None,
        device: torch.device | str | int | None = None,
        forward_kwargs: Mapping | None = None,
        process_group=None,
    ) -> torch.Tensor:
        """Class probabilities ``[..., classes]``: the mean of the softmax over points of the curve.

        Accumulated as a log-mean-exp in float32 (float64 for float64 logits), without gradients, the module in
        ``eval()``; modes and buffers are as before afterwards. Points whose t is drawn from a trained curve are an
        ensemble for the price of one training (Garipov et al. 2018, section 5).

        Args:
            data: an input of the model, or a loader, read once per point and so always in the same order, whose batches
                are as in :func:`losssurf_fast.update_bn`; the results are concatenated along the first dimension.
            ts: the points, in [0, 1].
            bn_loader: where the model has BatchNorm layers, the data by which :func:`losssurf_fast.update_bn` sets
                their statistics anew at every point.
            recalibrate: False keeps the statistics that ``module`` has.
            subset, process_group: for update_bn; where it reduces over ranks, the failure of one is raised on all.
            device, forward_kwargs: as in update_bn, for both loaders.

        Raises:
            RuntimeError: another rank failed.
            TypeError, ValueError: an argument is not as above, a model with BatchNorm layers got no ``bn_loader``,
                ``data`` can be read only once or is shuffled, or the outputs are no logits.
        """
        points, here = as_points("predict", ts), next(self.bends.parameters()).device
        ensemble = Ensemble(
            self.module, "point", data, bn_loader, recalibrate, subset, device, forward_kwargs, process_group, here
        )
        ensemble.jointly(ensemble.check)
        with restored(self.module):
            return ensemble.mean_of_softmax(self.at(t) for t in points)

    @torch.no_grad()
    def module_at(self, t: float | torch.Tensor) -> nn.Module:
        """A model of its own with the weights at ``t`` as Parameters and a copy of ``module``'s buffers."""
        return self._places.model_with(self.module, self.weights(t))
