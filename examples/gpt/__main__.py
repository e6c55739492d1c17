"""Trains a small GPT with Gaussian weights on this repository's documentation and says what its noise costs.

Three models take the same step, forward and backward in bf16: the plain one, the one with the published formula in
plain torch, and ours. "saved" is what autograd keeps for backward, parameters excluded, "peak" the most that a step's
tensors hold at once.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import losssurf_fast as lsf
from examples.gpt.corpus import Corpus, documentation
from examples.gpt.model import GPT
from examples.gpt.training import costs, held_out, kl_weight, objectives, stochastic, train
from losssurf_fast.files import write_atomically


def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return int(text)


def device(text: str) -> torch.device:
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch sees no CUDA device")
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, got {text!r}")
    return torch.device(text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.gpt", description=__doc__)
    parser.add_argument("--layers", type=positive, default=2)
    parser.add_argument("--width", type=positive, default=128, help="a multiple of 32 (default 128)")
    parser.add_argument("--context", type=positive, default=64, help="bytes that a prediction sees (default 64)")
    parser.add_argument("--batch", type=positive, default=8)
    parser.add_argument("--steps", type=positive, default=200)
    parser.add_argument("--rounds", type=positive, default=5, help="timed steps of every model (default 5)")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--parameterization", choices=("additive", "variance"), default="additive")
    parser.add_argument("--device", type=device, default=device("cuda" if torch.cuda.is_available() else "cpu"))
    parser.add_argument("--no-compile", action="store_true", help="run without torch.compile")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures there as JSON")
    arguments = parser.parse_args(argv)
    if arguments.width % 32:
        parser.error(f"--width must be a multiple of 32, got {arguments.width}")
    if not arguments.learning_rate > 0:
        parser.error(f"--learning-rate must be positive, got {arguments.learning_rate}")
    return arguments


def why_not_compiled(arguments: argparse.Namespace) -> str | None:
    if arguments.no_compile:
        return "not asked for"
    from torch._inductor.cpp_builder import get_cpp_compiler  # private: nothing but torch.compile must depend on them
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "torch.compile finds no C++ compiler"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    torch.manual_seed(0)
    corpus = Corpus(documentation(), arguments.context, arguments.device)
    sizes = arguments.layers, arguments.width, arguments.context
    plain = GPT(*sizes).to(arguments.device)
    ours = stochastic(GPT(*sizes), arguments.parameterization).to(arguments.device)
    print(f"{len(corpus.train)} bytes to train on; {len(lsf.conversion_report(ours).converted)} layers have noise")

    eager = objectives(plain, ours, len(corpus.train))
    steps, reason = dict(eager), why_not_compiled(arguments)
    if reason:
        print(f"not compiled: {reason}")
    else:  # one graph each, or an error
        steps = {name: torch.compile(step, fullgraph=True) for name, step in eager.items()}

    before = [held_out(eager["ours"], corpus, weight) for weight in (0.0, 1.0)]
    losses = train(steps["ours"], ours, corpus, arguments.steps, arguments.batch, arguments.learning_rate)
    after = [held_out(eager["ours"], corpus, weight) for weight in (0.0, 1.0)]
    for name, first, last in zip(("cross-entropy", "negative ELBO"), before, after, strict=True):
        print(f"held-out text, {name} in nats per byte: {first:.3f} before, {last:.3f} after")
    with lsf.prediction(ours, "stochastic"):
        sample = ours.continuation(b"The layer ", 200)
    print(f"--- a sample\n{sample.decode(errors='replace')}\n---")

    batch = corpus.windows(corpus.train, arguments.batch, torch.Generator().manual_seed(3))
    inputs = (*batch, kl_weight(1.0, arguments.device))
    report = {
        "options": {name: str(value) for name, value in vars(arguments).items() if name != "out"},
        "held_out": {"before": before, "after": after},
        "losses": losses,
        "sample": sample.decode(errors="replace"),
        "eager": costs(eager, inputs, arguments.rounds),
        "compiled": None if reason else costs(steps, inputs, arguments.rounds),
        "not_compiled": reason,
    }
    print_costs(report)
    if arguments.out:
        write_atomically(arguments.out, lambda path: Path(path).write_text(json.dumps(report, indent=1)))
    return 0


def print_costs(report: dict) -> None:
    print(f"{'model':<16}{'step ms':>10}{'saved MiB':>11}{'peak MiB':>10}")
    for way in filter(report.get, ("eager", "compiled")):
        for name, cost in report[way].items():
            label = {"plain": "plain", "eager": "plain torch LRT", "ours": "ours"}[name]
            label += " *" if way == "compiled" else ""
            print(f"{label:<18}{cost['step_ms']:>8.1f}{cost['saved_mib']:>11.2f}{cost['peak_mib']:>10.1f}")
        share = report[way]["ours"]["saved_mib"] / report[way]["eager"]["saved_mib"]
        print(f"ours keeps {share:.0%} of what the formula in plain torch keeps")
    if report["compiled"]:
        print("* compiled")


if __name__ == "__main__":
    sys.exit(main())
