"""What a conversion did."""

import dataclasses

from torch import nn

_REPORT = "_losssurf_conversion_report"


@dataclasses.dataclass
class ConversionReport:
    """What ``to_lrt`` did: ``converted`` maps names to parameterizations, ``left`` maps names to reasons."""

    converted: dict[str, str] = dataclasses.field(default_factory=dict)
    left: dict[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"converted {len(self.converted)} layers, left {len(self.left)}"]
        lines += [f"  {name or '(the model)'}: {what}" for name, what in self.converted.items()]
        lines += [f"  {name or '(the model)'}: left, {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def conversion_report(model: nn.Module) -> ConversionReport:
    """What ``to_lrt`` converted in ``model`` (or in the model it wraps) and what it left, with the reasons.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``to_lrt`` was never called on this model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"conversion_report: model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        report = getattr(module, _REPORT, None)
        if report is not None:
            return report
    raise ValueError(f"conversion_report: to_lrt was not called on this {type(model).__name__}")


def add_report(model: nn.Module, report: ConversionReport) -> None:
    """Keep ``report`` with the model; what an earlier call converted stays in it."""
    before = getattr(model, _REPORT, None)
    if before is not None:
        report.converted = {**before.converted, **report.converted}
        report.left = {name: why for name, why in report.left.items() if name not in report.converted}
    setattr(model, _REPORT, report)


def drop_report(model: nn.Module) -> None:
    for module in model.modules():
        vars(module).pop(_REPORT, None)
