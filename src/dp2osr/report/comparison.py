"""The page that compares runs: one row a run and data set, and the gain against each setting that varies."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from dp2osr.config import EvaluateSettings, RewardSettings, RunSettings
from dp2osr.metrics import METRICS
from dp2osr.report import figures, text
from dp2osr.report.page import Files, cell, csv, figure, render
from dp2osr.strict import Strict


class CompareJob(Strict):
    """Settings of the comparison: the runs by name and the rewards that they use."""

    runs: dict[str, RunSettings]
    rewards: dict[str, RewardSettings]
    evaluate: EvaluateSettings


def describe(run: RunSettings, reward: RewardSettings) -> dict[str, Any]:
    """Return the settings in which runs are compared, by short name; N is given as a share of M.

    The size of a step is the number of its images, for these are its cost, whatever the batching and N are.
    """
    pairs, train = run.pairs, run.train
    by_group = train.batching == "groups"
    return {
        "reference": run.reference,
        "dataset": run.dataset,
        "M": reward.num_rollouts,
        "N/M": pairs.top / reward.num_rollouts,
        "selection": pairs.selection,
        "HPO weights": pairs.weights,
        "min_gap": pairs.min_gap,
        "max_pairs_per_group": pairs.max_pairs_per_group,
        "FR metrics": ", ".join(reward.fr),
        "NR metrics": ", ".join(reward.nr),
        "weight_fr": reward.weight_fr,
        "batching": train.batching,
        "beta": train.beta,
        "learning_rate": train.learning_rate,
        "steps": train.steps,
        "images a step": 2 * (pairs.top * train.groups_per_step if by_group else train.pairs_per_step),
        "precision": train.precision,
        "judge": run.judge or run.reward,
        "seed": run.seed,
    }


def _first(job: CompareJob) -> tuple[RunSettings, RewardSettings]:
    run = next(iter(job.runs.values()))
    return run, job.rewards[run.reward]


def compare_table(
    job: CompareJob,
    evaluations: Mapping[tuple[str, str], pd.DataFrame],
    logs: Mapping[str, pd.DataFrame],
    validations: Mapping[str, pd.DataFrame],
) -> pd.DataFrame:
    """Return one row a run and test data set: its settings, each statistic at its largest m, with interval.

    evaluations: (run, data set) -> tables.EVALUATION. logs, validations: run -> tables.TRAIN_LOG, tables.VALIDATION.
    """
    records = []
    for (run, dataset), evaluation in evaluations.items():
        settings = job.runs[run]
        record: dict[str, Any] = {"run": run, "test": dataset, **describe(settings, job.rewards[settings.reward])}
        for statistic, row in text.at_largest_m(evaluation, run).items():
            name = statistic.replace("_at_m", "")
            values = {"": row.value, "_difference": row.difference, "_low": row.ci_low, "_high": row.ci_high}
            record |= {name + suffix: value for suffix, value in values.items()}
        log, validation = logs[run], validations[run]
        best = validation.loc[validation["best"], "step"]
        fired = validation.loc[validation["verdict"] != "ok", "verdict"]
        record["last_step"] = int(log["step"].max()) if len(log) else 0
        record["kept_step"] = int(best.max()) if len(best) else record["last_step"]
        record["last_abs_logit"] = float(log["abs_logit"].tail(10).mean())
        record["last_accuracy"] = float(log["implicit_accuracy"].tail(10).mean())
        record["guard"] = "; ".join(fired) or "ok"
        records.append(record)
    return pd.DataFrame(records)


def varying(table: pd.DataFrame, settings: Sequence[str]) -> list[str]:
    """Return the settings that differ between runs; of two that always change together, the first."""
    found: list[str] = []
    seen: list[list[int]] = []
    for name in settings:
        codes = [int(code) for code in pd.factorize(table[name])[0]]
        if name != "seed" and max(codes, default=0) > 0 and codes not in seen:
            found.append(name)
            seen.append(codes)
    return found


def balanced(rows: pd.DataFrame, setting: str, settings: Sequence[str]) -> pd.DataFrame:
    """Return the runs whose other settings (but for the seed) occur with every value of `setting`."""
    others = [name for name in settings if name != setting]
    if not others:
        return rows
    found = rows.groupby(others, sort=False)[setting].transform("nunique")
    return rows[found == rows[setting].nunique()]


def seed_spread(table: pd.DataFrame, settings: Sequence[str]) -> float:
    """Return the largest difference of `difference` between runs that are equal but for their seed; NaN if none are."""
    groups = [rows for _, rows in table.groupby(list(settings))] if settings else [table]
    spreads = [float(rows["difference"].max() - rows["difference"].min()) for rows in groups if len(rows) > 1]
    return max(spreads, default=float("nan"))


def finding(rows: pd.DataFrame, setting: str, spread: float) -> str:
    """Say how the gain goes with one setting, and whether it moves more than two seeds and half an interval do.

    rows: runs that are balanced in all other settings, with difference, ci_low, ci_high.
    """
    means = rows.groupby(setting)["difference"].mean()
    listed = ", ".join(
        f"{value if isinstance(value, str) else format(value, 'g')}: {text.number(float(gain), signed=True)}"
        for value, gain in means.items()
    )
    change = float(means.max() - means.min())
    noise = float((rows["ci_high"] - rows["ci_low"]).mean()) / 2
    seeds = f"; two seeds of one setting differ by up to {text.number(spread)}" if spread == spread else ""
    clear = change > max(noise, spread if spread == spread else 0.0)
    said = f"most gain at {means.idxmax()}" if clear else "too small a change to tell"
    return f"{setting}: mean gain {listed} (range {text.number(change)}{seeds}): {said}."


def _panels(rows: pd.DataFrame, settings: list[str], dataset: str) -> tuple[list[figures.Plot], list[str]]:
    """Return the figures and sentences of one test data set; rows have run, difference, ci_low, ci_high."""
    forest = rows.assign(label=rows["run"], group="run").to_dict("records")
    plots = [
        figures.forest(
            pd.DataFrame(forest),
            name=f"runs-{dataset}",
            title=f"Gain of each run on {dataset}",
            note="Mean reward of the policy minus that of its own reference, both on that reference's scale.",
            highlight="run",
            unit="gain in mean reward over the reference, with interval",
        )
    ]
    if not settings:
        return plots, []
    found = {name: balanced(rows, name, settings) for name in settings}
    panels = {name: kept for name, kept in found.items() if len(kept)}
    if not panels:
        return plots, []
    plots.append(figures.sweep(panels, dataset=dataset))
    spread = seed_spread(rows, settings)
    sentences = [finding(kept, name, spread) for name, kept in panels.items()]
    return plots, sentences


def compare_page(
    job: CompareJob, table: pd.DataFrame, evaluations: Mapping[tuple[str, str], pd.DataFrame]
) -> tuple[str, Files]:
    """Return the comparison page and the files beside it; `table` is that of `compare_table`."""
    settings = varying(table.drop_duplicates("run"), list(describe(*_first(job))))
    shown = ["mean_at_m", "worst_at_m", "best_at_m", "fr", "nr", "win_rate", "std"]
    sections, files = [], Files()
    for dataset, part in table.groupby("test", sort=False):
        rows = part.rename(columns={"mean_difference": "difference", "mean_low": "ci_low", "mean_high": "ci_high"})
        plots, sentences = _panels(rows, settings, str(dataset))
        files |= {f"figures/{plot.name}.png": plot.png for plot in plots}
        lines = []
        for record in part.to_dict("records"):
            found = text.at_largest_m(evaluations[record["run"], str(dataset)], record["run"])
            names = [*shown, *(name for name in METRICS if f"{name}_difference" in part.columns)]
            values = [record[name] for name in settings]
            lines.append(
                {
                    "run": record["run"],
                    "settings": [value if isinstance(value, str) else f"{value:g}" for value in values],
                    "seed": record["seed"],
                    "kept": f"{record['kept_step']} of {record['last_step']}",
                    "logit": text.number(record["last_abs_logit"]),
                    "guard": record["guard"],
                    "cells": [cell(found[name]) if name in found else None for name in names],
                }
            )
        heads = [text.label(name, 0).replace("@0", "@M") for name in names]
        plotted = [figure(plot) for plot in plots]
        sections.append({"name": dataset, "rows": lines, "heads": heads, "figures": plotted, "findings": sentences})
    files["compare.csv"] = csv(table)
    context = {
        "title": "Comparison of runs",
        "sections": sections,
        "settings": settings,
        "judges_differ": table["judge"].nunique() > 1,
        "confidence": f"{100 * job.evaluate.confidence:g} %",
    }
    return render("compare.html.j2", context), files
