"""What the experiments' commands share: their flags, the device, the ranks of torchrun, and their last lines."""

import argparse
import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from experiments import data, models, report
from losssurf_fast.averaging.batch_norm import agree


@dataclasses.dataclass(frozen=True)
class Setting:
    """What an experiment runs with: its flags, the device, and the place among torchrun's ranks."""

    experiment: str
    data: str
    root: str | None
    model: str
    width: int
    epochs: int
    batch_size: int
    lr: float
    seed: int
    quick: bool
    out: Path
    device: torch.device
    bf16: bool
    compile: bool
    rank: int
    world: int

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes and prints."""
        return self.rank == 0

    def identity(self) -> dict:
        """The flags that a training's numbers depend on, and the number of ranks."""
        flags = ("data", "model", "width", "epochs", "batch_size", "lr", "seed", "quick", "bf16", "compile")
        keys = ("experiment", *flags, "world")
        return {key: getattr(self, key) for key in keys}

    def load_data(self) -> data.Data:
        """The data on the device, of the size that the model takes; ``--quick`` takes a part of them."""
        load = lambda: data.load(self.data, self.root, size=models.MODELS[self.model].size, caller=self.experiment)
        found = self.first_before_others(load)
        if self.quick:
            cut = lambda t: t[: 256 if len(t) == len(found.train_y) else 128]
            found = found.map(cut, cut)
        return found.map(lambda x: x.to(self.device), lambda y: y.to(self.device))

    def train_batches(self, found: data.Data) -> data.Batches:
        return data.Batches(
            found.train_x, found.train_y, self.batch_size, shuffle=True, augment=found.augmented, rank=self.rank,
            world=self.world,
        )  # fmt: skip

    def test_batches(self, found: data.Data, *, train: bool = False) -> data.Batches:
        """The test set in order, or the training set, without augmentation, to measure on."""
        x, y = (found.train_x, found.train_y) if train else (found.test_x, found.test_y)
        return data.Batches(x, y, 500, rank=self.rank, world=self.world)

    def build(self, found: data.Data, seed: int | None = None) -> torch.nn.Module:
        """A new network with the random weights of a seed (None: ``--seed``)."""
        architecture = models.MODELS[self.model]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed if seed is None else seed)
            return architecture.build(found.channels, found.num_classes, self.width).to(self.device)

    def say(self, text: str) -> None:
        if self.first:
            print(text, flush=True)

    def jointly(self, compute: Callable[[], Any]) -> Any:
        """What ``compute`` returns on this rank; where it fails on one of the ranks, all end: none waits for it."""
        if self.world == 1:
            return compute()
        result, error = None, None
        try:
            result = compute()
        except (Exception, SystemExit) as e:  # raised by agree, once the other ranks know
            error = e
        agree(self.experiment, error, self.device, None)
        return result

    def first_before_others(self, compute: Callable[[], Any]) -> Any:
        """What ``compute`` returns; the first rank runs it before all others do, so that it alone downloads."""
        found = self.jointly(lambda: compute() if self.first else None)
        return self.jointly(lambda: found if self.first else compute())


def main(
    experiment: str,
    procedure: Callable[[Setting], report.Result],
    defaults: Mapping[str, Mapping],
    argv: list[str] | None = None,
    description: str | None = None,
) -> int:
    """Run an experiment's command: parse its flags, run ``procedure``, print and save what it returns.

    Args:
        procedure: runs on every rank; the first one's result counts.
        defaults: by the data's name, the first of which is the default: model, width, epochs, batch_size and lr; and
            what "quick" changes of these for ``--quick``.
        argv: None takes the process's.
        description: of ``--help``.
    """
    parsed = _parser(experiment, defaults, description).parse_args(argv)
    chosen = dict(defaults[parsed.data])
    if parsed.quick:
        chosen |= defaults["quick"]
    chosen |= {key: getattr(parsed, key) for key in chosen if getattr(parsed, key) is not None}
    out = Path(parsed.out or f"experiments_output/{experiment}-{parsed.data}")
    with _ranks(parsed.device) as (rank, world, device), _threads(parsed.threads):
        setting = Setting(
            experiment=experiment, data=parsed.data, root=parsed.root, seed=parsed.seed, quick=parsed.quick, out=out,
            device=device, bf16=parsed.bf16, compile=parsed.compile, rank=rank, world=world, **chosen,
        )  # fmt: skip
        setting.jointly(lambda: report.prepare(setting) if setting.first else None)
        began = time.perf_counter()
        result = procedure(setting)
        if setting.first:
            report.finish(setting, result, time.perf_counter() - began)
    return 0


def _parser(experiment: str, defaults: Mapping[str, Mapping], description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{experiment}", description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    known = [name for name in defaults if name != "quick"]
    add("--data", choices=known, default=known[0], help="digits needs no download [%(default)s]")
    add("--root", metavar="DIR", help="where MNIST or CIFAR lies or is downloaded to")
    add("--model", choices=sorted(models.MODELS), help="[depends on --data, as do all without a default]")
    add("--width", type=_positive, metavar="N", help="channels of the network's first stage")
    add("--epochs", type=_positive, metavar="N", help="one training's budget")
    add("--batch-size", type=_positive, metavar="N", help="of all ranks together")
    add("--lr", type=_rate, metavar="RATE", help="learning rate at the start")
    add("--seed", type=_seed, default=0, metavar="N", help="of weights, batches and noise [%(default)s]")
    add("--threads", type=_positive, metavar="N", help="of the CPU [torch's]")
    add("--device", type=_device, metavar="cpu|cuda", help="[cuda where there is one, else cpu]")
    add("--bf16", action="store_true", help="train under autocast to bfloat16")
    add("--compile", action="store_true", help="train with torch.compile")
    add("--out", metavar="DIR", help=f"pictures, record, checkpoints [experiments_output/{experiment}-DATA]")
    add("--quick", action="store_true", help="seconds instead of minutes, to see that it runs")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2^31 - 1, got {text!r}")
    return int(text)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = float("nan")
    if not 0 < rate < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return rate


def _device(text: str) -> torch.device:
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, got {text!r}")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch finds no CUDA device here; use cpu")
    return torch.device(text)


@contextlib.contextmanager
def _ranks(wanted: torch.device | None) -> Iterator[tuple[int, int, torch.device]]:
    """(rank, world, device), with the process group that torchrun asks for or that there is."""
    device = wanted or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    asked = "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized()
    if asked:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield (dist.get_rank(), dist.get_world_size(), device) if dist.is_initialized() else (0, 1, device)
    finally:
        if asked:
            dist.destroy_process_group()


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
