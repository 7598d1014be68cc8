"""Metrics in the paper's four families: trained FR, trained NR, untrained NR, untrained FR.

A metric is trained where it is part of the reward that the run was tuned on, else it is untrained: held out. Trained
families say what the tuning was asked for; where they rise and the untrained ones fall, the reward was hacked.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from dp2osr import tables
from dp2osr.config import RewardSettings
from dp2osr.metrics import METRICS, arrow
from dp2osr.report import text
from dp2osr.report.markup import Cell, Grid

FAMILIES = {  # in the paper's order: name -> kind, and whether it is in the reward
    "trained FR": ("fr", True),
    "trained NR": ("nr", True),
    "untrained NR": ("nr", False),
    "untrained FR": ("fr", False),
}
SURE = "†"  # the interval of the difference leaves out zero


@dataclass(frozen=True)
class Line:
    """One metric of a policy and its reference: rows of tables.EVALUATION, `spread` that of its std over seeds."""

    family: str
    metric: str
    row: text.Row
    spread: text.Row | None

    @property
    def digits(self) -> int:
        """Decimals of the raw scores: two where they run to tens or hundreds, as psnr and musiq, else four."""
        high = METRICS[self.metric].high or 0.0
        values = (self.row.value, self.row.reference)
        return 2 if high > 10 or any(abs(value) >= 10 for value in values) else 4

    @property
    def winner(self) -> str:
        """policy or reference, whose score is better by its direction; empty where both print the same."""
        gain = round(self.row.value, self.digits) - round(self.row.reference, self.digits)
        if not gain or not math.isfinite(gain):
            return ""
        return "policy" if (gain > 0) == self.row.higher_better else "reference"

    def number(self, value: float, *, signed: bool = False) -> str:
        """Format with the metric's decimals; a dash where there is none."""
        return fixed(value, self.digits, signed=signed)

    @property
    def interval(self) -> str:
        """The interval of the difference."""
        return _interval(self, self.row)

    @property
    def difference(self) -> str:
        """The difference, marked where its interval leaves out zero."""
        return self.number(self.row.difference, signed=True) + (SURE if self.row.judged != "unclear" else "")


def fixed(value: float, digits: int, *, signed: bool = False) -> str:
    """Format with `digits` decimals and a true minus sign; zero has no sign; a dash where there is no number."""
    if not math.isfinite(value):
        return "–"
    rounded = round(value, digits) or 0.0
    return (f"{rounded:+.{digits}f}" if signed and rounded else f"{rounded:.{digits}f}").replace("-", "−")


def _interval(line: Line, row: text.Row) -> str:
    if not (math.isfinite(row.ci_low) and math.isfinite(row.ci_high)):
        return "–"
    return f"[{line.number(row.ci_low, signed=True)}, {line.number(row.ci_high, signed=True)}]"


def mark_trained(evaluation: pd.DataFrame, tuned_on: RewardSettings) -> pd.DataFrame:
    """Return tables.EVALUATION with in_reward of metrics by the reward that the run was tuned on.

    The evaluation's own column is by the reward that judges the run, which the configuration may let be another.
    """
    trained = {*tuned_on.fr, *tuned_on.nr}
    measured = evaluation["statistic"].str.removesuffix(tables.STD)
    in_reward = measured.isin(trained).where(measured.isin(list(METRICS)), evaluation["in_reward"])
    return evaluation.assign(in_reward=in_reward.astype(bool))


def lines(rows: text.Rows) -> list[Line]:
    """Sort the metrics of a policy (statistic -> row; its in_reward says trained) by family, as METRICS lists them."""
    found = []
    for family, (kind, trained) in FAMILIES.items():
        names = [name for name in METRICS if name in rows and METRICS[name].kind == kind]
        names = [name for name in names if rows[name].in_reward == trained]
        found += [Line(family, name, rows[name], rows.get(name + tables.STD)) for name in names]
    return found


def frame(found: Sequence[Line]) -> pd.DataFrame:
    """Return the metric table with full precision, for programs."""
    records = []
    for line in found:
        row, spread = line.row, line.spread
        record = {"family": line.family, "metric": line.metric, "in_reward": row.in_reward}
        record |= {"higher_better": row.higher_better, "m": row.m, "reference": row.reference, "policy": row.value}
        record |= {"difference": row.difference, "ci_low": row.ci_low, "ci_high": row.ci_high}
        record |= {"better": line.winner, "judged": row.judged}
        record |= {"reference_std": spread.reference if spread else math.nan}
        record |= {"policy_std": spread.value if spread else math.nan}
        record |= {"std_difference": spread.difference if spread else math.nan}
        record |= {"std_ci_low": spread.ci_low if spread else math.nan}
        record |= {"std_ci_high": spread.ci_high if spread else math.nan}
        records.append(record)
    return pd.DataFrame(records)


def _label(line: Line) -> str:
    return f"{line.metric} {arrow(line.metric)}"


def _pair(line: Line) -> list[Cell]:
    """Return the scores of reference and policy, the better one bold."""
    values = {"reference": line.row.reference, "policy": line.row.value}
    return [Cell(line.number(value), bold=line.winner == side) for side, value in values.items()]


def _sections(found: Sequence[Line], rows: Sequence[list[Cell]]) -> list[tuple[str, list[list[Cell]]]]:
    """Group the rows of lines by family."""
    by_family: dict[str, list[list[Cell]]] = {}
    for line, row in zip(found, rows, strict=True):
        by_family.setdefault(line.family, []).append(row)
    return list(by_family.items())


def metric_grid(found: Sequence[Line], *, dataset: str, policy: str, reference: str, level: str) -> Grid:
    """Return reference, policy, difference and interval of each metric, by family."""
    m = max((line.row.m for line in found), default=0)
    rows = [[Cell(_label(line)), *_pair(line), Cell(line.difference), Cell(line.interval)] for line in found]
    caption = (
        f"{policy} against {reference} on {dataset}: raw scores, mean over {text.count(m, 'seed')} an image. "
        f"Trained: in the reward of the run. Bold: the better mean. {SURE}: the {level} interval of the difference, "
        "by a paired bootstrap over photographs, leaves out zero."
    )
    heads = ["metric", reference, policy, "difference", f"{level} interval"]
    return Grid(caption, "family", heads, _sections(found, rows))


def stability_grid(found: Sequence[Line], *, dataset: str, policy: str, reference: str, level: str) -> Grid:
    """Return mean ± std over the seeds of an image for reference and policy, and the change of the std."""
    rows, spreads = [], [line for line in found if line.spread]
    for line in spreads:
        spread = line.spread
        assert spread is not None
        values = ((line.row.reference, spread.reference), (line.row.value, spread.value))
        cells = [Cell(f"{line.number(mean)} ± {line.number(std)}") for mean, std in values]
        mark = SURE if spread.judged != "unclear" else ""
        change = Cell(line.number(spread.difference, signed=True) + mark)
        rows.append([Cell(_label(line)), *cells, change, Cell(_interval(line, spread))])
    m = max((line.row.m for line in spreads), default=0)
    caption = (
        f"Stability of {policy} and {reference} on {dataset}: mean ± std over the {text.count(m, 'seed')} of an image, "
        f"both averaged over images. {SURE}: the {level} interval of the change of the std leaves out zero."
    )
    heads = ["metric", reference, policy, "std change", f"{level} interval"]
    return Grid(caption, "family", heads, _sections(spreads, rows))


def paper_grid(tests: Sequence[tuple[str, Sequence[Line]]], *, policy: str, reference: str) -> Grid:
    """Return one row a test set and model, one column a metric, in the layout of the paper's main table."""
    order = [name for found in (_order(tests, family) for family in FAMILIES) for name in found]
    sections = []
    for dataset, found in tests:
        by_metric = {line.metric: _pair(line) for line in found}
        dashes = [Cell("–"), Cell("–")]
        pairs = [by_metric.get(name, dashes) for name in order]
        rows = [[Cell(name), *(pair[at] for pair in pairs)] for at, name in enumerate((reference, policy))]
        sections.append((dataset, rows))
    caption = f"{policy} against {reference}: raw scores, mean over seeds and images; the better of the two is bold."
    families = [(family, len(_order(tests, family))) for family in FAMILIES]
    heads = ["model", *(f"{name} {arrow(name)}" for name in order)]
    return Grid(caption, "test set", heads, sections, tuple((name, size) for name, size in families if size))


def _order(tests: Sequence[tuple[str, Sequence[Line]]], family: str) -> list[str]:
    named = {line.metric for _, found in tests for line in found if line.family == family}
    return [name for name in METRICS if name in named]
