"""The width of the optima that SGD and SWA find: along the line between them, and along random rays.

Source: Izmailov et al., "Averaging weights leads to wider optima and better generalization", UAI 2018, section 3.3 and
figures 3, 4 and 5.

    python -m experiments.width
    python -m experiments.width --data cifar100 --root DIR

Both trainings are those of ``experiments.swa``, SWA's for one and a half budgets. The training loss with its L2 term
and the test error are measured on the line through the two networks and beyond, with BatchNorm statistics of their own
at every point, and along rays in random directions, the same from both. The width is the distance at which the loss has
risen by 0.1, as the median over the rays; the error at the rays' ends stands beside it.
"""

import functools

import numpy as np

import losssurf_fast as lsf
from experiments import command, report, swa, trainer
from losssurf_fast.figures import finish, new_figure

DELTA = 0.1
POINTS = {"digits": (31, 10, 16), "quick": (5, 2, 4)}  # on the line; rays, and points on each; else 61, 10, 31
LENGTH = 3.0  # of the rays, over the networks' distance
SOURCE = (
    "Izmailov et al. 2018 in pictures alone (VGG-16, cifar100):\n"
    "on the line SGD lies where the training loss is low, SWA where the test error\n"
    "is; along rays SWA's rise later"
)


def procedure(setting: command.Setting) -> report.Result:
    data, epochs = setting.load_data(), swa.budget_ends(setting)[-1]
    sgd, _ = swa.train_sgd(setting, data, setting.epochs)
    average, _ = swa.train_swa(setting, data, epochs)
    model = setting.build(data)
    loss_fn = trainer.RegularisedLoss(model, swa.recipe(setting)[2])
    train, test = setting.test_batches(data, train=True), setting.test_batches(data)
    measure = {"loss_fn": loss_fn, "loader": {"train": train, "test": test}, "progress": setting.first}
    on_line, num_rays, on_ray = POINTS.get("quick" if setting.quick else setting.data, (61, 10, 31))
    line = lsf.line(
        model, average, sgd, points=on_line, margin=0.8, labels=("SWA", "SGD"), path=setting.out / "line.npz",
        **measure,
    )  # fmt: skip
    rays = {
        name: lsf.rays(
            model, weights, num_rays=num_rays, points=on_ray, max_distance=LENGTH * line.length, delta=DELTA,
            seed=setting.seed, path=setting.out / f"rays_{name}.npz", **measure,
        )
        for name, weights in {"SWA": average, "SGD": sgd}.items()
    }  # fmt: skip
    numbers = summary(line, rays)
    columns = ("loss", "error (%)", f"+{DELTA} at", "end error")
    ours = {name: [found[key] for key in ("loss", "error", "width", "end")] for name, found in numbers.items()}
    text = report.comparison(
        f"{setting.model} on {setting.data}: optima and their widths; SWA and SGD lie {line.length:.3g} apart",
        columns, ours, {}, data=setting.data, source=SOURCE, digits=3,
    )  # fmt: skip
    return report.Result(text, {"distance": line.length, **numbers}, {"width.png": figure(line, rays)})


def summary(line: lsf.Line, rays: dict[str, lsf.Rays]) -> dict[str, dict[str, float]]:
    """Loss and error (%) of each network, its width, and the error at its rays' ends; None is a width not reached."""
    found = {}
    for name, at in zip(line.labels, (0.0, line.length), strict=True):
        place, width = np.abs(line.distances - at).argmin(), rays[name].width("train_loss")
        found[name] = {
            "loss": float(line.values["train_loss"][place]),
            "error": 100 * float(line.values["test_error"][place]),
            "width": float(width) if np.isfinite(width) else None,
            "end": 100 * float(np.median(rays[name].values["test_error"][:, -1])),
        }
    return found


def figure(line: lsf.Line, rays: dict[str, lsf.Rays]):
    """The talk's pictures: loss and error on the line, and along the rays."""
    picture = new_figure(11, 6.4)
    panels = picture.subplots(2, 2)
    for row, metric, factor, title in (
        (0, "train_loss", 1, "training loss with its L2 term"),
        (1, "test_error", 100, "test error (%)"),
    ):
        on_line, on_rays = panels[row]
        on_line.plot(line.distances, factor * line.values[metric], color="#222222", lw=1.8)
        for name, at, colour in zip(line.labels, (0.0, line.length), ("#d7301f", "#2166ac"), strict=True):
            value = factor * line.values[metric][np.abs(line.distances - at).argmin()]
            on_line.plot(at, value, "o", color=colour, ms=8, label=name)
            found = rays[name]
            on_rays.plot(found.distances, factor * found.values[metric].T, color=colour, lw=0.6, alpha=0.35)
            on_rays.plot(found.distances, factor * np.median(found.values[metric], 0), color=colour, lw=2, label=name)
        on_line.set_ylabel(title)
        on_line.set_xlabel("distance from SWA on the line to SGD")
        on_rays.set_xlabel("distance along random rays")
    for axes in panels[0]:
        axes.legend(frameon=False, fontsize=9)
    return finish(picture)


main = functools.partial(command.main, "width", procedure, swa.DEFAULTS, description=__doc__)

if __name__ == "__main__":
    raise SystemExit(main())
