"""Sums of what tells how good and how sure predictions are, on their device and without keeping them.

With a sample's probabilities p [C], label y, confidence max_c p_c and entropy H(p) = -sum_c p_c log p_c, in nats::

    accuracy             mean of [argmax_c p_c = y]
    nll                  mean of -log p_y
    brier                mean of sum_c (p_c - [c = y])^2, between 0 and 2
    ece                  sum_b |mean accuracy - mean confidence| of bin b, weighted by its share of the samples
    predictive_entropy   mean of H(p)
    mutual_information   mean of H(p) - mean over members of H(p_k); ``ensembling.py`` has it

Bins of equal width: b/B < confidence <= (b + 1)/B, the border compared in float64; the first has the confidence 0, too.

Sources: Brier, "Verification of forecasts expressed in terms of probability", 1950; Guo, Pleiss, Sun and Weinberger,
"On calibration of modern neural networks", ICML 2017 (ECE and its bins); Houlsby et al., 2011 (mutual information).

Numerics: everything in fp64, in pieces of bounded memory.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist

from losssurf_fast.arguments import check_group, check_int
from losssurf_fast.averaging.batch_norm import spread_over_ranks
from losssurf_fast.ensembling import OnlineEnsemble, entropy
from losssurf_fast.uncertainty.report import MEANS, UncertaintyReport

_NAME = "UncertaintyMetrics"
_PIECE = 2**21  # probabilities that are worked on at once


class UncertaintyMetrics:
    """Accuracy, NLL, Brier score, ECE, predictive entropy and mutual information over batches of predictions.

    >>> metrics = lsf.UncertaintyMetrics()
    >>> for x, y in loader:
    ...     metrics.update(model(x), y)
    >>> print(metrics.compute())

    :meth:`update` waits for no device; :meth:`compute` reads the sums once.

    Args:
        num_bins: of the confidences, for the ECE and the reliability diagram.
        ignore_index: samples with this target do not count, as in ``F.cross_entropy``.
        device: where the sums are; None for that of the first batch.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    def __init__(
        self, num_bins: int = 15, *, ignore_index: int = -100, device: torch.device | str | int | None = None
    ) -> None:
        self.num_bins = check_int(_NAME, "num_bins", num_bins, 1)
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise TypeError(f"{_NAME}: ignore_index must be an int, got {type(ignore_index).__name__}")
        self.ignore_index = ignore_index
        self._device = None if device is None else torch.device(device)
        self.reset()

    def reset(self) -> None:
        """Forget all samples."""
        self._totals: torch.Tensor | None = None  # MEANS, targets out of range, then `_by_bin`, [3, B] flattened

    @torch.no_grad()
    def update(self, outputs: OnlineEnsemble | torch.Tensor, targets: torch.Tensor) -> None:
        """Take in a batch, of any number of samples.

        Args:
            outputs: logits or log-probabilities ``[..., C]``, classes last (``logits.movedim(1, -1)`` of those in the
                order of ``F.cross_entropy``), or an ensemble of them. A tensor is one member: its mutual information
                is 0.
            targets: class indices ``[...]``. Those outside [0, C) are an error, which :meth:`compute` raises, as only
                it reads from the device.

        A NaN among a sample's outputs makes all results NaN but the accuracy, to which it is a wrong prediction.

        Raises:
            TypeError, ValueError: dtypes, shapes or devices are not as above.
        """
        ensemble = isinstance(outputs, OnlineEnsemble)
        information = outputs.mutual_information if ensemble else None
        log_probs = outputs.log_probs if ensemble else outputs
        _check(log_probs, targets)
        log_probs, targets = log_probs.reshape(-1, log_probs.shape[-1]), targets.reshape(-1).long()
        information = log_probs.new_zeros(targets.shape) if information is None else information.reshape(-1)
        rows = max(1, _PIECE // log_probs.shape[1])
        for piece in zip(log_probs.split(rows), targets.split(rows), information.split(rows), strict=True):
            self._add(self._sums(*piece))

    def _sums(self, logits: torch.Tensor, targets: torch.Tensor, information: torch.Tensor) -> torch.Tensor:
        """The totals of a batch; logits ``[N, C]``, targets ``[N]``, information ``[N]``."""
        logits, classes = logits.double(), logits.shape[1]
        probs, log_probs = logits.softmax(1), logits.log_softmax(1)  # equal logits have exactly equal probs
        in_range = (targets >= 0) & (targets < classes)
        valid = in_range & (targets != self.ignore_index)
        label = torch.where(valid, targets, 0)[:, None]
        confidence, predicted = probs.max(1)
        nll = -log_probs.gather(1, label)[:, 0]
        brier = probs.scatter_add(1, label, probs.new_full(label.shape, -1.0)).square().sum(1)
        terms = torch.stack([nll, brier, entropy(log_probs), information.double()])
        correct = (predicted == targets) & ~confidence.isnan()
        by_bin = torch.stack([valid, correct, confidence])
        borders = torch.arange(1, self.num_bins, dtype=torch.float64, device=logits.device) / self.num_bins
        binned = by_bin.new_zeros(3, self.num_bins).index_add(
            1, torch.bucketize(confidence, borders), torch.where(valid, by_bin, 0.0)
        )
        out_of_range = (~in_range & (targets != self.ignore_index)).sum()
        return torch.cat([torch.where(valid, terms, 0.0).sum(1), out_of_range[None], binned.flatten()])

    def _add(self, sums: torch.Tensor) -> None:
        if self._totals is None:
            self._totals = sums.new_zeros(self._size, device=self._device)
        waits = self._totals.device.type == "cpu"  # a copy to the CPU that does not wait is read before it is there
        self._totals += sums.to(self._totals.device, non_blocking=not waits)

    @property
    def _size(self) -> int:
        return len(MEANS) + 1 + 3 * self.num_bins

    def _current(self) -> torch.Tensor:
        if self._totals is None:
            return torch.zeros(self._size, dtype=torch.float64, device=self._device)
        return self._totals.clone()

    def compute(self, process_group=None) -> UncertaintyReport:
        """The results so far, which later batches may add to.

        Args:
            process_group: where torch.distributed is initialised every rank of this group must call, and gets the
                results over the samples of all: None for all ranks, False for this one alone. A rank without samples
                needs the constructor's ``device`` where the group cannot talk between CPUs.

        Raises:
            TypeError: no process group.
            ValueError: there are no samples, or targets were out of range.
        """
        check_group(f"{_NAME}.compute", process_group)
        totals = self._current()
        if spread_over_ranks(process_group):
            dist.all_reduce(totals, group=process_group)
        *sums, out_of_range = totals[: len(MEANS) + 1].tolist()
        if out_of_range:
            raise ValueError(
                f"{_NAME}: targets must be class indices in [0, classes) or ignore_index={self.ignore_index}, got "
                f"{out_of_range:.0f} others"
            )
        return UncertaintyReport.of_sums(_NAME, sums, *totals[len(MEANS) + 1 :].view(3, -1).cpu().numpy())

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The sums so far, ``{"totals": ...}``."""
        return {"totals": self._current()}

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Go on from what :meth:`state_dict` gave.

        Raises:
            ValueError: it is another one's, or that of metrics with other bins.
        """
        totals = state_dict.get("totals") if isinstance(state_dict, Mapping) else None
        if not isinstance(totals, torch.Tensor) or totals.shape != (self._size,) or totals.dtype != torch.float64:
            raise ValueError(
                f"{_NAME}.load_state_dict: state_dict must hold the float64 'totals' ({self._size},) of "
                f"{self.num_bins} bins"
            )
        self._totals = totals.to(self._device or totals.device, copy=True)


def _check(log_probs, targets) -> None:
    name = f"{_NAME}.update"
    for argument, value in (("outputs", log_probs), ("targets", targets)):
        if not isinstance(value, torch.Tensor):
            wanted = "a tensor or an OnlineEnsemble" if argument == "outputs" else "a tensor"
            raise TypeError(f"{name}: {argument} must be {wanted}, got {type(value).__name__}")
    if not log_probs.is_floating_point():
        raise TypeError(f"{name}: outputs must be floating, logits or log-probabilities, got {log_probs.dtype}")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise TypeError(f"{name}: targets must be integers, class indices, got {targets.dtype}")
    if log_probs.dim() < 1 or not log_probs.shape[-1] or log_probs.shape[:-1] != targets.shape:
        got = f"{tuple(log_probs.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"{name}: outputs must be [..., classes] and targets [...], got {got}")
    if log_probs.device != targets.device:
        raise ValueError(f"{name}: targets must be on the device {log_probs.device}, got {targets.device}")
