"""Layers whose weight lies on a curve between networks (``ops/curve_linear.py`` has the formulas)."""

import math

import torch
from torch import nn

from losssurf_fast import ops
from losssurf_fast.ops.curve import check_kind


class CurveLinear(nn.Module):
    """A linear layer on a path through weight space: at t its weight is ``sum_j c_j(t) weight_j``.

    Fast for small batches, where the combined weight is never written to memory. Parameters are named as in
    dnn-mode-connectivity: ``weight_0`` to ``weight_{K-1}`` ``[O, I]`` and ``bias_0`` to ``bias_{K-1}`` ``[O]``, the
    first and the last of them the ends of the path.

    Args:
        in_features, out_features, bias, device, dtype: as for ``nn.Linear``; dtype float64, float32, bfloat16, float16.
        num_bends: K, at least 2; the two ends count.
        kind: "bezier" or "polychain".
        fix_start, fix_end: whether the ends are frozen (``requires_grad=False``); bends between them always train.
        per_sample: where t is drawn, draw one for each row of the input instead of one for all. Both estimate the mean
            over t of the loss without bias; rows of their own have less variance, and cost K products instead of one.

    Raises:
        TypeError, ValueError: num_bends or kind is not as above.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        num_bends: int = 3,
        kind: str = "bezier",
        fix_start: bool = True,
        fix_end: bool = True,
        *,
        per_sample: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        check_kind("CurveLinear", num_bends, kind)
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.num_bends, self.kind, self.per_sample = num_bends, kind, per_sample
        factory = {"device": device, "dtype": dtype}
        frozen = {0: fix_start, num_bends - 1: fix_end}
        for j in range(num_bends):
            trains = not frozen.get(j, False)
            weight = nn.Parameter(torch.empty(out_features, in_features, **factory), requires_grad=trains)
            self.register_parameter(f"weight_{j}", weight)
            start = nn.Parameter(torch.empty(out_features, **factory), requires_grad=trains) if bias else None
            self.register_parameter(f"bias_{j}", start)
        self.reset_parameters()

    @property
    def weights(self) -> list[nn.Parameter]:
        """The K bends of the weight, in order."""
        return [getattr(self, f"weight_{j}") for j in range(self.num_bends)]

    @property
    def biases(self) -> list[nn.Parameter] | None:
        """The K bends of the bias, in order; None without bias."""
        return None if self.bias_0 is None else [getattr(self, f"bias_{j}") for j in range(self.num_bends)]

    def reset_parameters(self) -> None:
        """Draw each bend as ``nn.Linear`` draws its weight and bias."""
        for weight in self.weights:
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        bound = 1 / math.sqrt(self.in_features) if self.in_features > 0 else 0.0
        for bias in self.biases or ():
            nn.init.uniform_(bias, -bound, bound)

    @torch.no_grad()
    def init_linear(self) -> None:
        """Put the inner bends on the straight segment between the ends, evenly spaced."""
        for bends in (self.weights, self.biases or ()):
            for j in range(1, len(bends) - 1):
                bends[j].copy_(torch.lerp(bends[0], bends[-1], j / (self.num_bends - 1)))

    def forward(self, input: torch.Tensor, t: torch.Tensor | float | None = None) -> torch.Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``, the layer's output at t.

        ``t`` lies in [0, 1]: a number, a 0-d tensor, or one of shape ``input.shape[:-1]`` for a place of each row. None
        draws t ~ U(0, 1) from torch's default generator, in training and evaluation alike, as dnn-mode-connectivity
        does; layers of one network that should share a t are given it.
        """
        rows = input.shape[:-1]
        if t is None:
            t = torch.rand(rows if self.per_sample else (), device=input.device)
        elif isinstance(t, torch.Tensor) and t.dim() > 0 and t.shape != rows:
            raise ValueError(
                f"CurveLinear: t must be a number, a 0-d tensor or {tuple(rows)} for input {tuple(input.shape)}, "
                f"got {tuple(t.shape)}"
            )
        coefficients = ops.curve_coefficients(t, self.num_bends, self.kind).to(input.device)
        return ops.curve_linear(input, self.weights, coefficients, self.biases)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias_0 is not None}, "
            f"num_bends={self.num_bends}, kind={self.kind!r}, per_sample={self.per_sample}"
        )
