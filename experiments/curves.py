"""Independently trained networks, and curves of low loss between them.

Source: Garipov et al., "Loss surfaces, mode connectivity, and fast ensembling of DNNs", NeurIPS 2018.

    python -m experiments.curves
    python -m experiments.curves --data cifar100 --root DIR --model preresnet164 --epochs 150 --lr 0.1

Three networks are trained from different weights. Between the first two a Bezier curve and a polygonal chain with one
bend are trained to have a low loss at a uniform t; the straight segment is measured beside them. Loss (with its L2
term) and error are taken along the paths and on three planes: through the networks, and through each path's bend.
"""

import dataclasses
import functools

from torch import nn
from torch.nn import functional as F

import losssurf_fast as lsf
from experiments import command, models, report, trainer
from experiments.data import Data
from losssurf_fast.figures import finish, new_figure
from losssurf_fast.surface.contours import draw_contours

# weight decay; the curve's epochs and rate, over those of a network
RECIPES = {"vgg16": (5e-4, 3, 0.3), "preresnet": (3e-4, 4 / 3, 0.3)}
KINDS = {"Bezier": "bezier", "chain": "polychain"}
COLUMNS = ("loss min", "loss max", "error min", "error max")
DEFAULTS = {
    "digits": {"model": "preresnet8", "width": 4, "epochs": 12, "batch_size": 32, "lr": 0.1},
    "mnist": {"model": "preresnet20", "width": 16, "epochs": 10, "batch_size": 128, "lr": 0.1},
    "cifar10": {"model": "vgg16", "width": 64, "epochs": 200, "batch_size": 128, "lr": 0.05},
    "cifar100": {"model": "vgg16", "width": 64, "epochs": 200, "batch_size": 128, "lr": 0.05},
    "quick": {"width": 2, "epochs": 2},
}
GRID = {"digits": (31, 15), "quick": (5, 3)}  # points on a path, and along each side of a plane; else 61 and 21
PUBLISHED = {  # training loss, test error (%): Bezier, chain
    ("cifar100", "vgg16"): ((0.48, 0.89, 27.4, 30.1), (0.59, 1.05, 27.1, 30.8)),
    ("cifar100", "preresnet164"): ((0.26, 0.49, 21.3, 23.4), (0.30, 0.49, 21.4, 23.6)),
    ("cifar10", "vgg16"): ((0.14, 0.24, 6.79, 7.75), (0.16, 0.27, 6.79, 8.08)),
    ("cifar10", "preresnet164"): ((0.09, 0.18, 4.45, 4.97), (0.11, 0.18, 4.39, 5.13)),
}


def recipe(setting: command.Setting) -> tuple[float, float, float]:
    return models.recipe(RECIPES, setting.model, setting.experiment)


def train_network(setting: command.Setting, data: Data, number: int) -> nn.Module:
    """Network ``number``, from weights and batches of its own."""
    seed = setting.seed + 1000 * number
    model = setting.build(data, seed)
    optimizer = trainer.sgd(setting, model, recipe(setting)[0])
    schedule, batches = trainer.falling(optimizer, setting.epochs), setting.train_batches(data)
    trainer.train(setting, f"network{number}", model, batches, optimizer, setting.epochs, schedule=schedule, seed=seed)
    return model


def train_curve(setting: command.Setting, data: Data, name: str, ends: list[nn.Module]) -> lsf.Curve:
    """A curve of ``KINDS[name]`` between two networks, trained with the L2 term of the weights at each t."""
    weight_decay, longer, slower = recipe(setting)
    curve = lsf.Curve(ends, kind=KINDS[name])
    optimizer = trainer.sgd(setting, curve, 0.0, slower * setting.lr)
    epochs = max(1, round(longer * setting.epochs))

    def loss(model, x, y, done):
        return F.cross_entropy(model(x).float(), y) + 0.5 * weight_decay * curve.l2()

    schedule, batches = trainer.falling(optimizer, epochs), setting.train_batches(data)
    trainer.train(setting, name, curve, batches, optimizer, epochs, loss=loss, schedule=schedule)
    return curve


def procedure(setting: command.Setting) -> report.Result:
    data = setting.load_data()
    networks = [train_network(setting, data, number) for number in range(3)]
    curves = {name: train_curve(setting, data, name, networks[:2]) for name in KINDS}
    segment = lsf.Curve(networks[:2], kind="polychain", num_bends=2)
    num_points, _ = grid(setting)
    loaders, weight_decay = both_sets(setting, data), recipe(setting)[0]
    measured = {
        name: lsf.evaluate_curve(curve, loaders, num_points=num_points, weight_decay=weight_decay)
        for name, curve in {"segment": segment, **curves}.items()
    }
    surfaces = measure_planes(setting, data, networks, curves)
    ours = {}
    for name, found in measured.items():
        loss, error = found["train"]["loss"], found["test"]["error"]
        ours[name] = (loss.min, loss.max, 100 * error.min, 100 * error.max)
    key = (setting.data, setting.model) if (setting.data, setting.model) in PUBLISHED else ("cifar10", "preresnet164")
    text = report.comparison(
        f"{setting.model} on {setting.data}: training loss with L2 term, test error (%)",
        COLUMNS, ours, dict(zip(KINDS, PUBLISHED[key], strict=True)),
        data=setting.data, source=f"Garipov et al. 2018, {key[1]} on {key[0]}",
    )  # fmt: skip
    paths = {name: {"length": found.length} | dataclasses.asdict(found) for name, found in measured.items()}
    figures = {"curves.png": _paths_figure(measured), "planes.png": _planes_figure(surfaces)}
    return report.Result(text, {"rows": ours, "paths": _plain(paths)}, figures)


def grid(setting: command.Setting) -> tuple[int, int]:
    return GRID.get("quick" if setting.quick else setting.data, (61, 21))


def both_sets(setting: command.Setting, data: Data) -> dict:
    """Training and test set to measure on; the first also gives the BatchNorm statistics of every point."""
    return {"train": setting.test_batches(data, train=True), "test": setting.test_batches(data)}


def measure_planes(setting: command.Setting, data: Data, networks: list[nn.Module], curves: dict) -> dict:
    """Surfaces by their titles: through the three networks, and through the bend of each curve with its path."""
    model, (_, points) = setting.build(data), grid(setting)
    planes = {"independent optima": (lsf.Plane.through(*networks), {})}
    for name, curve in curves.items():
        bend = dict(curve.bends[1].named_parameters())
        planes[name] = (lsf.Plane.through(*networks[:2], bend, labels=("w1", "w2", "bend")), {name: curve})
    return {
        title: plane.evaluate(
            model, both_sets(setting, data), points=points, trajectories=paths,
            margin=(0.2, 0.2, 1.0, 1.0) if paths else 0.2,
            loss_fn=trainer.RegularisedLoss(model, recipe(setting)[0]),
            path=setting.out / f"plane_{title.split()[0]}.npz", progress=setting.first,
        )
        for title, (plane, paths) in planes.items()
    }  # fmt: skip


def _plain(value):
    """Arrays as lists, for JSON."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return value.tolist() if hasattr(value, "tolist") else value


def _paths_figure(measured: dict):
    figure = new_figure(8, 3.4)
    left, right = figure.subplots(1, 2)
    colours = {"segment": "#888888", "Bezier": "#d7301f", "chain": "#2166ac"}
    for name, found in measured.items():
        left.plot(found.ts, found["train"]["loss"].values, color=colours[name], lw=1.8, label=name)
        right.plot(found.ts, 100 * found["test"]["error"].values, color=colours[name], lw=1.8)
    left.set_ylabel("training loss with its L2 term")
    right.set_ylabel("test error (%)")
    for axes in (left, right):
        axes.set_xlabel("t, from one network to the other")
        axes.set_xlim(0, 1)
        axes.set_yscale("log" if axes is left else "linear")
    left.legend(frameon=False, fontsize=9)
    return finish(figure)


def _planes_figure(surfaces: dict):
    """As the talk shows them: training loss above, test error below."""
    figure = new_figure(15, 8)
    panels = figure.subplots(2, len(surfaces))
    for column, (title, surface) in zip(panels.T, surfaces.items(), strict=True):
        for axes, metric in zip(column, ("train_loss", "test_error"), strict=True):
            draw_contours(figure, axes, surface, metric)
            axes.set_aspect("auto")  # paths are much longer than they are high
        column[0].set_title(title)
    return finish(figure, framed=True)


main = functools.partial(command.main, "curves", procedure, DEFAULTS, description=__doc__)

if __name__ == "__main__":
    raise SystemExit(main())
