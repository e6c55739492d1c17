"""Command line: ``python -m losssurf_fast demo | bench | doctor``."""

import argparse
import importlib
import sys
from pathlib import Path

import losssurf_fast


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m losssurf_fast", description=losssurf_fast.__doc__)
    parser.add_argument("--version", action="version", version=f"losssurf_fast {losssurf_fast.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo | bench | doctor")
    demo = commands.add_parser("demo", help="handwritten digits: a variance network, averages, and paths")
    commands.add_parser("bench", help="time every operator against eager PyTorch", add_help=False)
    commands.add_parser("doctor", help="versions, and which kernel serves which operator")

    from losssurf_fast import demo as demo_package
    from losssurf_fast import doctor

    demo_package.add_arguments(demo)
    parsed, rest = parser.parse_known_args(arguments)
    if parsed.command == "bench":
        return bench(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return demo_package.run(parsed) if parsed.command == "demo" else doctor.run()


def bench(argv: list[str]) -> int:
    root = Path(losssurf_fast.__file__).parents[1]
    if not (root / "benchmarks" / "run.py").is_file():
        raise SystemExit(
            "bench: the benchmarks are part of the source tree;\nrun this command, or `make bench`, in a checkout"
        )
    sys.path.insert(0, str(root))
    return importlib.import_module("benchmarks.run").main(argv) or 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)  # as shells report it
