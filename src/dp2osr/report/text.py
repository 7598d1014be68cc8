"""Numbers as text, and the sentences of the report, computed from the tables alone."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import pandas as pd

from dp2osr.metrics import METRICS, arrow

FEW_PHOTOS = 10  # below this a bootstrap over photographs is a rough guide, and the report says so
NAMES = {
    "mean_at_m": "Mean@{m}",
    "best_at_m": "Best@{m}",
    "worst_at_m": "Worst@{m}",
    "fr": "FR part",
    "nr": "NR part",
    "win_rate": "win rate, same seed",
    "std": "reward std over seeds",
    "diversity": "pixel std over seeds",
}


@dataclass(frozen=True)
class Row:
    """One row of tables.EVALUATION, whose columns are described there."""

    policy: str
    statistic: str
    m: int
    value: float
    value_low: float
    value_high: float
    reference: float
    difference: float
    ci_low: float
    ci_high: float
    in_reward: bool
    higher_better: bool
    num_groups: int
    num_photos: int

    @property
    def judged(self) -> str:
        """better, worse or unclear: whether the interval of the difference leaves out zero, and on which side."""
        if not math.isfinite(self.difference) or self.ci_low <= 0 <= self.ci_high:
            return "unclear"
        return "better" if (self.difference > 0) == self.higher_better else "worse"

    @property
    def change(self) -> str:
        """The difference with its interval."""
        return f"{number(self.difference, signed=True)} {interval(self.ci_low, self.ci_high, signed=True)}"


Rows = Mapping[str, Row]  # statistic -> row


def number(value: float | None, *, signed: bool = False) -> str:
    """Format with three decimals, or four digits where the value is large or small; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    spec = ".3f" if 0.01 <= size < 10 or size == 0 else ".2f" if 10 <= size < 1000 else ".3g"
    text = f"{value:+{spec}}" if signed else f"{value:{spec}}"
    return text.replace("-", "−")


def interval(low: float, high: float, *, signed: bool = False) -> str:
    """Format an interval in brackets; a dash where there is none."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return "–"
    return f"[{number(low, signed=signed)}, {number(high, signed=signed)}]"


def count(amount: int, noun: str) -> str:
    """Format an amount of things: `1 image`, `2,000 images`."""
    return f"{amount:,} {noun}" + ("" if amount == 1 else "s")


def label(statistic: str, m: int) -> str:
    """Return the heading of a statistic: its name, or a metric's name with its arrow."""
    return f"{statistic} {arrow(statistic)}" if statistic in METRICS else NAMES.get(statistic, statistic).format(m=m)


def at_largest_m(evaluation: pd.DataFrame, policy: str) -> dict[str, Row]:
    """Return statistic -> row of `policy`, each at its largest m."""
    names = [field.name for field in fields(Row)]
    frame = evaluation.loc[evaluation["policy"] == policy, names].sort_values("m", kind="stable")
    rows = [Row(*record) for record in frame.itertuples(index=False, name=None)]
    return {row.statistic: row for row in rows}


def _headline(row: Row, *, dataset: str, policy: str, reference: str, confidence: float) -> str:
    level = f"{100 * confidence:g} % interval {interval(row.ci_low, row.ci_high, signed=True)}"
    found = {
        "better": f"better than {reference}: the interval excludes 0",
        "worse": f"worse than {reference}: the interval excludes 0",
        "unclear": f"not clearly different from {reference}: the interval includes 0",
    }[row.judged]
    size = f"{count(row.num_groups, 'image')} of {count(row.num_photos, 'photograph')}"
    return (
        f"On {dataset} ({size}, {count(row.m, 'candidate')} each), {policy} has mean reward "
        f"{number(row.value)} against {number(row.reference)}, a difference of "
        f"{number(row.difference, signed=True)} ({level}). It is {found}."
    )


def _worst(rows: Rows) -> str:
    gains = {name: rows[f"{name}_at_m"] for name in ("worst", "mean", "best")}
    listed = ", ".join(f"{name} {row.change}" for name, row in gains.items())
    most = max(gains, key=lambda name: gains[name].difference)
    if most == "worst" and gains["worst"].judged == "better":
        return f"The worst candidate of an image gained most ({listed})."
    return f"The worst candidate of an image did not gain most ({listed})."


def _parts(rows: Rows) -> str:
    words = {"better": "rose", "worse": "fell", "unclear": "shows no clear change"}
    fr, nr = rows["fr"], rows["nr"]
    if fr.judged == nr.judged == "better":
        return f"Both the full-reference and the no-reference part rose ({fr.change} and {nr.change})."
    parts = f"The full-reference part {words[fr.judged]}, the no-reference part {words[nr.judged]}"
    return f"{parts} ({fr.change} and {nr.change})."


def _held_out(rows: Rows) -> str:
    held = [row for name, row in rows.items() if name in METRICS and not row.in_reward]
    if not held:
        return "No metric was held out of the reward, so nothing here would show that the reward was gamed."
    sides = {side: [row.statistic for row in held if row.judged == side] for side in ("better", "worse", "unclear")}
    said = [f"{joined(names)} {side}" for side, names in sides.items() if names]
    warning = " Worse values outside the reward are a sign that it was followed too far." if sides["worse"] else ""
    return f"Metrics that are no part of the reward: {'; '.join(said)}.{warning}"


def verdict(evaluation: pd.DataFrame, *, dataset: str, policy: str, reference: str, confidence: float) -> list[str]:
    """Return plain sentences on what tables.EVALUATION rows of one data set say of the policy."""
    rows = at_largest_m(evaluation, policy)
    sentences = [
        _headline(rows["mean_at_m"], dataset=dataset, policy=policy, reference=reference, confidence=confidence)
    ]
    if {"worst_at_m", "best_at_m"} <= set(rows):
        sentences.append(_worst(rows))
    if {"fr", "nr"} <= set(rows):
        sentences.append(_parts(rows))
    sentences.append(_held_out(rows))
    if (photos := rows["mean_at_m"].num_photos) < FEW_PHOTOS:
        sentences.append(f"With {count(photos, 'photograph')} the intervals are a rough guide.")
    return sentences


def training_sentence(validation: pd.DataFrame, log: pd.DataFrame) -> tuple[str, bool]:
    """Return what the guard did during training, and whether it stopped the training."""
    last = int(log["step"].max()) if len(log) else 0
    if validation.empty:
        return f"The guard was off; the policy is the last step, {last}.", False
    fired = validation[validation["verdict"] != "ok"]
    best = validation[validation["best"]]
    kept = f" The policy is the checkpoint of step {int(best['step'].iloc[-1])}, the best so far." if len(best) else ""
    if fired.empty:
        return f"The guard did not fire in {count(last, 'step')}.{kept}", False
    stop = fired.iloc[0]
    return f"The guard stopped the training at step {stop['step']}: {stop['verdict']}.{kept}", True


def joined(names: list[str]) -> str:
    """Join names with commas and `and`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
