"""Stochastic weight averaging (SWA) against SGD, from the same weights and at three budgets.

Source: Izmailov et al., "Averaging weights leads to wider optima and better generalization", UAI 2018, table 1.

    python -m experiments.swa
    python -m experiments.swa --data cifar100 --root DIR --model preresnet164 --epochs 150 --lr 0.1

SGD takes one budget of epochs with a rate that is constant for half of them and then falls to a hundredth. SWA falls
to a higher, constant rate by three quarters of the budget, and from there averages the weights after every epoch,
until one, 1.25 and 1.5 budgets; the average gets BatchNorm statistics of its own.
"""

import functools

from torch import nn

import losssurf_fast as lsf
from experiments import command, models, report, trainer
from experiments.data import Data
from losssurf_fast.figures import finish, new_figure

# the rate that SWA ends with, over the first one; the share of the budget before it; weight decay
RECIPES = {"vgg16": (0.2, 0.805, 5e-4), "preresnet": (0.5, 0.84, 3e-4)}
BUDGETS = (1, 1.25, 1.5)
COLUMNS = ("SGD", *(f"SWA {budget:g}" for budget in BUDGETS))
DEFAULTS = {
    "digits": {"model": "preresnet8", "width": 4, "epochs": 16, "batch_size": 16, "lr": 0.3},
    "mnist": {"model": "preresnet20", "width": 16, "epochs": 20, "batch_size": 128, "lr": 0.1},
    "cifar10": {"model": "vgg16", "width": 64, "epochs": 200, "batch_size": 128, "lr": 0.05},
    "cifar100": {"model": "vgg16", "width": 64, "epochs": 200, "batch_size": 128, "lr": 0.05},
    "quick": {"width": 4, "epochs": 4},
}
PUBLISHED = {  # test accuracy, %
    ("cifar100", "vgg16"): ("72.55±0.10", "73.91±0.12", "74.17±0.15", "74.27±0.25"),
    ("cifar100", "preresnet110"): ("76.77", "78.75", "78.91", "79.10"),
    ("cifar100", "preresnet164"): ("78.49±0.36", "79.77±0.17", "80.18±0.23", "80.35±0.16"),
    ("cifar10", "vgg16"): ("93.25±0.16", "93.59±0.16", "93.70±0.22", "93.64±0.18"),
    ("cifar10", "preresnet110"): ("95.03", "95.51", "95.65", "95.82"),
    ("cifar10", "preresnet164"): ("95.28±0.10", "95.56±0.11", "95.77±0.04", "95.83±0.03"),
}


def recipe(setting: command.Setting) -> tuple[float, float, float]:
    return models.recipe(RECIPES, setting.model, setting.experiment)


def train_sgd(setting: command.Setting, data: Data, epochs: int) -> tuple[nn.Module, list[dict]]:
    """The network that SGD ends with, and its training's history."""
    model, test = setting.build(data), setting.test_batches(data)
    optimizer = trainer.sgd(setting, model, recipe(setting)[2])
    schedule = trainer.falling(optimizer, epochs)
    measure = lambda epoch: trainer.evaluate(setting, model, test)
    batches = setting.train_batches(data)
    return model, trainer.train(
        setting, "sgd", model, batches, optimizer, epochs, schedule=schedule, measure=measure
    )  # fmt: skip


def train_swa(setting: command.Setting, data: Data, epochs: int) -> tuple[lsf.AveragedModel, list[dict]]:
    """The average after so many epochs, and its training's history, "swa_error" among it once there is an average."""
    rate, share, weight_decay = recipe(setting)
    model, test = setting.build(data), setting.test_batches(data)
    swa = lsf.AveragedModel(model)
    optimizer = trainer.sgd(setting, model, weight_decay)
    schedule = lsf.SWAConstantLR(optimizer, rate * setting.lr, averaged_from(setting))
    ends = budget_ends(setting)

    def measure(epoch: int) -> dict[str, float]:
        found = trainer.evaluate(setting, model, test)
        if epoch >= averaged_from(setting) and (epoch % max(1, setting.epochs // 40) == 0 or epoch in ends):
            lsf.update_bn(setting.test_batches(data, train=True), swa)
            found |= {f"swa_{key}": value for key, value in trainer.evaluate(setting, swa, test).items()}
        return found

    batches = setting.train_batches(data)
    return swa, trainer.train(
        setting, "swa", model, batches, optimizer, epochs, schedule=schedule, average=swa, measure=measure
    )


def averaged_from(setting: command.Setting) -> int:
    """The first epoch after which the weights are averaged."""
    return max(1, round(recipe(setting)[1] * setting.epochs))


def budget_ends(setting: command.Setting) -> list[int]:
    return [round(budget * setting.epochs) for budget in BUDGETS]


def procedure(setting: command.Setting) -> report.Result:
    data, ends = setting.load_data(), budget_ends(setting)
    _, sgd = train_sgd(setting, data, setting.epochs)
    _, swa = train_swa(setting, data, ends[-1])
    errors = [sgd[-1]["error"], *(swa[end - 1]["swa_error"] for end in ends)]
    accuracies = [100 * (1 - error) for error in errors]
    key = (setting.data, setting.model) if (setting.data, setting.model) in PUBLISHED else ("cifar100", "preresnet164")
    text = report.comparison(
        f"Test accuracy (%) after one budget of {setting.epochs} epochs of SGD, and of SWA after more",
        COLUMNS, {setting.model: accuracies}, {setting.model: PUBLISHED[key]},
        data=setting.data, source=f"Izmailov et al. 2018, {key[1]} on {key[0]}",
    )  # fmt: skip
    numbers = {"accuracy": dict(zip(COLUMNS, accuracies, strict=True)), "sgd": sgd, "swa": swa}
    return report.Result(text, numbers, {"swa.png": _figure(sgd, swa, averaged_from(setting), ends)})


def _figure(sgd: list[dict], swa: list[dict], first: int, ends: list[int]):
    """Test errors along the trainings; where the average's is not measured there is no point."""
    figure = new_figure(6.4, 3.8)
    axes = figure.subplots()
    lines = {
        "SGD": (sgd, "error", {"color": "#222222", "lw": 1.6}),
        "the weights that SWA averages": (swa, "error", {"color": "#9ecae1", "lw": 1.2}),
        "SWA": (swa, "swa_error", {"color": "#d7301f", "lw": 2.2}),
    }
    for label, (history, key, style) in lines.items():
        points = [(epoch, 100 * found[key]) for epoch, found in enumerate(history, 1) if key in found]
        axes.plot(*zip(*points, strict=True), label=label, **style)
    for end in ends:
        axes.axvline(end, color="#bbbbbb", lw=0.8, ls=":")
    axes.axvline(first, color="#888888", lw=0.8)
    axes.text(first, 0.99, "averaging begins ", transform=axes.get_xaxis_transform(), ha="right", va="top", fontsize=8)
    late = [100 * found["error"] for history in (sgd, swa) for found in history[len(history) // 3 :]]
    axes.set_ylim(0, 1.3 * max(late))
    axes.set_xlabel("epoch")
    axes.set_ylabel("test error (%)")
    axes.legend(frameon=False, fontsize=9, loc="upper right")
    return finish(figure)


main = functools.partial(command.main, "swa", procedure, DEFAULTS, description=__doc__)

if __name__ == "__main__":
    raise SystemExit(main())
