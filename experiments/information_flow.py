"""How the information moves from the means of the weights to their variances while variational dropout trains.

Source: Neklyudov et al., "Variance networks: when expectation does not meet your expectations", ICLR 2019.

    python -m experiments.information_flow
    python -m experiments.information_flow --data mnist --root DIR

One hidden layer of LeNet-5 has weights N(w, alpha w^2) with one alpha. Along its training the ensemble is measured as
it is, with the means set to zero (what do the variances know?), and with the variances permuted within the layer, the
means kept (what do the means know?). alpha grows until only the variances matter.
"""

import functools

from experiments import command, noise, report
from experiments.variance_networks import LENET5
from losssurf_fast.figures import finish, new_figure

TESTS = {
    "ensemble": lambda model: model,
    "zero mean": noise.without_means,
    "permuted": noise.with_permuted_sigmas,
}
STYLES = {
    "ensemble": {"color": "#bbbbbb", "lw": 5},
    "zero mean": {"color": "#d7301f", "lw": 2},
    "permuted": {"color": "#4292c6", "lw": 2},
    "mean only": {"color": "#222222", "lw": 1, "ls": "--"},
}
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
    row = lambda found: (*(found[key] for key in columns[:-1]), f"{found['1 / alpha']:.0e}")
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
    return found | {"1 / alpha": noise.gaussian_layers(model)[0].log_alpha.neg().exp().item()}


def figure(history: list[dict]):
    """The accuracies over the epochs, and the signal-to-noise ratio of the weights."""
    result = new_figure(8.4, 3.4)
    left, right = result.subplots(1, 2, width_ratios=(1.5, 1))
    for name, style in STYLES.items():
        noise.plot(left, history, name, label=name, **style)
    left.set_ylabel("test accuracy (%)")
    left.set_ylim(0, 102)
    noise.plot(right, history, "1 / alpha", color="#222222", lw=2)
    right.set_yscale("log")
    right.set_ylabel("signal-to-noise ratio 1 / alpha")
    result.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return finish(result)


main = functools.partial(command.main, "information_flow", procedure, DEFAULTS, description=__doc__)

if __name__ == "__main__":
    raise SystemExit(main())
