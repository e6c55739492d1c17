"""The embedding with Gaussian weights, trained by local reparameterization (``ops/lrt.py`` has the formulas)."""

import torch
from torch import nn
from torch.nn import functional as F

from losssurf_fast import ops
from losssurf_fast.nn.lrt import LRTLayer, check_parameterization
from losssurf_fast.nn.weight_space import check_sampling


class LRTEmbedding(LRTLayer, nn.Embedding):
    """``nn.Embedding`` whose weights are Gaussian: every row that is looked up draws noise of its own.

    That is local reparameterization of a linear layer whose input is the one-hot code of the index: the mean is
    ``weight[index]``, the variance ``sigma^2[index]``. Draws noise in training and returns the mean weights in
    evaluation, unless ``lsf.prediction`` says otherwise. The mean of a "variance" layer is 0.

    Args:
        num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, device, dtype: as
            for ``nn.Embedding``; dtype float64, float32, bfloat16, float16. ``scale_grad_by_freq`` and ``sparse`` hold
            for rows of the noise's parameter too. (A KL divergence has dense gradients.)
        parameterization: "layer", "neuron", "weight" (``log_alpha`` [1], [embedding_dim] or [num_embeddings,
            embedding_dim]: "neuron" is one alpha for each dimension of the embedding), "additive" or "variance"
            (``log_sigma2`` [num_embeddings, embedding_dim]; ``weight`` is None for "variance").
        init_log_alpha, init_log_sigma2, sampling: as for :class:`LRTLinear`.

    ``max_norm`` shrinks the looked-up rows of the means before their noise is drawn; ``lsf.sample_weights``, which does
    not know the rows, refuses it. The row ``padding_idx`` has no noise, and lookups of it no gradient. KL divergences
    count it like any other row.

    Raises:
        TypeError: an initial value is no real number.
        ValueError: unknown parameterization or sampling, an initial value that it does not have or that is not finite,
            or ``max_norm`` with "variance".
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: torch.Tensor | None = None,
        _freeze: bool = False,
        device=None,
        dtype=None,
        *,
        parameterization: str = "additive",
        init_log_sigma2: float | None = None,
        init_log_alpha: float | None = None,
        sampling: str = "local",
    ) -> None:
        check_sampling("LRTEmbedding", sampling)
        check_parameterization("LRTEmbedding", parameterization, init_log_sigma2, init_log_alpha)
        if max_norm is not None and parameterization == "variance":
            raise ValueError(f"LRTEmbedding: max_norm must be None for 'variance', whose mean is 0, got {max_norm}")
        super().__init__(
            num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, _weight,
            _freeze, device, dtype,
        )  # fmt: skip
        self.become_stochastic(parameterization, init_log_sigma2, init_log_alpha)
        self.sampling = sampling

    @staticmethod
    def gaussian_weights(layer: nn.Module) -> dict[str, int]:
        return {"weight": layer.embedding_dim}

    def spread(self, scale: torch.Tensor) -> torch.Tensor:
        """A scale ``[embedding_dim]``, broadcastable to the weight."""
        return scale.view(1, -1)

    def respond(self, input: torch.Tensor, seed: int | torch.Tensor | None, **geometry) -> torch.Tensor:
        if self.max_norm is not None:  # before anything is drawn from the rows
            with torch.no_grad():
                torch.embedding_renorm_(self.weight.detach(), input.contiguous(), self.max_norm, self.norm_type)
        return super().respond(input, seed, **geometry)

    def local(self, input: torch.Tensor, seed: int | torch.Tensor | None) -> torch.Tensor:
        mean = self.plain(input, self.weight)
        wide = torch.promote_types(mean.dtype, torch.float32)
        if self.parameterization in ("layer", "neuron"):
            var = self.scale.to(wide).exp() * mean.to(wide).square()
        else:
            var = self._rows(input, self.scale).to(wide).exp()
            if self.parameterization == "weight":
                var = var * mean.to(wide).square()
        return self._without_noise_at_padding(input, ops.lrt_sample(mean, var, seed), mean)

    def plain(self, input: torch.Tensor, weight: torch.Tensor | None, with_bias: bool = True) -> torch.Tensor:
        dtype = self.like.dtype if self.weight is None else self.weight.dtype
        if weight is None:
            return torch.zeros_like(self._rows(input, self.scale), dtype=dtype)
        rows = self._rows(input, weight).to(dtype)
        if weight is self.weight or self.padding_idx is None:
            return rows
        mean = torch.zeros_like(rows) if self.weight is None or not with_bias else self._rows(input, self.weight)
        return self._without_noise_at_padding(input, rows, mean)

    def _rows(self, input: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return F.embedding(input, table, self.padding_idx, None, 2.0, self.scale_grad_by_freq, self.sparse)

    def _without_noise_at_padding(self, input: torch.Tensor, drawn: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        if self.padding_idx is None:
            return drawn
        return torch.where((input == self.padding_idx).unsqueeze(-1), mean, drawn)
