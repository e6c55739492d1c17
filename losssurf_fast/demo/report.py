"""What the demo shows: the talk's table as text, its pictures, and how pictures are saved."""

import math
import os
from collections.abc import Iterable
from pathlib import Path

import torch

from losssurf_fast.demo.data import Data
from losssurf_fast.demo.train import Result
from losssurf_fast.figures import finish, new_figure, save_figure

COLUMNS = ("network", "ELBO", "stoch.", "determ.", "ensemble")


def rows(results: list[Result]) -> list[tuple[str, ...]]:
    percent = lambda fraction: f"{100 * fraction:.1f}"
    return [
        (
            r.network,
            "-" if r.elbo is None else f"{r.elbo:.1f}",
            percent(r.stochastic),
            percent(r.deterministic),
            percent(r.ensemble),
        )
        for r in results
    ]


def table(results: list[Result]) -> str:
    """The talk's table, one network per line, 52 columns wide."""
    line = "{:10s}{:>12s}{:>10s}{:>10s}{:>10s}".format
    return "\n".join([line(*COLUMNS), "-" * 52, *(line(*row) for row in rows(results))])


def prepare_folder(folder: Path, names: Iterable[str], caller: str = "demo") -> None:
    """Make ``folder``, so that nothing is in the way of the files ``names`` once the training is done.

    Raises:
        SystemExit: the files cannot be saved there; the message begins with ``caller``.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise SystemExit(f"{caller}: --out must be a folder, {folder} is none") from None
    except OSError as error:
        raise SystemExit(f"{caller}: --out {folder} cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SystemExit(f"{caller}: --out {folder} cannot be written to")
    for name in names:
        if (folder / name).is_dir():
            raise SystemExit(f"{caller}: {name} in --out {folder} must be a file, it is a folder")


def save_pictures(folder: Path, figures: dict) -> list[Path]:
    """Save figures under their names and return the paths; a picture appears only when it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / name)
        save_figure(figure, paths[-1])
    return paths


def noise_figures(results: list[Result], variance_network, data: Data) -> tuple:
    """The table, the training curves, and the weights of the variance network."""
    return (
        _table_figure(results, data.name),
        _training_figure(results, data.chance()),
        _weights_figure(variance_network, data),
    )


def _table_figure(results: list[Result], data: str):
    figure = new_figure(6.4, 0.62 + 0.36 * (len(results) + 1))
    axes = figure.add_subplot()
    axes.axis("off")
    axes.set_title(f"Accuracy (%) on {data} under three prediction schemes", fontsize=11)
    header = ("network", "ELBO", "stochastic", "deterministic", "ensemble")
    cells = axes.table(
        cellText=rows(results), colLabels=header, cellLoc="right", colLoc="right", bbox=(0, 0, 1, 1), edges="horizontal"
    )
    cells.auto_set_font_size(False)
    cells.set_fontsize(10)
    for (row, column), cell in cells.get_celld().items():
        cell.set_edgecolor("#bbbbbb")
        if row == 0:
            cell.set_text_props(weight="bold")
        if column == 0:
            cell.set_text_props(ha="left")
        if row > 0 and results[row - 1].network == "variance" and column == 3:
            cell.set_text_props(color="#b2182b", weight="bold")
    return figure


COLOURS = {
    "dropout": "#222222", "layer": "#c6dbef", "neuron": "#9ecae1", "weight": "#4292c6", "additive": "#08519c",
    "variance": "#d7301f",
}  # fmt: skip


def _training_figure(results: list[Result], chance: float):
    figure = new_figure(7.2, 3.4)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, scheme in zip(panels, ("deterministic", "ensemble"), strict=True):
        for r in results:
            curve = [100 * value for value in getattr(r, f"curve_{scheme}")]
            strong = r.network in ("dropout", "variance")
            axes.plot(r.epochs, curve, color=COLOURS[r.network], lw=2 if strong else 1.4, label=r.network)
        axes.axhline(100 * chance, color="#888888", lw=0.8, ls=":")
        axes.set_title(scheme, fontsize=11)
        axes.set_xlabel("epoch")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_ylim(0, 102)
    panels[0].set_ylabel("test accuracy (%)")
    panels[0].text(results[0].epochs[-1], 100 * chance + 2, "chance", ha="right", color="#666666", fontsize=8)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False, fontsize=9
    )
    return finish(figure)


@torch.no_grad()
def _weights_figure(model, data: Data):
    """The deviations of the variance network's weights, and what its noisy units carry for each class."""
    layer, digits = model.hidden, range(data.classes)
    inputs = model.relu1(model.first(data.test_x))
    std = (inputs.square() @ layer.log_sigma2.exp().t()).sqrt()
    by_class = lambda values: torch.stack([values[data.test_y == c].mean(0) for c in digits])
    std_of_class, input_of_class = by_class(std), by_class(inputs)  # [classes, units]
    units = std_of_class.std(0).topk(min(60, std.shape[1])).indices  # those that tell classes apart most
    units = units[std_of_class[:, units].argmax(0).argsort(stable=True)]
    sources = input_of_class.argmax(0).argsort(stable=True)
    std_of_class, mean_of_class = std_of_class[:, units], layer.bias[units].abs().expand(data.classes, -1)

    figure = new_figure(9.6, 3.8)
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.2))
    axes = left.subplots()
    log_sigma = layer.log_sigma2[units][:, sources] / (2 * math.log(10))
    image = axes.imshow(log_sigma.numpy(), cmap="magma", vmin=-3, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_title("log10 of the weights' deviations; all means are 0", fontsize=10)
    axes.set_xlabel("inputs, by the digit that excites them")
    axes.set_ylabel(f"{len(units)} most telling units, by digit")
    left.colorbar(image, ax=axes, extend="both")
    panels = right.subplots(2, 1, sharex=True, sharey=True)
    limit = std_of_class.flatten().quantile(0.99).item()
    for axes, values, title in (
        (panels[0], mean_of_class, "|mean| of a unit's signal: the same for every digit"),
        (panels[1], std_of_class, "its standard deviation: this tells the digits apart"),
    ):
        image = axes.imshow(values.numpy(), cmap="magma", vmin=0, vmax=limit, aspect="auto", interpolation="nearest")
        axes.set_title(title, fontsize=10)
        axes.set_ylabel("digit")
        axes.set_yticks(digits, digits, fontsize=7)
    panels[1].set_xlabel("the same units")
    right.colorbar(image, ax=list(panels), extend="max")
    return figure
