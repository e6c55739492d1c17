"""The geometry of an elastic band: N pivots as the rows of ``path`` [N, P], the first and last of which stay.

Sources: Henkelman and Jonsson, "Improved tangent estimate in the nudged elastic band method for finding minimum energy
paths and saddle points", J. Chem. Phys. 113, 2000 (equations 8 to 12); Draxler et al., "Essentially no barriers in
neural network energy landscape", ICML 2018, section 3.

With segments D_i = R_{i+1} - R_i of length d_i, unit vectors u_i = D_i / d_i and losses L_i, the tangent of an inner
pivot points to its higher neighbour, and at a maximum or minimum of the loss it is a mix that turns smoothly from one
to the other::

    tangent ~ u_i                      L_{i+1} > L_i > L_{i-1}
              u_{i-1}                  L_{i+1} < L_i < L_{i-1}
              big u_i + small u_{i-1}  at an extremum with L_{i+1} > L_{i-1}, else small u_i + big u_{i-1}

with big and small the larger and smaller of |L_{i+1} - L_i| and |L_{i-1} - L_i|. Of a pivot's gradient only the part
across the tangent counts, which lets the band sink without sliding off the saddle. Along the tangent pivots are kept
apart by a spring or by :func:`redistribute`, by which they lie at given ``places`` [N], shares of the band's length.

Everything stays on the path's device: no value is read by the host.
"""

import math
from collections.abc import Iterator

import torch

_CHUNK = {"cpu": 1 << 15}  # columns at once: what the cache holds
_CHUNK_ELSEWHERE = 1 << 22


def _columns(*matrices: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same few columns of each, so that what is made of them is small."""
    return zip(*(m.split(_CHUNK.get(m.device.type, _CHUNK_ELSEWHERE), dim=1) for m in matrices), strict=True)


def _row_sums(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """<a_i, b_i> in fp64, [n]."""
    return (a * b).sum(1).double()


def segment_lengths(path: torch.Tensor) -> torch.Tensor:
    """Distances of neighbouring pivots, [N-1] in fp64."""
    squares = torch.zeros(len(path) - 1, dtype=torch.float64, device=path.device)
    for (part,) in _columns(path):
        squares += part.diff(dim=0).square().sum(1)
    return squares.sqrt()


def tangent_weights(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How much of each inner pivot's tangent points along the segment before it and along that after it, [N-2] each."""
    before, here, after = losses[:-2].double(), losses[1:-1].double(), losses[2:].double()
    down, up = before - here, after - here
    big, small = torch.maximum(down.abs(), up.abs()), torch.minimum(down.abs(), up.abs())
    extremum, back = down * up > 0, before > after
    weight_before = torch.where(extremum, torch.where(back, big, small), back.double())
    weight_after = torch.where(extremum, torch.where(back, small, big), 1 - back.double())
    return weight_before, weight_after


def nudge_(
    grads: torch.Tensor, path: torch.Tensor, losses: torch.Tensor, places: torch.Tensor, spring: float = math.inf
) -> None:
    """Make the gradients [N-2, P] of the inner pivots those of the band, in place.

    The part along the tangent is removed. A finite ``spring`` k puts there ``k ((d_{i-1} - l_{i-1}) - (d_i - l_i))``
    with l the lengths that ``places`` ask for.
    """
    squares = torch.zeros(len(path) - 1, dtype=torch.float64, device=path.device)
    turns, along_before, along_after = torch.zeros(3, len(grads), dtype=torch.float64, device=path.device)
    for part, grad in _columns(path, grads):
        d = part.diff(dim=0)
        squares += _row_sums(d, d)
        turns += _row_sums(d[:-1], d[1:])
        along_before += _row_sums(grad, d[:-1])
        along_after += _row_sums(grad, d[1:])
    lengths = squares.sqrt()
    weight_before, weight_after = tangent_weights(losses)
    # tangent = (a D_{i-1} + b D_i) / norm
    a, b = weight_before / lengths[:-1].clamp_min(1e-30), weight_after / lengths[1:].clamp_min(1e-30)
    square = weight_before.square() + weight_after.square() + 2 * a * b * turns
    norm = square.clamp_min(0).sqrt().clamp_min(1e-30)
    along = -(a * along_before + b * along_after) / norm
    if spring < math.inf:
        stretched = lengths - places.diff() * lengths.sum()
        along = along + spring * (stretched[:-1] - stretched[1:])
    shift_before, shift_after = ((along * c / norm).to(grads.dtype).unsqueeze(1) for c in (a, b))
    for part, grad in _columns(path, grads):
        d = part.diff(dim=0)
        grad.addcmul_(d[:-1], shift_before).addcmul_(d[1:], shift_after)


def redistribute(path: torch.Tensor, places: torch.Tensor) -> None:
    """Move the inner pivots along the band, in place, to the shares ``places`` of its length."""
    lengths = segment_lengths(path)
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    wanted = places[1:-1] * ends[-1]
    segment = (torch.searchsorted(ends, wanted, right=True) - 1).clamp(0, len(lengths) - 1)
    along = ((wanted - ends[segment]) / lengths[segment].clamp_min(1e-300)).clamp(0, 1)
    for (part,) in _columns(path):
        part[1:-1] = between(part, segment, along)


def between(rows: torch.Tensor, segment: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
    """The points a share ``along`` [n] behind the start of the segments with those numbers [n], of shape [n, P]."""
    return rows[segment].lerp_(rows[segment + 1], along.to(rows.dtype).view(-1, *[1] * (rows.dim() - 1)))


def insert(rows: torch.Tensor, segment: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
    """``rows``, those of a path or its places, with these points put in where they belong, as a new tensor."""
    order = torch.cat([torch.arange(len(rows), device=rows.device).double(), segment + along.double()]).argsort()
    return torch.cat([rows, between(rows, segment, along)])[order]
