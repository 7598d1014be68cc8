"""Figures that others published of the models that this project tunes: assets/published.csv, typed.

Each row says where its figure is from. Figures are copied as printed; nothing here was measured by this project.
"""

import csv
import functools
from dataclasses import dataclass
from pathlib import Path

from dp2osr.errors import UserError

FILE = Path(__file__).parent / "assets" / "published.csv"
MEAN = "mean"  # over the images of a set; other statistics say in words what they are


@dataclass(frozen=True)
class Figure:
    """One published figure. metric: pyiqa's name where it has one; std: over seeds, None where none is given."""

    dataset: str
    model: str
    metric: str
    statistic: str
    value: float
    std: float | None
    source: str


@functools.cache
def figures() -> tuple[Figure, ...]:
    """Return all figures, in the order of the file."""
    return read(FILE)


def read(path: Path) -> tuple[Figure, ...]:
    """Read a file of figures; raises UserError that names the line where a column or number is wrong."""
    with path.open(newline="", encoding="utf-8") as handle:
        lines = csv.DictReader(handle)
        if (found := lines.fieldnames) != list(Figure.__dataclass_fields__):
            raise UserError(f"figures {path}: found columns {found}, wanted {', '.join(Figure.__dataclass_fields__)}")
        return tuple(_figure(line, f"figures {path}: line {lines.line_num}") for line in lines)


def _figure(line: dict[str, str], where: str) -> Figure:
    if empty := [name for name, text in line.items() if name != "std" and not text]:
        raise UserError(f"{where}: '{empty[0]}' is empty")
    try:
        value, std = float(line["value"]), float(line["std"]) if line["std"] else None
    except ValueError:
        raise UserError(f"{where}: value '{line['value']}', std '{line['std']}', wanted numbers") from None
    words = {name: line[name] for name in ("dataset", "model", "metric", "statistic", "source")}
    return Figure(**words, value=value, std=std)


def means(dataset: str, model: str) -> dict[str, Figure]:
    """Return metric -> figure of a model on a test set, by the names of the file: means over the images."""
    return {
        figure.metric: figure
        for figure in figures()
        if (figure.dataset, figure.model, figure.statistic) == (dataset, model, MEAN)
    }


def names(kind: str) -> set[str]:
    """Return the names of the `datasets` or `policies` (models) that there are figures of."""
    column = {"datasets": "dataset", "policies": "model"}[kind]
    return {getattr(figure, column) for figure in figures()}
