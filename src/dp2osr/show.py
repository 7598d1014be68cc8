"""`dp2osr show TABLE`: what a parquet table holds, as plain text for a terminal."""

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from dp2osr import tables
from dp2osr.metrics import METRICS, arrow, sign

_KNOWN = (
    tables.IMAGES,
    tables.PROMPTS,
    tables.SCORES,
    tables.SCALES,
    tables.PAIRS,
    tables.TRAIN_LOG,
    tables.VALIDATION,
    tables.EVALUATION,
)
_BARS = "▁▂▃▄▅▆▇█"
_BINS = 12
_EXTREMES = 3  # worst and best groups listed
_CATEGORIES = 8  # values of a text column listed


def describe(schema: pa.Schema) -> tuple[str, pa.Schema]:
    """Return the table's name ("" where it is none of ours) and our schema with all field metadata.

    The name is in the schema's metadata; a file that lost it is known by its column names.
    """
    metrics = [name.removesuffix(tables.NORM) for name in schema.names if name.endswith(tables.NORM)]
    known = list(_KNOWN)
    if metrics and all(name in METRICS for name in metrics):
        known.append(tables.rewards_schema(metrics))
    written = (schema.metadata or {}).get(b"table", b"").decode()
    for ours in known:
        name = ours.metadata[b"table"].decode()
        if name == written or set(ours.names) == set(schema.names):
            return name, ours
    return written, schema


def number(value: float) -> str:
    """Format with four significant digits."""
    if value is None or not np.isfinite(value):
        return "-"
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e7 else f"{value:.4g}"


def bars(heights: Iterable[float]) -> str:
    """Return one block character a height, from none to the largest."""
    values = np.asarray(list(heights), dtype=float)
    if not values.size or not np.nanmax(values) > 0:
        return " " * values.size
    levels = np.ceil(np.nan_to_num(values) / np.nanmax(values) * len(_BARS)).astype(int)
    return "".join(_BARS[level - 1] if level > 0 else " " for level in levels)


def sparkline(values: Sequence[float] | np.ndarray, width: int = 40) -> str:
    """Return a curve of at most `width` characters, from its smallest to its largest value."""
    found = np.asarray(values, dtype=float)
    if found.size > width:
        found = np.array([part.mean() for part in np.array_split(found, width)])
    low, high = (np.nanmin(found), np.nanmax(found)) if np.isfinite(found).any() else (0.0, 0.0)
    scale = (found - low) / (high - low) if high > low else np.full(found.size, 0.5)
    return "".join(_BARS[min(int(part * len(_BARS)), len(_BARS) - 1)] if part == part else " " for part in scale)


def grid(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Align rows of text, the first being heads; the first `left` columns and the last are set to the left."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            text.ljust(width) if at < left else text.rjust(width)
            for at, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def distribution(name: str, values: pd.Series) -> list[str]:
    """Return a row of the distribution table: name, min, 5 %, median, 95 %, max, mean, missing, histogram."""
    found = values.to_numpy(dtype=float)
    finite = found[np.isfinite(found)]
    if not finite.size:
        return [name, *["-"] * 6, str(found.size), ""]
    low, five, median, ninety_five, high = np.quantile(finite, [0, 0.05, 0.5, 0.95, 1])
    heights, _ = np.histogram(finite, _BINS, (low, high) if high > low else (low - 0.5, low + 0.5))
    cells = [number(value) for value in (low, five, median, ninety_five, high, finite.mean())]
    return [name, *cells, str(found.size - finite.size), bars(heights)]


_HEADS = ["column", "min", "5%", "median", "95%", "max", "mean", "NaN", ""]


def columns_text(schema: pa.Schema, described: pa.Schema, width: int) -> str:
    """List each column: name, type, unit, range and description, wrapped to `width`."""
    name_width = max(len(name) for name in schema.names)
    lines = []
    for field in schema:
        ours = described.field(field.name) if field.name in described.names else field
        notes = {key.decode(): value.decode() for key, value in (ours.metadata or {}).items()}
        head = f"  {field.name:<{name_width}}  {field.type!s:<7} "
        facts = [
            f"[{notes['unit']}]" if notes.get("unit") else "",
            notes.get("range", ""),
            notes.get("description", ""),
        ]
        wrapped = textwrap.wrap("  ".join(filter(None, facts)), max(width - len(head), 24)) or [""]
        lines.append(head + wrapped[0])
        lines += [" " * len(head) + more for more in wrapped[1:]]
    return "\n".join(line.rstrip() for line in lines)


def origins_text(origins: Mapping[str, str], width: int) -> str:
    """List what made each metric's numbers, the start of each sha256."""
    lines = []
    for name, made in origins.items():
        short = re.sub(r"(sha256:[0-9a-f]{12})[0-9a-f]+", r"\1…", made)
        lines += textwrap.wrap(f"{name}: {short}", width - 2, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)


def numbers_text(frame: pd.DataFrame) -> str:
    """Return the distribution of each numeric column, metrics with their arrows."""
    numeric = frame.select_dtypes("number")
    if numeric.empty and not len(numeric.columns):
        return ""
    rows = [
        distribution(f"{name} {arrow(name)}" if name in METRICS else name, frame[name])
        for name in map(str, numeric.columns)
    ]
    return grid([_HEADS, *rows])


def categories_text(frame: pd.DataFrame, width: int) -> str:
    """Count the values of text and boolean columns that have few; say how many distinct ones the others have."""
    lines = []
    for name in frame.select_dtypes(exclude="number").columns.drop("group_id", errors="ignore"):
        counts = frame[name].value_counts()
        counts = counts[counts > 0]
        if len(counts) <= _CATEGORIES:
            said = ", ".join(f"{value if value != '' else '(empty)'} {amount:,}" for value, amount in counts.items())
        else:
            said = f"{len(counts):,} distinct values"
        lines += textwrap.wrap(f"{name}: {said}", width - 2, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)


def _extremes(
    values: pd.Series, what: str, *, lower_better: bool = False, words: tuple[str, str] = ("worst", "best")
) -> str:
    """List the groups at both ends, by default the worst and the best; values: group_id -> number."""
    order = values.dropna().sort_values(ascending=not lower_better, kind="stable")
    num = min(_EXTREMES, len(order) // 2)
    if not num:
        return ""
    rows = [[f"{words[0]} by {what}", "", f"{words[1]} by {what}", ""]]
    worst, best = order.iloc[:num], order.iloc[::-1].iloc[:num]
    for (low_name, low), (high_name, high) in zip(worst.items(), best.items(), strict=True):
        rows.append([str(low_name), number(low), str(high_name), number(high)])
    return grid(rows, left=3)


def _by_group(frame: pd.DataFrame, column: str) -> pd.Series:
    return frame.groupby("group_id", observed=True)[column].mean()


def scores_text(frame: pd.DataFrame) -> str:
    """Per metric: its distribution with arrow, and the worst and best groups by their mean score."""
    parts = [(str(name), rows) for name, rows in frame.groupby("metric", observed=True)]
    known = [(name, f"{name} {arrow(name)}" if name in METRICS else name, rows) for name, rows in parts]
    text = grid([["metric", *_HEADS[1:]], *(distribution(label, rows["score"]) for _, label, rows in known)])
    blocks = [
        _extremes(_by_group(rows, "score"), f"mean {label}", lower_better=name in METRICS and sign(name) < 0)
        for name, label, rows in known
    ]
    return "\n\n".join(filter(None, [text, *blocks]))


def rewards_text(frame: pd.DataFrame) -> str:
    """Spread of the rewards within groups; groups with the least and the most to learn from; each metric's groups."""
    spread = frame.groupby("group_id", observed=True)["reward"].std(ddof=0).rename("spread")
    blocks = [
        grid([_HEADS, distribution("std of the reward within a group", spread)]),
        _extremes(spread, "spread of the reward", words=("least", "most")),
    ]
    for name in (column for column in frame.columns if column in METRICS):
        lower = METRICS[name].lower_better
        blocks.append(_extremes(_by_group(frame, name), f"mean {name} {arrow(name)}", lower_better=lower))
    return "\n\n".join(filter(None, blocks))


def scales_text(frame: pd.DataFrame) -> str:
    """Per metric: the width of the scale, and in how many groups it has none."""
    rows = [["metric", "groups", "mean min", "mean max", "mean width", "without width"]]
    for name, part in frame.groupby("metric", observed=True):
        width = part["max"] - part["min"]
        means = [number(value.mean()) for value in (part["min"], part["max"], width)]
        rows.append([str(name), str(len(part)), *means, str(int((width == 0).sum()))])
    return grid(rows)


def pairs_text(frame: pd.DataFrame) -> str:
    """Pairs a group, and the groups with the smallest and largest weight."""
    sizes = frame.groupby("group_id", observed=True).size()
    table = grid([_HEADS, distribution("pairs a group", sizes)])
    ends = _extremes(_by_group(frame, "weight"), "mean weight", words=("least", "most"))
    return "\n\n".join(filter(None, [table, ends]))


def curves_text(frame: pd.DataFrame) -> str:
    """First and last value of each column over the steps, and its curve."""
    frame = frame.sort_values("step")
    rows = [["over the steps", "first", "last", ""]]
    for name in frame.select_dtypes("number").columns.drop("step"):
        values = frame[name].to_numpy(dtype=float)
        if values.size:
            rows.append([str(name), number(values[0]), number(values[-1]), sparkline(values).ljust(40)])
    return grid(rows)


def evaluation_text(frame: pd.DataFrame) -> str:
    """Each policy's statistics at their largest m, with the difference to the reference and its interval."""
    blocks = []
    for policy, part in frame.groupby("policy", sort=False, observed=True):
        last = part.sort_values("m", kind="stable").drop_duplicates("statistic", keep="last")
        rows = [[str(policy), "m", "value", "reference", "difference", "low", "high", ""]]
        for row in last.sort_index().to_dict("records"):
            name = str(row["statistic"])
            label = f"{name} {arrow(name)}" if name in METRICS else name
            cells = [number(row[key]) for key in ("m", "value", "reference", "difference", "ci_low", "ci_high")]
            sure = row["ci_low"] > 0 or row["ci_high"] < 0
            better = "better" if (row["difference"] > 0) == row["higher_better"] else "worse"
            judged = sure and name not in ("std", "diversity") and not name.endswith(tables.STD)
            rows.append([label, *cells, (better if judged else "").ljust(6)])
        blocks.append(grid(rows))
    return "\n\n".join(blocks)


_DETAILS: dict[str, tuple[str, Callable[[pd.DataFrame], str]]] = {
    "scores": ("scores by metric", scores_text),
    "rewards": ("groups", rewards_text),
    "scales": ("scales by metric", scales_text),
    "pairs": ("groups", pairs_text),
    "train_log": ("training", curves_text),
    "validation": ("training", curves_text),
    "evaluation": ("evaluation", evaluation_text),
}


def summarise(path: Path | str, *, width: int | None = None, colour: bool | None = None) -> str:
    """Return a summary of a parquet table; `width` and `colour` default to what standard output is.

    Our own tables are shown with units, ranges and what matters in them; any other gets columns and distributions.
    """
    width = width or shutil.get_terminal_size((100, 24)).columns
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ if colour is None else colour
    table = tables.load(path)
    name, described = describe(table.schema)
    frame = table.to_pandas(strings_to_categorical=True)
    groups = f", {frame['group_id'].nunique():,} groups" if "group_id" in frame.columns else ""
    size = Path(path).stat().st_size / 1024
    title = f"{path}: {name or 'table'}, {len(frame):,} rows{groups}, {len(frame.columns)} columns, {size:,.0f} KiB"
    sections = [("columns", columns_text(table.schema, described, width))]
    if made := tables.origins(table.schema):
        sections.append(("made by", origins_text(made, width)))
    if len(frame):
        sections += [("numbers", numbers_text(frame)), ("values", categories_text(frame, width))]
        if name in _DETAILS and set(described.names) <= set(frame.columns):
            head, details = _DETAILS[name]
            sections.append((head, details(frame)))
    bold = ("\x1b[1m", "\x1b[0m") if colour else ("", "")
    body = "".join(f"\n{bold[0]}{head}{bold[1]}\n{text}\n" for head, text in sections if text)
    return f"{bold[0]}{title}{bold[1]}\n{body}"
