"""Figures of the report: each is drawn once and kept as PNG (white paper) and as SVG for a light or dark page.

Policy and reference keep their colours in every figure; best, mean and worst have panels of their own, so that
no figure needs colour alone to be read.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

POLICY, REFERENCE, OTHER = "#3a8fd6", "#e08a1e", "#8a8f98"
WINNER, LOSER = "#1a9e77", "#c9659f"
WIDTH = 10.0  # inches
_INK = "#101112"  # replaced by the page's own text colour in the SVG
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#8a8f98",
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


@dataclass(frozen=True)
class Plot:
    """A finished figure: file stem, title, one sentence on how to read it, both formats."""

    name: str
    title: str
    note: str
    svg: str
    png: bytes


def draw(name: str, title: str, note: str, size: tuple[float, float], paint: Callable[[Figure], None]) -> Plot:
    """Let `paint` fill an empty figure of `size` inches; equal input gives equal bytes."""
    style: Any = {**_STYLE, "svg.hashsalt": name}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure)
        vector, raster = io.StringIO(), io.BytesIO()
        figure.savefig(vector, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        figure.savefig(raster, format="png", dpi=180, facecolor="white", metadata={"Software": None})
    svg = vector.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    return Plot(name, title, note, svg, raster.getvalue())


def _ticks_at(axes: Axes, values: Sequence[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator([float(value) for value in values]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def at_m(evaluation: pd.DataFrame, *, dataset: str, policy: str, reference: str) -> Plot:
    """Worst, mean and best reward of m candidates over m, with interval bands; rows of tables.EVALUATION."""

    def paint(figure: Figure) -> None:
        panels = figure.subplots(1, 3, sharey=True)
        for axes, statistic in zip(panels, ("worst", "mean", "best"), strict=True):
            rows = evaluation[evaluation["statistic"] == f"{statistic}_at_m"].sort_values("m")
            for name, colour, marker in ((reference, REFERENCE, "s"), (policy, POLICY, "o")):
                curve = rows[rows["policy"] == name]
                axes.fill_between(curve["m"], curve["value_low"], curve["value_high"], color=colour, alpha=0.2, lw=0)
                axes.plot(curve["m"], curve["value"], color=colour, marker=marker, ms=4, label=name)
            _ticks_at(axes, sorted(rows["m"].unique()))
            axes.set_title(f"{statistic.capitalize()}@m")
            axes.set_xlabel("candidates an image, m")
        panels[0].set_ylabel("reward (reference's scale)")
        panels[0].legend(loc="best")

    note = (
        "Expectation over m candidates of an image, mean over images; bands are bootstrap intervals over photographs."
    )
    return draw(f"at_m-{dataset}", f"Worst, mean and best of m candidates on {dataset}", note, (WIDTH, 3.0), paint)


def histogram(rewards: Mapping[str, np.ndarray], *, dataset: str, policy: str, reference: str) -> Plot:
    """Distribution of the rewards (number of candidates,) of policy and reference."""
    values = {name: rewards[name][np.isfinite(rewards[name])] for name in (reference, policy)}

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        joined = np.concatenate(list(values.values()))
        low, high = np.quantile(joined, [0.002, 0.998]) if joined.size else (0.0, 1.0)
        bins = np.linspace(min(low, 0.0), max(high, 1.0), 49).tolist()
        for (name, found), colour, line in zip(values.items(), (REFERENCE, POLICY), ("--", "-"), strict=True):
            inside = np.clip(found, bins[0], bins[-1])
            share = np.full(inside.size, 100 / max(inside.size, 1))
            axes.hist(inside, bins, weights=share, color=colour, alpha=0.35)
            axes.hist(inside, bins, weights=share, histtype="step", color=colour, lw=1.2)
            if found.size:
                mean = float(found.mean())
                axes.axvline(mean, color=colour, ls=line, lw=1.6, label=f"{name}, mean {mean:.3f}")
        axes.set_xlabel("reward (reference's scale; the reference's own candidates lie in [0, 1])")
        axes.set_ylabel("candidates (%)")
        axes.legend()

    note = "All candidates of all images; the few values past either end are counted in the last bar."
    return draw(f"rewards-{dataset}", f"Rewards of all candidates on {dataset}", note, (WIDTH, 2.9), paint)


def _curve(axes: Axes, log: pd.DataFrame, column: str, colour: str, label: str | None = None) -> None:
    window = max(len(log) // 20, 1)
    axes.plot(log["step"], log[column], color=colour, alpha=0.3, lw=0.8)
    smooth = log[column].rolling(window, min_periods=1, center=True).mean()
    axes.plot(log["step"], smooth, color=colour, lw=1.8, label=label)


def training(log: pd.DataFrame) -> Plot:
    """Six panels of tables.TRAIN_LOG: raw values thin, running mean thick."""

    def paint(figure: Figure) -> None:
        panels = figure.subplots(2, 3, sharex=True)
        single = (
            (panels[0, 0], "loss", "loss (nat)"),
            (panels[0, 1], "implicit_accuracy", "implicit accuracy (share of pairs)"),
            (panels[0, 2], "abs_logit", "mean |z| of the logistic"),
            (panels[1, 0], "margin", "margin (squared error)"),
            (panels[1, 2], "grad_norm", "gradient norm before clipping"),
        )
        for axes, column, title in single:
            _curve(axes, log, column, POLICY)
            axes.set_title(title)
        panels[0, 0].axhline(np.log(2), color=OTHER, ls=":", label="log 2: no preference yet")
        panels[0, 1].axhline(0.5, color=OTHER, ls=":", label="chance")
        panels[0, 0].margins(y=0.15)
        panels[0, 2].axhspan(1, 2, color=OTHER, alpha=0.15, lw=0, label="where good runs end")
        _curve(panels[1, 1], log, "error_chosen", WINNER, "winner")
        _curve(panels[1, 1], log, "error_rejected", LOSER, "loser")
        panels[1, 1].axhline(0, color=OTHER, ls=":")
        panels[1, 1].set_title("error against the reference")
        panels[0, 0].legend(fontsize=8, loc="lower left")
        for axes in (panels[0, 1], panels[0, 2], panels[1, 1]):
            axes.legend(fontsize=8)
        for axes in panels[1]:
            axes.set_xlabel("optimizer step")

    note = (
        "A falling loss alone proves nothing: watch the winner's error, |z| and the validation reward below. "
        "Error is the policy's squared error minus the reference's."
    )
    return draw("training", "Training", note, (WIDTH, 4.8), paint)


def validation(table: pd.DataFrame) -> Plot:
    """Reward, its parts and the diversity between seeds during training; rows of tables.VALIDATION."""
    table = table.sort_values("step")

    def paint(figure: Figure) -> None:
        panels = figure.subplots(1, 3, sharex=True)
        for axes, columns, title in (
            (panels[0], ["reward"], "validation reward"),
            (panels[1], ["fr", "nr"], "its two parts"),
            (panels[2], ["diversity"], "diversity: std between seeds"),
        ):
            for column, colour, marker in zip(columns, (POLICY, LOSER), ("o", "^"), strict=False):
                label = {"fr": "full reference", "nr": "no reference"}.get(column)
                axes.plot(table["step"], table[column], color=colour, marker=marker, ms=4, label=label)
            axes.set_title(title)
            axes.set_xlabel("optimizer step")
            if table["step"].iloc[0] == 0:
                axes.axhline(table[columns[0]].iloc[0], color=REFERENCE, ls="--", lw=1, label="reference")
        best = table[table["best"]]
        if len(best):
            panels[0].plot(
                best["step"].iloc[-1], best["reward"].iloc[-1], "*", ms=13, color=WINNER, label="kept checkpoint"
            )
        panels[2].set_ylim(bottom=0)
        panels[0].legend(fontsize=8)
        panels[1].legend(fontsize=8)

    note = (
        "Rollouts on the validation photographs while training; step 0 is the reference. The best step is the policy."
    )
    return draw("validation", "Validation while training", note, (WIDTH, 2.9), paint)


def forest(rows: pd.DataFrame, *, name: str, title: str, note: str, highlight: str, unit: str) -> Plot:
    """Differences with intervals, one line a row; columns label, group, difference, ci_low, ci_high."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for y, row in enumerate(rows.to_dict("records")):
            colour = POLICY if row["group"] == highlight else OTHER
            axes.plot([row["ci_low"], row["ci_high"]], [y, y], color=colour, lw=2.2, solid_capstyle="round")
            axes.plot(row["difference"], y, "o", color=colour, ms=6)
        axes.axvline(0, color=REFERENCE, lw=1.4, ls="--")
        axes.set_yticks(range(len(rows)), rows["label"])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(unit)

    return draw(name, title, note, (WIDTH, 0.9 + 0.3 * len(rows)), paint)


CROWD = 6  # with more runs at one value, points stand without their intervals


def sweep(panels: Mapping[str, pd.DataFrame], *, dataset: str) -> Plot:
    """Gain of each run over its reference against each setting; setting -> runs to compare in it.

    The runs' columns: the setting's own, difference, ci_low, ci_high.
    """

    def paint(figure: Figure) -> None:
        drawn = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))
        for axes, (setting, rows) in zip(drawn, panels.items(), strict=True):
            values = sorted(rows[setting].unique(), key=lambda value: (isinstance(value, str), value))
            for at, value in enumerate(values):
                same = rows[rows[setting] == value]
                x = at + np.linspace(-0.3, 0.3, len(same) + 2)[1:-1]
                if len(same) <= CROWD:
                    errors = [same["difference"] - same["ci_low"], same["ci_high"] - same["difference"]]
                    axes.errorbar(x, same["difference"], errors, fmt="o", color=POLICY, ms=5, lw=1.4, capsize=2)
                else:
                    axes.plot(x, same["difference"], "o", color=POLICY, ms=3, alpha=0.5)
                mean = same["difference"].mean()
                axes.plot([at - 0.35, at + 0.35], [mean, mean], color=POLICY, lw=2, alpha=0.8)
            labels = [value if isinstance(value, str) else f"{value:g}" for value in values]
            axes.set_xticks(range(len(values)), labels)
            axes.set_xlim(-0.6, len(values) - 0.4)
            axes.axhline(0, color=REFERENCE, lw=1.2, ls="--")
            axes.set_xlabel(setting)
        drawn[0].set_ylabel("gain in mean reward")

    title = f"Gain on {dataset} against each setting that varies"
    note = (
        "A point is a run, with its interval where they are few; a bar is their mean. Each panel holds the runs whose "
        "other settings occur with every value on its axis, so that the values are compared on equal terms."
    )
    return draw(f"sweep-{dataset}", title, note, (WIDTH, 3.2), paint)
