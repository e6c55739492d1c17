"""The demo's first part: a variance network learns handwritten digits.

A perceptron with one noisy hidden layer is trained with binary dropout and with the five parameterizations, each from
the same initial weights. The talk's table follows, then a training run timed with plain PyTorch layers and with ours.
"""

from losssurf_fast.demo import report
from losssurf_fast.demo.data import Data
from losssurf_fast.demo.models import NETWORKS, network
from losssurf_fast.demo.timing import BATCH, HIDDEN, compare
from losssurf_fast.demo.train import train

WIDTH = 256  # of the two hidden layers
PICTURES = ("table.png", "training.png", "weights.png")


def show(data: Data, epochs: int, seed: int, quick: bool) -> dict:
    """Train, print what comes out, and return the figures by the names of their files."""
    print(f"Networks {data.side**2}-{WIDTH}-{WIDTH}-{data.classes}, noise in the middle layer,")
    print(f"{epochs} epochs each, all from the same initial weights.\n", flush=True)
    results, models = [], {}
    for kind in NETWORKS:
        models[kind] = network(kind, data.side**2, WIDTH, data.classes, seed)
        results.append(train(models[kind], data, epochs, seed, kind))
    print(report.table(results))
    print(f"accuracy in percent; chance is {100 * data.chance():.1f}\n")
    dropout, variance = results[0], results[-1]
    print("The variance network's weights have mean zero: with the")
    print(f"mean weights it guesses ({100 * variance.deterministic:.1f} %), as an ensemble it reaches")
    print(f"{100 * variance.ensemble:.1f} % (binary dropout: {100 * dropout.ensemble:.1f} %).\n", flush=True)

    print(f"The same training at width {HIDDEN}, one step of {BATCH} images:")
    blocks, steps = (2, 2) if quick else (20, 5)
    for parameterization in ("variance", "additive"):
        t = compare(data, parameterization, blocks, steps, seconds=20)
        times = f"eager {t.eager_ms:7.2f} ms   ours {t.ours_ms:7.2f} ms   {t.ratio:.2f}x"
        print(f"{parameterization:9s} {times}", flush=True)
    print("forward, backward and Adam on one thread, medians of")
    print(f"{t.blocks} alternating blocks of {steps} steps\n")
    return dict(zip(PICTURES, report.noise_figures(results, models["variance"], data), strict=True))
