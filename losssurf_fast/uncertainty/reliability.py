"""The picture of a model's calibration (Guo et al., ICML 2017, figure 1)."""

import os

import numpy as np

from losssurf_fast.figures import finish, new_figure
from losssurf_fast.uncertainty.report import UncertaintyReport

_ACCURACY, _GAP = "#2166ac", "#d7301f"


def reliability_figure(report: UncertaintyReport, path: str | os.PathLike | None):
    bins = len(report.bin_counts)
    left, width = np.arange(bins) / bins, 1 / bins
    filled = report.bin_counts > 0
    figure = new_figure(4.2, 5.0)
    diagram, shares = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    at, accuracy = left[filled], report.bin_accuracy[filled]
    gap = report.bin_confidence[filled] - accuracy
    diagram.bar(at, accuracy, width, align="edge", color=_ACCURACY, edgecolor="white", lw=0.6, label="accuracy")
    diagram.bar(
        at, gap, width, accuracy, align="edge", facecolor="none", edgecolor=_GAP, hatch="////", lw=0.8,
        label="gap to the mean confidence",
    )  # fmt: skip
    diagram.plot([0, 1], [0, 1], color="#888888", lw=0.9, ls="--")
    diagram.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy", title=f"ECE {100 * report.ece:.2f} %")
    diagram.legend(fontsize=8, frameon=False, loc="upper left")
    shares.bar(
        left, report.bin_counts / report.num_samples, width, align="edge", color="#888888", edgecolor="white", lw=0.6
    )
    shares.set(xlabel="confidence", ylabel="share of samples", ylim=(0, None))
    return finish(figure, path)
