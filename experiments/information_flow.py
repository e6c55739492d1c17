"""How the information moves from the means of the weights to their variances while variational dropout trains.

Source: Neklyudov et al., "Variance networks: when expectation does not meet your expectations", ICLR 2019.

    python -m experiments.information_flow
    python -m experiments.information_flow --data mnist --root DIR

One hidden layer of LeNet-5 has weights N(w, alpha w^2) with one alpha. Along its training the ensemble is measured as
it is, with the means set to zero (what do the variances know?), and with the variances permuted within the layer, the
means kept (what do the means know?). alpha grows until only the variances matter.
"""

import functools
import math

from experiments import command, noise, report
from experiments.variance_networks import LENET5
from losssurf_fast.figures import finish, new_figure

TESTS = {
    "ensemble": lambda model: model,
    "zero mean": noise.without_means,
    "permuted": noise.with_permuted_sigmas,
}
COLOURS = {"ensemble": "#222222", "zero mean": "#d7301f", "permuted": "#4292c6", "mean only": "#bbbbbb"}
DEFAULTS = {
    "digits": LENET5 | {"model": "lenet5-8x8", "epochs": 60, "batch_size": 32},
    "mnist": LENET5 | {"model": "lenet5"},
    "quick": {"width": 4, "epochs": 2},
}


def procedure(setting: command.Setting) -> report.Result:
    data = setting.load_data()
    model, test = noise.network(setting, data, "layer"), setting.test_batches(data)
    start = measured(setting, model, test)
    history = noise.fit(setting, data, model, "layer", functools.partial(measured, setting, model, test))
    final = measured(setting, model, test, draws=10 if setting.quick else 100)
    rows = {"untrained": start, "trained": final}
    columns = (*TESTS, "mean only", "1 / alpha")
    row = lambda found: (*(found[key] for key in columns[:-1]), f"{math.exp(-found['log_alpha']):.0e}")
    text = report.comparison(
        "Test accuracy (%) with means or variances tampered with", columns, {k: row(f) for k, f in rows.items()},
        {"trained": (None, None, None, None, "1e-05")}, data=setting.data, digits=1,
        source="the talk, 1 / alpha on its slide; its accuracies are a picture",
    )  # fmt: skip
    numbers = {"untrained": start, "trained": final, "history": history}
    return report.Result(text, numbers, {"information_flow.png": figure(history)})


def measured(setting: command.Setting, model, test, draws: int = 10) -> dict[str, float]:
    found = {name: noise.accuracy(setting, test_of(model), test, "ensemble", draws) for name, test_of in TESTS.items()}
    found["mean only"] = noise.accuracy(setting, model, test, "deterministic")
    return found | {"log_alpha": noise.gaussian_layers(model)[0].log_alpha.mean().item()}


def figure(history: list[dict]):
    """The accuracies over the epochs, and the signal-to-noise ratio of the weights."""
    result = new_figure(8.4, 3.4)
    left, right = result.subplots(1, 2, width_ratios=(1.5, 1))
    points = [(epoch, found) for epoch, found in enumerate(history, 1) if "log_alpha" in found]
    epochs = [epoch for epoch, _ in points]
    for name, colour in COLOURS.items():
        left.plot(epochs, [found[name] for _, found in points], color=colour, lw=2, label=name)
    left.set_ylabel("test accuracy (%)")
    left.set_ylim(0, 102)
    left.legend(frameon=False, fontsize=9, loc="center right")
    right.plot(epochs, [math.exp(-found["log_alpha"]) for _, found in points], color="#222222", lw=2)
    right.set_yscale("log")
    right.set_ylabel("signal-to-noise ratio 1 / alpha")
    for axes in (left, right):
        axes.set_xlabel("epoch")
    return finish(result)


main = functools.partial(command.main, "information_flow", procedure, DEFAULTS, description=__doc__)

if __name__ == "__main__":
    raise SystemExit(main())
