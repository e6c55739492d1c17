"""The mean of an ensemble's predictions, one member at a time: whatever their number, the memory is that of two.

With K members' probabilities p_k [..., C] and the entropy H(p) = -sum_c p_c log p_c::

    log_probs            log (1/K sum_k p_k), by logaddexp
    mutual_information   H(1/K sum_k p_k) - 1/K sum_k H(p_k)

The latter is what the draw of the weights and the label tell about each other (BALD: Houlsby, Huszar, Ghahramani and
Lengyel, "Bayesian active learning for classification and preference learning", 2011), in nats; the members'
disagreement, 0 where all are alike.

Numerics: the softmax of a member in fp32 (fp64 for fp64), sums over members and entropies in fp64, so that the
millionth member still counts.
"""

import math

import torch


class OnlineEnsemble:
    """Accumulates the mean of the members' softmax, on the logits' device and without reading from it.

    >>> ensemble = lsf.OnlineEnsemble()
    >>> for member in members:
    ...     ensemble.update(member(x))  # [..., classes]
    >>> ensemble.log_probs.exp().argmax(-1), ensemble.mutual_information

    Gradients flow to the logits where they are enabled (a loss over an ensemble; its graph keeps every member).

    Args:
        entropies: False saves the time for the members' entropies where ``mutual_information`` is not wanted.
    """

    def __init__(self, *, entropies: bool = True) -> None:
        if not isinstance(entropies, bool):
            raise TypeError(f"OnlineEnsemble: entropies must be a bool, got {type(entropies).__name__}")
        self.num_members = 0
        self._with_entropies = entropies
        self._log_sum: torch.Tensor | None = None  # [..., C]
        self._entropies: torch.Tensor | None = None  # [...], their sum
        self._dtype: torch.dtype | None = None

    def update(self, logits: torch.Tensor, *, stacked: bool = False) -> None:
        """Take in a member's logits ``[..., C]``, or their log-probabilities, which have the same softmax.

        Args:
            stacked: the first size of logits counts several members.

        Raises:
            TypeError, ValueError: no tensor of real numbers, no classes, or another shape or device than the first
                member's.
        """
        name = "OnlineEnsemble.update"
        log_probs = log_softmax(name, logits)
        if not stacked:
            log_probs = log_probs.unsqueeze(0)
        members, *shape = log_probs.shape
        if not shape or not members:
            raise ValueError(f"{name}: stacked logits must be [members, ..., classes], got {tuple(log_probs.shape)}")
        before = self._log_sum
        if before is not None and (before.shape != torch.Size(shape) or before.device != log_probs.device):
            wanted, got = f"{tuple(before.shape)} on {before.device}", f"{tuple(shape)} on {log_probs.device}"
            raise ValueError(f"{name}: logits must be {wanted} as before, got {got}")
        self._dtype = self._dtype or log_probs.dtype
        log_probs = log_probs.double()
        log_sum = log_probs[0] if members == 1 else log_probs.logsumexp(0)
        self._log_sum = log_sum if before is None else torch.logaddexp(before, log_sum)
        if self._with_entropies:
            entropies = entropy(log_probs).sum(0)
            self._entropies = entropies if before is None else self._entropies + entropies
        self.num_members += members

    @property
    def log_probs(self) -> torch.Tensor:
        """``[..., C]`` in float32 (float64 where the first member's logits were)."""
        return self._log_mean().to(self._dtype)

    @property
    def probs(self) -> torch.Tensor:
        """``log_probs.exp()``, rounded once."""
        return self._log_mean().exp().to(self._dtype)

    @property
    def predictive_entropy(self) -> torch.Tensor:
        """``[...]``, float64: the entropy of the mean."""
        return entropy(self._log_mean())

    @property
    def expected_entropy(self) -> torch.Tensor:
        """``[...]``, float64: the mean of the members' entropies."""
        if not self._with_entropies:
            raise RuntimeError("OnlineEnsemble: the members' entropies were not kept, as entropies=False said")
        self._refuse_empty()
        return self._entropies / self.num_members

    @property
    def mutual_information(self) -> torch.Tensor:
        """``[...]``, float64, at least 0; exactly 0 for one member."""
        return (self.predictive_entropy - self.expected_entropy).clamp(min=0)  # what rounding leaves below 0

    def _log_mean(self) -> torch.Tensor:
        self._refuse_empty()
        return self._log_sum - math.log(self.num_members)

    def _refuse_empty(self) -> None:
        if not self.num_members:
            raise RuntimeError("OnlineEnsemble: there are no members yet, call update")


def entropy(log_probs: torch.Tensor) -> torch.Tensor:
    """In nats, over the last dimension; classes of probability 0 have none."""
    return -(log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(-1)


def log_softmax(caller: str, logits: torch.Tensor) -> torch.Tensor:
    """Over the last dimension, in float32 (float64 for float64)."""
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"{caller}: logits must be a tensor, got {type(logits).__name__}")
    if not logits.is_floating_point():
        raise TypeError(f"{caller}: logits must be of a floating dtype, got {logits.dtype}")
    if not logits.dim() or not logits.shape[-1]:
        raise ValueError(f"{caller}: logits must be [..., classes], got {tuple(logits.shape)}")
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
