"""Dropout against a variance network, whose weights have mean zero, under three prediction schemes.

Source: Neklyudov et al., "Variance networks: when expectation does not meet your expectations", ICLR 2019.

    python -m experiments.variance_networks
    python -m experiments.variance_networks --data mnist --root DIR
    python -m experiments.variance_networks --data cifar10 --root DIR

Both networks start from the same weights. The variance network draws those of its last hidden layers from N(0, sigma^2)
and learns sigma alone, so that the mean weights know nothing: deterministic prediction is a guess, the ensemble is as
good as dropout's. (The talk's "CIFAR-100" must be its 20 superclasses: 5.0 % is their chance.)
"""

import functools

from experiments import command, noise, report
from losssurf_fast.figures import finish, new_figure

KINDS = ("dropout", "variance")
COLUMNS = ("stoch.", "det.", "ens.")
LENET5 = {"width": 20, "lr": 1e-3, "epochs": 200, "batch_size": 200}
VGG_LIKE = {"model": "vgglike", "width": 64, "lr": 1e-3, "epochs": 550, "batch_size": 100}
DEFAULTS = {
    "digits": LENET5 | {"model": "lenet5-8x8", "epochs": 60, "batch_size": 32},
    "mnist": LENET5 | {"model": "lenet5"},
    "cifar10": VGG_LIKE,
    "cifar100-coarse": VGG_LIKE,
    "cifar100": VGG_LIKE,
    "quick": {"width": 4, "epochs": 2},
}
MNIST = {"dropout": (99.1, 99.4, 99.4), "variance": (95.9, 10.1, 99.3)}
PUBLISHED = {  # test accuracy, %
    "digits": MNIST,
    "mnist": MNIST,
    "cifar10": {"dropout": (91.0, 93.1, 93.4), "variance": (91.3, 10.0, 93.4)},
    "cifar100-coarse": {"dropout": (77.5, 79.8, 81.7), "variance": (76.9, 5.0, 82.2)},
    "cifar100": {"dropout": (77.5, 79.8, 81.7), "variance": (76.9, 5.0, 82.2)},
}
SOURCES = {
    "digits": "the talk, LeNet-5 on MNIST",
    "mnist": "the talk, LeNet-5",
    "cifar10": "the talk, VGG-like",
    "cifar100-coarse": "the talk, VGG-like on CIFAR-100",
    "cifar100": "the talk, VGG-like on CIFAR-100, most likely its 20 superclasses",
}


def procedure(setting: command.Setting) -> report.Result:
    data, draws = setting.load_data(), 10 if setting.quick else 100
    test = setting.test_batches(data)
    final, histories = {}, {}
    for kind in KINDS:
        model = noise.network(setting, data, kind)
        measure = functools.partial(noise.accuracies, setting, model, test, 5)
        histories[kind] = noise.fit(setting, data, model, kind, measure)
        final[kind] = noise.accuracies(setting, model, test, draws)
    text = report.comparison(
        "Test accuracy (%) under three prediction schemes", COLUMNS, {k: list(v.values()) for k, v in final.items()},
        PUBLISHED[setting.data], data=setting.data, source=SOURCES[setting.data], digits=1,
    )  # fmt: skip
    chance = 100 * data.test_y.bincount().max().item() / len(data.test_y)
    text += f"\nGuessing the most frequent class is right in {chance:.1f} %."
    numbers = {"accuracy": final, "chance": chance, "history": histories, "draws": draws}
    return report.Result(text, numbers, {"variance_networks.png": figure(histories, chance)})


def figure(histories: dict, chance: float):
    """Accuracy by scheme over the epochs, a panel for each network."""
    result = new_figure(7.2, 3.2)
    for axes, (kind, history) in zip(result.subplots(1, 2, sharey=True), histories.items(), strict=True):
        for scheme, style in noise.STYLES.items():
            noise.plot(axes, history, scheme, label=scheme, **style)
        axes.axhline(chance, color="#888888", lw=0.8, ls=":")
        axes.set_title(kind, fontsize=11)
        axes.set_ylim(0, 102)
    result.axes[0].set_ylabel("test accuracy (%)")
    result.axes[0].annotate("chance", (1, chance), (0, 3), textcoords="offset points", color="#666666", fontsize=8)
    result.legend(*result.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return finish(result)


main = functools.partial(command.main, "variance_networks", procedure, DEFAULTS, description=__doc__)

if __name__ == "__main__":
    raise SystemExit(main())
