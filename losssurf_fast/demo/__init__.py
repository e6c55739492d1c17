"""``python -m losssurf_fast demo``: a variance network learns handwritten digits.

A perceptron with one noisy hidden layer is trained with binary dropout and with the five parameterizations, each from
the same initial weights. The talk's table follows, then a training run timed with plain PyTorch layers and with ours.
"""

import argparse
import contextlib
import importlib.util
import time
from pathlib import Path

import torch

from losssurf_fast.demo import report
from losssurf_fast.demo.data import load
from losssurf_fast.demo.models import NETWORKS, network
from losssurf_fast.demo.timing import BATCH, HIDDEN, compare
from losssurf_fast.demo.train import train

WIDTH = 256  # of the two hidden layers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", choices=("digits", "mnist"), default="digits", help="digits needs no download")
    parser.add_argument("--root", metavar="DIR", help="where MNIST lies or goes")
    parser.add_argument("--out", metavar="DIR", default="demo_output", help="folder for the pictures [%(default)s]")
    parser.add_argument("--epochs", type=_positive, metavar="N", help="[100 for digits, 5 for mnist]")
    parser.add_argument("--seed", type=_seed, default=0, metavar="N", help="of initial weights and noise [%(default)s]")
    parser.add_argument("--quick", action="store_true", help="at most 2 epochs, to see that it runs")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2^63 - 1, got {text!r}")
    return int(text)


@contextlib.contextmanager
def _one_thread():
    """Small matrices gain nothing from a second thread, and waiting for one costs much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run(arguments: argparse.Namespace) -> int:
    began = time.perf_counter()
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("demo: needs matplotlib for its pictures; pip install matplotlib")
    out = Path(arguments.out)
    report.prepare_folder(out)
    data = load(arguments.data, arguments.root)
    epochs = arguments.epochs or {"digits": 100, "mnist": 5}[data.name]
    blocks, steps = (2, 2) if arguments.quick else (20, 5)
    if arguments.quick:
        epochs = min(epochs, 2)

    print(f"{data.name}: {len(data.train_x)} training and {len(data.test_x)} test images.")
    print(f"Networks {data.side**2}-{WIDTH}-{WIDTH}-{data.classes}, noise in the middle layer,")
    print(f"{epochs} epochs each, all from the same initial weights.\n", flush=True)
    results, models = [], {}
    with _one_thread():
        for kind in NETWORKS:
            models[kind] = network(kind, data.side**2, WIDTH, data.classes, arguments.seed)
            results.append(train(models[kind], data, epochs, arguments.seed, kind))
    print(report.table(results))
    print(f"accuracy in percent; chance is {100 * data.chance():.1f}\n")
    dropout, variance = results[0], results[-1]
    print("The variance network's weights have mean zero: with the")
    print(f"mean weights it guesses ({100 * variance.deterministic:.1f} %), as an ensemble it reaches")
    print(f"{100 * variance.ensemble:.1f} % (binary dropout: {100 * dropout.ensemble:.1f} %).\n", flush=True)

    print(f"The same training at width {HIDDEN}, one step of {BATCH} images:")
    for parameterization in ("variance", "additive"):
        with _one_thread():
            t = compare(data, parameterization, blocks, steps, seconds=20)
        times = f"eager {t.eager_ms:7.2f} ms   ours {t.ours_ms:7.2f} ms   {t.ratio:.2f}x"
        print(f"{parameterization:9s} {times}", flush=True)
    print("forward, backward and Adam on one thread, medians of")
    print(f"{t.blocks} alternating blocks of {steps} steps\n")

    for path in report.save_pictures(out, results, models["variance"], data):
        print(f"saved {path}")
    print(f"done in {time.perf_counter() - began:.0f} s")
    return 0
