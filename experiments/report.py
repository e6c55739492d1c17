"""What an experiment leaves: tables with the published numbers beside its own, pictures, and a JSON record."""

import dataclasses
import datetime
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import losssurf_fast
from losssurf_fast.demo.report import prepare_folder, save_pictures
from losssurf_fast.files import write_atomically

WIDTH = 80


@dataclasses.dataclass
class Result:
    """What a procedure returns: text to print, numbers for the record, figures by their files' names."""

    text: str
    numbers: Mapping
    figures: Mapping


def comparison(
    title: str,
    columns: Sequence[str],
    ours: Mapping[str, Sequence[float | None]],
    published: Mapping[str, Sequence[float | str | None]],
    *,
    data: str,
    source: str,
    digits: int = 2,
) -> str:
    """A table of at most 80 columns: for each row our numbers and, below them, the published ones.

    Args:
        ours, published: numbers by the row's name; None is shown as "-". A row may be published or not.
        data: what ours were measured on.
        source: who published, and on what.
        digits: after the point.
    """
    label = max(map(len, [*ours, "network"])) + 2
    origin = max(len("published"), len(data), 4) + 2
    width = min(max(10, *map(len, columns)) + 2, (WIDTH - label - origin) // len(columns))
    line = lambda *cells: f"{cells[0]:{label}s}{cells[1]:{origin}s}" + "".join(f"{c:>{width}s}" for c in cells[2:])
    show = lambda value: "-" if value is None else value if isinstance(value, str) else f"{value:.{digits}f}"
    lines = [title, "", line("", "", *columns), "-" * (label + origin + width * len(columns))]
    for name, values in ours.items():
        lines.append(line(name, data, *map(show, values)))
        if name in published:
            lines.append(line("", "published", *map(show, published[name])))
    return "\n".join([*lines, "", f"published: {source}"])


def prepare(setting) -> None:
    """Make the folder of the results.

    Raises:
        SystemExit: it cannot be made or written to.
    """
    prepare_folder(setting.out, [f"{setting.experiment}.json"], setting.experiment)


def finish(setting, result: Result, seconds: float) -> None:
    """Print the text, save the pictures and the record, and say where they are."""
    print(f"\n{result.text}\n")
    paths = save_pictures(setting.out, dict(result.figures))
    record = {
        "experiment": setting.experiment,
        "flags": setting.identity() | {"device": str(setting.device)},
        "results": result.numbers,
        "versions": {"losssurf_fast": losssurf_fast.__version__, "torch": torch.__version__, "git": _revision()},
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
    }
    path = setting.out / f"{setting.experiment}.json"
    write_atomically(path, lambda temporary: Path(temporary).write_text(json.dumps(record, indent=1) + "\n"))
    for saved in (*paths, path):
        print(f"saved {saved}")
    print(f"done in {seconds:.0f} s")


def _revision() -> str | None:
    """The commit of this source tree, with "+" if it was changed; None outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit, changes = (
            subprocess.run([*git, *command], capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + "+" * bool(changes)
