"""``python -m losssurf_fast demo``: handwritten digits, learned by a variance network, by averages, and along paths.

Three parts, each with its table, pictures and timings: :mod:`losssurf_fast.demo.noise`, a perceptron whose hidden layer
draws its weights; :mod:`losssurf_fast.demo.averages`, SGD and SWA from the same weights; and
:mod:`losssurf_fast.demo.paths`, what lies between two networks.
"""

import argparse
import contextlib
import importlib.util
import time
from pathlib import Path

import torch

from losssurf_fast.demo import averages, noise, paths, report
from losssurf_fast.demo.data import load

PARTS = (noise, averages, paths)


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
    report.prepare_folder(out, [name for part in PARTS for name in part.PICTURES])
    data = load(arguments.data, arguments.root)
    epochs = arguments.epochs or {"digits": 100, "mnist": 5}[data.name]
    if arguments.quick:
        epochs = min(epochs, 2)

    print(f"{data.name}: {len(data.train_x)} training and {len(data.test_x)} test images.")
    with _one_thread():
        for part in PARTS:
            for path in report.save_pictures(out, part.show(data, epochs, arguments.seed, arguments.quick)):
                print(f"saved {path}")
            print()
    print(f"done in {time.perf_counter() - began:.0f} s")
    return 0
