"""Multi-head attention whose projections have Gaussian weights (``ops/lrt.py`` has the formulas).

Vaswani et al., "Attention is all you need", NIPS 2017. The queries, keys, values and the output draw noise as outputs
of linear layers; what is between them is computed with these draws.

Letters: N batch, H heads, L queries, S keys, E embedding, D = E / H.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from losssurf_fast import ops
from losssurf_fast.nn.lrt import LRTLayer, Posterior, check_parameterization
from losssurf_fast.nn.lrt_linear import LRTLinear, linear_mean
from losssurf_fast.nn.variance_cache import cached_operand
from losssurf_fast.nn.weight_space import check_sampling, sample_output
from losssurf_fast.ops.noise import as_seed

_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class LRTMultiheadAttention(LRTLayer, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` whose projections have Gaussian weights.

    ``out_proj`` is an :class:`LRTLinear`. Each weight has its noise beside it: ``in_proj_weight`` [3 E, E] has
    ``in_proj_log_alpha`` or ``in_proj_log_sigma2``; ``q_proj_weight``, ``k_proj_weight`` and ``v_proj_weight``, which
    there are in its place where ``kdim`` or ``vdim`` differ from E, have ``q_proj_log_alpha`` and so on. Draws noise in
    training and computes with the mean weights in evaluation, unless ``lsf.prediction`` says otherwise; ``dropout``
    follows ``train()`` and ``eval()``. Nested tensors are not supported.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as for
            ``nn.MultiheadAttention``; dtype float64, float32, bfloat16, float16.
        parameterization, init_log_alpha, init_log_sigma2, sampling: as for :class:`LRTLinear`; "layer" has one alpha
            for each weight tensor, "neuron" one for each of its outputs.

    Raises:
        TypeError: an initial value is no real number.
        ValueError: unknown parameterization or sampling, or an initial value that it does not have or that is not
            finite.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device=None,
        dtype=None,
        *,
        parameterization: str = "additive",
        init_log_sigma2: float | None = None,
        init_log_alpha: float | None = None,
        sampling: str = "local",
    ) -> None:
        check_sampling("LRTMultiheadAttention", sampling)
        check_parameterization("LRTMultiheadAttention", parameterization, init_log_sigma2, init_log_alpha)
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self.become_stochastic(parameterization, init_log_sigma2, init_log_alpha)
        self.out_proj.__class__ = LRTLinear
        self.out_proj.become_stochastic(parameterization, init_log_sigma2, init_log_alpha)
        self.sampling = self.out_proj.sampling = sampling

    @staticmethod
    def gaussian_weights(layer: nn.Module) -> dict[str, int]:
        if layer._qkv_same_embed_dim:
            return {"in_proj_weight": 3 * layer.embed_dim}
        return dict.fromkeys(_SEPARATE, layer.embed_dim)

    @property
    def scale(self) -> nn.Parameter:
        """The noise of the first of its weights."""
        return self.posteriors()[0].scale

    def reset_torch_parameters(self) -> None:
        self.out_proj.reset_parameters()
        self._reset_parameters()

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        seed: int | torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As the torch layer's forward, with ``seed`` as for :meth:`LRTLayer.forward`.

        Without ``need_weights`` it runs ``F.scaled_dot_product_attention``, which holds no [L, S] matrix.

        Raises:
            TypeError, ValueError, NotImplementedError: shapes, dtypes or masks do not fit together, or tensors are
                nested.
            RuntimeError: ``is_causal`` comes without its ``attn_mask``, as in the torch layer.
        """
        self._check_inputs(query, key, value)
        if is_causal and attn_mask is None:
            raise RuntimeError("LRTMultiheadAttention: is_causal is a hint about attn_mask, which is missing")
        batched = query.dim() == 3
        q, k, v = (self._heads(t, batched) for t in self._project(query, key, value, seed))
        sizes, added = (*q.shape[:3], k.shape[2]), 0  # N, H, L, S
        if self.bias_k is not None:
            k, v, added = _append(k, self.bias_k), _append(v, self.bias_v), added + 1
        if self.add_zero_attn:
            k, v, added = (*(torch.cat([t, torch.zeros_like(t[:, :, :1])], 2) for t in (k, v)), added + 1)
        causal = is_causal and key_padding_mask is None and not need_weights and not added
        mask = None if causal else _additive_mask(attn_mask, key_padding_mask, sizes, added, q.dtype)
        dropout, weights = self.dropout if self.training else 0.0, None
        if need_weights:
            scores = (q * math.sqrt(1 / self.head_dim)) @ k.transpose(2, 3)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            out = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        out = out.permute(*((0, 2, 1, 3) if self.batch_first or not batched else (2, 0, 1, 3))).flatten(2)
        return self._project_output(out if batched else out.squeeze(0), seed), weights

    def _project(self, query, key, value, seed) -> list[torch.Tensor]:
        """Queries, keys and values; neighbours that come from one tensor and one weight are one product."""
        if self.drawn is None and self.draws_noise:
            seed = as_seed("LRTMultiheadAttention", seed, query.device)
        inputs, size, packed = (query, key, value), self.embed_dim, self._qkv_same_embed_dim
        runs = [0, 1, 2]  # where neighbours that share a product begin
        if packed:
            runs = [i for i in runs if i == 0 or inputs[i] is not inputs[i - 1]]
        outputs = []
        for begin, end in zip(runs, [*runs[1:], 3], strict=True):
            name = "in_proj_weight" if packed else _SEPARATE[begin]
            rows = slice(begin * size, end * size)
            projection = _Projection(self, name, rows, rows if packed else slice(None))
            outputs += self._respond(projection, inputs[begin], seed).split(size, -1)
        return outputs

    def _respond(self, projection: "_Projection", input: torch.Tensor, seed) -> torch.Tensor:
        if self.drawn is not None:
            return projection.plain(input, self.drawn[projection.name][projection.of_weight])
        if not self.draws_noise:
            return projection.plain(input, projection.weight)
        if self.sampling == "local":
            return sample_output(projection, input, seed)
        seed = _turn(seed, projection.column)
        return self._by_sample(self.sampling, input, lambda x: sample_output(projection, x, seed))

    def _by_sample(self, sampling: str, input: torch.Tensor, call) -> torch.Tensor:
        """``call(input)``; for flipout, whose signs are those of the first dimension, with samples there."""
        if sampling != "flipout" or self.batch_first or input.dim() < 3:
            return call(input)
        return call(input.transpose(0, 1)).transpose(0, 1)

    def _project_output(self, input: torch.Tensor, seed) -> torch.Tensor:
        if not isinstance(self.out_proj, LRTLayer):
            return self.out_proj(input)
        seed = None if seed is None else _turn(as_seed("out_proj", seed, input.device), -1)
        return self._by_sample(self.out_proj.sampling, input, lambda x: self.out_proj(x, seed))

    def _heads(self, t: torch.Tensor, batched: bool) -> torch.Tensor:
        """A projection's output -> ``[N, H, L, D]``."""
        if not batched:
            t = t.unsqueeze(0)
        elif not self.batch_first:
            t = t.transpose(0, 1)
        return t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _check_inputs(self, query, key, value) -> None:
        name = "LRTMultiheadAttention"
        given = {"query": (query, self.embed_dim), "key": (key, self.kdim), "value": (value, self.vdim)}
        for argument, (t, features) in given.items():
            if not isinstance(t, torch.Tensor):
                raise TypeError(f"{name}: {argument} must be a tensor, got {type(t).__name__}")
            if t.is_nested:
                raise NotImplementedError(f"{name}: {argument} is nested, which is not written; pass a padding mask")
            if t.dim() not in (2, 3) or t.dim() != query.dim() or t.shape[-1] != features:
                raise ValueError(
                    f"{name}: {argument} must be [L, {features}], or with a batch if query has one, got "
                    f"{tuple(t.shape)} beside query {tuple(query.shape)}"
                )
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"{name}: key and value must have equal lengths, got {tuple(key.shape)} and {tuple(value.shape)}"
            )
        batch = 0 if self.batch_first else 1
        if query.dim() == 3 and query.shape[batch] != key.shape[batch]:
            raise ValueError(
                f"{name}: query and key must have one batch size, got {tuple(query.shape)} and {tuple(key.shape)}"
            )


class _Projection:
    """Rows of an input projection, as the linear layer that ``sample_output`` works on."""

    def __init__(self, layer: LRTMultiheadAttention, name: str, outputs: slice, of_weight: slice) -> None:
        self.name, self.of_weight, self.column = name, of_weight, outputs.start
        self.parameterization, self.sampling = layer.parameterization, layer.sampling
        self.variances, self.variance_dtype = layer.variances, layer.variance_dtype
        weight, scale = self.held = getattr(layer, name), getattr(layer, layer.scale_name_of(name))
        self.weight = None if weight is None else weight[of_weight]
        self.scale = scale if self.parameterization == "layer" else scale[of_weight]
        self.bias = None if layer.in_proj_bias is None else layer.in_proj_bias[outputs]

    def posteriors(self) -> list[Posterior]:
        spread = lambda scale: scale.view(-1, 1)
        return [Posterior(self.name, self.weight, self.scale, self.parameterization, spread)]

    def local(self, input: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
        return ops.lrt_linear(
            input, self.weight, self.scale, self.bias, parameterization=self.parameterization, seed=seed,
            col_offset=self.column, variance_dtype=self.variance_dtype,
            variance_operand=cached_operand(
                self, (self.name, self.of_weight.start, self.of_weight.stop), self.held, input, self.weight, self.scale
            ),
        )  # fmt: skip

    def plain(self, input: torch.Tensor, weight: torch.Tensor | None, with_bias: bool = True) -> torch.Tensor:
        return linear_mean(input, weight, self.scale, self.bias if with_bias else None)


def _turn(seed: torch.Tensor, place: int) -> torch.Tensor:
    """A seed of its own for each place: a step of a linear congruential generator, modulo 2^64 (Knuth's MMIX)."""
    return (seed + place) * 6364136223846793005 + 1442695040888963407


def _append(t: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """``[1, 1, E]`` as one more key or value of ``[N, H, S, D]``."""
    batch, heads, _, size = t.shape
    return torch.cat([t, row.to(t.dtype).view(1, heads, 1, size).expand(batch, -1, -1, -1)], 2)


def _additive_mask(attn_mask, key_padding_mask, sizes, added: int, dtype: torch.dtype) -> torch.Tensor | None:
    """The sum of the masks as scores, broadcastable to ``[N, H, L, S + added]``; None without masks.

    ``sizes`` is N, H, L, S; the ``added`` keys are seen by all queries.
    """
    batch, heads, queries, keys = sizes
    shapes = {(queries, keys): (1, 1, queries, keys), (batch * heads, queries, keys): (batch, heads, queries, keys)}
    padding = {(batch, keys): (batch, 1, 1, keys)}
    if batch == 1:
        padding[keys,] = (1, 1, 1, keys)
    total = None
    for name, mask, known in (("attn_mask", attn_mask, shapes), ("key_padding_mask", key_padding_mask, padding)):
        if mask is None:
            continue
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(f"LRTMultiheadAttention: {name} must be bool or floating-point, got {mask.dtype}")
        if tuple(mask.shape) not in known:
            wanted = " or ".join(map(str, known))
            raise ValueError(f"LRTMultiheadAttention: {name} must be {wanted}, got {tuple(mask.shape)}")
        if mask.dtype == torch.bool:
            scores = torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
        else:
            scores = mask.to(dtype)
        scores = F.pad(scores.reshape(known[tuple(mask.shape)]), (0, added))
        total = scores if total is None else total + scores
    return total
