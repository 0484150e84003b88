"""Look at runs beside each other: `cotwin runs compare A B [C ...]` prints what they were given differently, what their
stages measured, and where their curves ended. A run is a folder, or a name in runs/."""

import sys
from pathlib import Path
from typing import Any

import yaml

from bridge.config import errors_in_one_line
from learner.run_folder import Run, load_run

LAST = 5  # points of a curve that its end is the mean of
USAGE = "usage: cotwin runs compare A B [C ...]"


@errors_in_one_line()
def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{USAGE}\n\n{__doc__}")
        return 0
    if argv[0] != "compare" or len(argv) < 3:
        print(f"error: {' '.join(argv)}: {USAGE}", file=sys.stderr)
        return 2
    print(compare([load_run(find(name)) for name in argv[1:]]))
    return 0


def find(name: str) -> Path:
    """A folder as it is given, or of that name in runs/."""
    return Path(name) if Path(name).is_dir() else Path("runs") / name


def compare(runs: list[Run]) -> str:
    """Three tables: settings that differ, figures of stages, ends of curves."""
    settings = [_settings(run.folder) for run in runs]
    keys = sorted({key for found in settings for key in found})
    differing = [key for key in keys if len({str(found.get(key)) for found in settings}) > 1]
    figures = [{f"{s.stage}.{k}": v for s in run.stages.values() for k, v in s.figures.items()} for run in runs]
    ends = [{tag: _end(points) for tag, points in run.curves.items()} for run in runs]
    titles = [run.folder.name for run in runs]
    tables = [
        _table("settings that differ", titles, settings, differing),
        _table("figures of stages", titles, figures, sorted({key for found in figures for key in found})),
        _table(f"curves, mean of the last {LAST} points", titles, ends, sorted({tag for e in ends for tag in e})),
    ]
    return "\n\n".join(tables)


def _settings(folder: Path) -> dict[str, Any]:
    """Leaves of all of a run's saved configs, `<command>.<key>`."""
    found: dict[str, Any] = {}

    def walk(node: Any, name: str) -> None:
        if isinstance(node, dict) and node:
            for key, value in node.items():
                walk(value, f"{name}.{key}")
        else:
            found[name] = node

    for path in sorted((folder / "config").glob("*.yaml")):
        walk(yaml.safe_load(path.read_text()), path.stem)
    return found


def _end(points: list[tuple[int, float]]) -> float:
    last = [value for _, value in points[-LAST:]]
    return sum(last) / len(last)


def _table(title: str, names: list[str], columns: list[dict[str, Any]], rows: list[str]) -> str:
    """Markdown; what a run lacks is a dash."""
    cells = [[row, *(_text(column.get(row)) for column in columns)] for row in rows]
    lines = [f"**{title}**", "", " | ".join(["", *names]), " | ".join(["---"] * (len(names) + 1))]
    return "\n".join([*lines, *(" | ".join(line) for line in cells)])


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
