"""Stochastic weight averaging (SWA) against SGD, from the same weights and at three budgets.

Source: Izmailov et al., "Averaging weights leads to wider optima and better generalization", UAI 2018, table 1.

    python -m experiments.swa
    python -m experiments.swa --data cifar100 --root DIR --model preresnet164 --epochs 150 --lr 0.1

SGD takes one budget of epochs with a rate that is constant for half of them and then falls to a hundredth. SWA falls
to a higher, constant rate by three quarters of the budget, and from there averages the weights after every epoch,
until one, 1.25 and 1.5 budgets; the average gets BatchNorm statistics of its own.
"""

import functools

import torch

import losssurf_fast as lsf
from experiments import command, report, trainer
from losssurf_fast.figures import finish, new_figure

# the rate that SWA ends with, over the first one; the share of the budget before it; weight decay
RECIPES = {"vgg16": (0.2, 0.8, 5e-4), "preresnet": (0.5, 0.83, 3e-4)}
BUDGETS = (1, 1.25, 1.5)
COLUMNS = ("SGD", *(f"SWA {budget:g}" for budget in BUDGETS))
DEFAULTS = {
    "digits": {"model": "preresnet20", "width": 8, "epochs": 30, "batch_size": 64, "lr": 0.1},
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


def recipe(model: str) -> tuple[float, float, float]:
    return next(found for name, found in RECIPES.items() if model.startswith(name))


def train_sgd(setting, data) -> tuple[torch.nn.Module, list[dict]]:
    """The network that SGD ends with, and its training's history."""
    model, batches, test = setting.build(data), setting.train_batches(data), setting.test_batches(data)
    optimizer = torch.optim.SGD(model.parameters(), setting.lr, momentum=0.9, weight_decay=recipe(setting.model)[2])
    schedule = lsf.SWAConstantLR(optimizer, 0.01 * setting.lr, setting.epochs)
    measure = lambda epoch: trainer.evaluate(setting, model, test)
    history = trainer.train(
        setting, "sgd", model, batches, optimizer, setting.epochs, schedule=schedule, measure=measure
    )
    return model, history


def procedure(setting: command.Setting) -> report.Result:
    data = setting.load_data()
    model, history = train_sgd(setting, data)
    figure = new_figure(4, 3)
    figure.subplots().plot([h["error"] for h in history])
    return report.Result(str(history[-1]), {"history": history}, {"swa.png": finish(figure)})


main = functools.partial(command.main, "swa", procedure, DEFAULTS, description=__doc__)

if __name__ == "__main__":
    raise SystemExit(main())
