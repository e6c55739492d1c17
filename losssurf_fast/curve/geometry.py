"""Lengths on a curve, from one pass over its bends.

With w_0 the first of K bends and d_j = w_{j+1} - w_j the K - 1 legs between them::

    w(t) = w_0 + sum_j C_j(t) d_j         C_j(t) = sum_{i > j} c_i(t)
    w'(t) = sum_j C_j'(t) d_j             bezier: C' = (K-1) Bernstein polynomials of degree K-2; polychain: K-1 or 0

so every scalar product of points and derivatives is one of these few coefficients with the Gram matrix of w_0 and the
legs, K x K numbers that cost one pass over the bends: distances and speeds at any number of t need no weights there.
A curve's loss by arc length is the talk's (Garipov et al. 2018, equation 1)::

    l_hat = int L(w(t)) |w'(t)| dt / int |w'(t)| dt = E_{t ~ q} L(w(t)),       q(t) = |w'(t)| / length

Everything is in float64 and over parameters only, buffers are no coordinates. Points in half precision are those
before rounding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.distributed.tensor import DTensor, Partial, Replicate

from losssurf_fast._library import composite_needed
from losssurf_fast.arguments import check_int
from losssurf_fast.averaging.tensors import local, real
from losssurf_fast.ops.curve import curve_coefficients, curve_weights

T_SAMPLINGS = ("uniform", "arc_length")
CELLS = 512  # of the grid by which t is drawn on a bezier curve
_NODES, _WEIGHTS = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(64))
_CHUNK = {"cpu": 1 << 14}  # elements of a bend at once: what the cache holds
_CHUNK_ELSEWHERE = 1 << 22


def even_points(caller: str, num_points: int) -> torch.Tensor:
    """So many t at even steps from 0 to 1, float64."""
    return torch.linspace(0, 1, check_int(caller, "num_points", num_points, 2), dtype=torch.float64)


def as_points(caller: str, ts) -> torch.Tensor:
    """Places on a curve, at least one, as a new float64 tensor [T] on the CPU."""
    try:
        result = torch.as_tensor(ts, dtype=torch.float64).detach().cpu().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{caller}: ts must be numbers in [0, 1], got {type(ts).__name__}: {error}") from None
    if result.dim() != 1 or not len(result):
        raise ValueError(f"{caller}: ts must be a list of numbers in [0, 1], got the shape {tuple(result.shape)}")
    if not ((result >= 0) & (result <= 1)).all():
        raise ValueError(f"{caller}: ts must lie in [0, 1], got {result.tolist()}")
    return result


@dataclass(frozen=True)
class Geometry:
    """A curve's lengths at the moment when this was made.

    Attributes:
        kind: the curve's.
        gram: ``[K, K]`` float64, of the first bend and the legs.
    """

    kind: str
    gram: torch.Tensor

    @classmethod
    def of(cls, bends: Sequence[Sequence[torch.Tensor]], kind: str) -> "Geometry":
        """Of K lists of tensors; gradients flow to those that require them."""
        if composite_needed():
            return cls(kind, _gram_reference(bends))
        flat = [t if isinstance(t, DTensor) else real(t) for bend in bends for t in bend]
        wanted = torch.is_grad_enabled() and any(t.requires_grad for t in flat)
        return cls(kind, _Gram.apply(len(bends), *flat) if wanted else _gram(len(bends), flat))

    @property
    def num_bends(self) -> int:
        return len(self.gram)

    def norm(self, t: torch.Tensor) -> torch.Tensor:
        """The length of the vector w(t), float64 in t's shape."""
        tails = self._tails(t)
        return self._root(torch.cat([torch.ones_like(tails[..., :1]), tails], -1), self.gram)

    def chords(self, ts: torch.Tensor) -> torch.Tensor:
        """Distances between each of the points ``ts`` [T] and the one before; that of the first is 0."""
        steps = self._tails(ts).diff(dim=0)
        return torch.cat([steps.new_zeros(1), self._root(steps, self.gram[1:, 1:])])

    def speed(self, t: torch.Tensor) -> torch.Tensor:
        """|w'(t)|, float64 in t's shape; at an inner bend of a chain that of the segment after it."""
        return self._root(self._rates(t), self.gram[1:, 1:])

    def length(self) -> torch.Tensor:
        """Arc length, float64: exact for a chain, by Gauss's quadrature with 64 nodes for a bezier curve."""
        if self.kind == "polychain":
            return self.speed(self._cells(self.num_bends - 1)).mean()
        nodes, weights = (x.to(self.gram.device) / 2 for x in (_NODES, _WEIGHTS))
        return (self.speed(nodes + 0.5) * weights).sum()

    def arc_weight(self, t: torch.Tensor) -> torch.Tensor:
        """q(t), float64 in t's shape; 1 on a curve without length."""
        length = self.length()
        none = length == 0
        return torch.where(none, 1, self.speed(t) / torch.where(none, 1, length))

    def quantile(self, u: torch.Tensor) -> torch.Tensor:
        """The t below which the fraction ``u`` of the length lies, in u's shape and dtype; so t ~ q for uniform u.

        Exact for a chain; a bezier curve's speed is taken as constant in each of 512 cells. On a curve without length,
        or with one that is not a number, t is u.
        """
        cells = self.num_bends - 1 if self.kind == "polychain" else CELLS
        speed = self.speed(self._cells(cells))
        speed = torch.where(speed.sum() > 0, speed, 1)
        ends = torch.cat([speed.new_zeros(1), speed.cumsum(0)])
        target = u.double() * ends[-1]
        cell = (torch.searchsorted(ends, target, right=True) - 1).clamp(0, cells - 1)
        here = speed.take(cell)  # an index would wait for the device
        along = (target - ends.take(cell)) / torch.where(here > 0, here, 1)
        return ((cell + along.clamp(0, 1)) / cells).clamp(0, 1).to(u.dtype)

    def _cells(self, count: int) -> torch.Tensor:
        """The middles of so many equal parts of [0, 1]."""
        return (torch.arange(count, dtype=torch.float64, device=self.gram.device) + 0.5) / count

    def _tails(self, t: torch.Tensor) -> torch.Tensor:
        """C_j(t), [*t.shape, K - 1]."""
        c = curve_coefficients(t.double(), self.num_bends, self.kind)
        return c[..., 1:].flip(-1).cumsum(-1).flip(-1)

    def _rates(self, t: torch.Tensor) -> torch.Tensor:
        """C_j'(t), [*t.shape, K - 1]."""
        t, legs = t.double(), self.num_bends - 1
        if self.kind == "polychain":
            segment = (t * legs).floor().clamp(0, legs - 1)
            return legs * (torch.arange(legs, device=t.device) == segment.unsqueeze(-1)).double()
        return legs * (curve_coefficients(t, legs, "bezier") if legs > 1 else torch.ones_like(t).unsqueeze(-1))

    @staticmethod
    def _root(x: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
        """sqrt(x^T G x), whose gradient is 0 where it is 0."""
        square = ((x @ gram) * x).sum(-1)
        zero = square <= 0  # by rounding below; NaN stays
        return torch.where(zero, 0, torch.where(zero, 1, square).sqrt())


def _gram_reference(bends: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """In plain torch, with all that autograd and torch.func can do; needs K - 1 copies of the weights in float64."""
    rows = torch.stack([torch.cat([real(t).double().reshape(-1) for t in bend]) for bend in bends])
    rows = torch.cat([rows[:1], rows.diff(dim=0)])
    return rows @ rows.T


class _Gram(torch.autograd.Function):
    """G = V V^T with the rows V = A W of first bend and legs, W those of the bends: dW = (A^T (g + g^T) A) W."""

    @staticmethod
    def forward(num_bends, *flat):
        return _gram(num_bends, flat)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.num_bends = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, g):
        flat, num_bends = ctx.saved_tensors, ctx.num_bends
        if any(isinstance(t, DTensor) for t in flat):
            raise NotImplementedError(
                "Curve: the gradient of a sharded curve's length is not written, as nothing would reduce it over the "
                "ranks; t_sampling='arc_length' needs none"
            )
        size, needed = len(flat) // num_bends, ctx.needs_input_grad[1:]
        bends = [flat[j * size : (j + 1) * size] for j in range(num_bends)]
        a = _legs(g)
        m = a.T @ (g + g.T) @ a
        result = []
        for j in range(num_bends):
            wanted = needed[j * size : (j + 1) * size]
            result += curve_weights(bends, m[j]) if any(wanted) else [None] * size
        return None, *(r if n else None for r, n in zip(result, needed, strict=True))


@torch.no_grad()
def _gram(num_bends: int, flat: Sequence[torch.Tensor]) -> torch.Tensor:
    size = len(flat) // num_bends
    total = gram([flat[j * size : (j + 1) * size] for j in range(num_bends)], from_first=True)
    legs = _legs(total)
    legs[1:, 0] = 0  # the rows are differences from the first already
    return legs @ total @ legs.T


def gram(vectors: Sequence[Sequence[torch.Tensor]], *, from_first: bool = False) -> torch.Tensor:
    """Inner products [K, K], float64, of K vectors that are lists of tensors, on the device of the first.

    Args:
        from_first: take the vectors after the first as differences from it.
    """
    total = torch.zeros(len(vectors), len(vectors), dtype=torch.float64, device=vectors[0][0].device)
    for alike in _by_placement(vectors):
        first = alike[0][0]
        here = torch.zeros_like(total, device=local(first).device)
        for rows in chunks([[real(local(t)).detach().reshape(-1) for t in vector] for vector in alike]):
            rows = rows.double()
            if from_first:
                rows[1:] -= rows[0]
            here += rows @ rows.T
        if isinstance(first, DTensor):
            sums = [Replicate() if p.is_replicate() else Partial() for p in first.placements]
            here = DTensor.from_local(here, first.device_mesh, sums, run_check=False).full_tensor()
        total += here.to(total.device)
    return total


def _legs(like: torch.Tensor) -> torch.Tensor:
    """The matrix that makes first bend and legs of the bends."""
    eye = torch.eye(len(like), dtype=like.dtype, device=like.device)
    return eye - torch.cat([torch.zeros_like(eye[:1]), eye[:-1]])


def _by_placement(vectors):
    """The vectors' tensors in lists of which all are placed alike, or plain on one device."""
    groups: dict = {}
    for tensors in zip(*vectors, strict=True):
        first = tensors[0]
        key = (first.device_mesh, first.placements) if isinstance(first, DTensor) else first.device
        groups.setdefault(key, []).append(tensors)
    return [list(zip(*group, strict=True)) for group in groups.values()]


def chunks(bends: list[list[torch.Tensor]]) -> Iterator[torch.Tensor]:
    """The flat tensors as matrices ``[K, n]``, small ones put together and large ones cut."""
    limit = _CHUNK.get(bends[0][0].device.type, _CHUNK_ELSEWHERE)
    waiting, size = [], 0
    for tensors in zip(*bends, strict=True):
        numel = tensors[0].numel()
        if numel > limit:
            yield from (torch.stack([t[i : i + limit] for t in tensors]) for i in range(0, numel, limit))
            continue
        if size + numel > limit:
            yield _matrix(waiting)
            waiting, size = [], 0
        waiting.append(tensors)
        size += numel
    if waiting:
        yield _matrix(waiting)


def _matrix(columns: list[tuple[torch.Tensor, ...]]) -> torch.Tensor:
    flat = torch.cat([t for bend in zip(*columns, strict=True) for t in bend])
    return flat.view(len(columns[0]), flat.numel() // len(columns[0]))
