"""Parameterizations of variational dropout: what its ELBO comes to, and what the means know.

Source: Neklyudov et al., "Variance networks: when expectation does not meet your expectations", ICLR 2019.

    python -m experiments.parameterizations
    python -m experiments.parameterizations --data mnist --root DIR

One hidden layer of LeNet-5 has weights N(w, alpha w^2) with one alpha per layer, per neuron or per weight, or N(w,
sigma^2) with a sigma of each weight's own ("additive"), under the log-uniform prior; the last row is N(0, sigma^2), the
variance network, whose divergence from that prior is zero. All start from the same weights. On the digits, where alpha
and sigma learn much faster than in the paper (``noise.NOISE_RATE``), every parameterization ends as a variance network.
"""

import functools

from experiments import command, noise, report
from experiments.variance_networks import LENET5
from losssurf_fast.demo.report import COLOURS
from losssurf_fast.figures import finish, new_figure

COLUMNS = ("ELBO", "det. %", "ens. %")
DEFAULTS = {
    "digits": LENET5 | {"model": "lenet5-8x8", "epochs": 60, "batch_size": 32},
    "mnist": LENET5 | {"model": "lenet5"},
    "quick": {"width": 4, "epochs": 2},
}
PUBLISHED = {
    "layer": ("-5.9e+02", 11.3, 99.2),
    "neuron": ("-7.7e+02", 11.3, 99.2),
    "weight": ("-6.4e+04", 81.3, 99.2),
    "additive": ("-2.3e+04", 96.3, 99.2),
}
KINDS = (*PUBLISHED, "variance")


def procedure(setting: command.Setting) -> report.Result:
    data, draws = setting.load_data(), 10 if setting.quick else 100
    test = setting.test_batches(data)
    rows, histories = {}, {}
    for kind in KINDS:
        model = noise.network(setting, data, kind)
        measure = functools.partial(measured, setting, model, data, test, 5)
        histories[kind] = noise.fit(setting, data, model, kind, measure)
        rows[kind] = measured(setting, model, data, test, draws)
    text = report.comparison(
        "ELBO on the training set, and test accuracy", COLUMNS,
        {k: (f"{r['elbo']:.1e}", r["deterministic"], r["ensemble"]) for k, r in rows.items()}, PUBLISHED,
        data=setting.data, source="the talk, which names no data: LeNet-5 on MNIST in the paper", digits=1,
    )  # fmt: skip
    numbers = {"rows": rows, "history": histories, "draws": draws}
    return report.Result(text, numbers, {"parameterizations.png": figure(histories)})


def measured(setting: command.Setting, model, data, test, draws: int) -> dict[str, float]:
    return {
        "elbo": noise.evidence_lower_bound(setting, model, data, min(draws, 10)),
        "deterministic": noise.accuracy(setting, model, test, "deterministic"),
        "ensemble": noise.accuracy(setting, model, test, "ensemble", draws),
    }


def figure(histories: dict):
    """The negative ELBO and both accuracies over the epochs, a line for each parameterization."""
    result = new_figure(9.6, 3.2)
    panels = result.subplots(1, 3)
    titles = {
        "elbo": "ELBO",
        "deterministic": "deterministic accuracy (%)",
        "ensemble": "ensemble accuracy (%)",
    }
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for kind, history in histories.items():
            noise.plot(axes, history, key, color=COLOURS[kind], lw=1.8, label=kind)
        axes.set_title(title, fontsize=11)
        if key == "elbo":
            axes.set_yscale("symlog")
        else:
            axes.set_ylim(0, 102)
    result.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return finish(result)


main = functools.partial(command.main, "parameterizations", procedure, DEFAULTS, description=__doc__)

if __name__ == "__main__":
    raise SystemExit(main())
