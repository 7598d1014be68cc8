"""The page of one run: what the templates show, and the figures and tables beside it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dp2osr.metrics import METRICS
from dp2osr.report import families, figures, markup, published, sheets, text
from dp2osr.report.inputs import Material, ReportJob, TestSet

Files = dict[str, bytes]  # path below the report's folder -> content
CARDS = ("mean_at_m", "worst_at_m", "best_at_m", "fr", "nr", "win_rate", "std")


def render(template: str, context: Mapping[str, Any]) -> str:
    """Fill a template; all text is escaped, and a name that is missing is an error."""
    folder = Path(__file__).parent / "templates"
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = text.number
    return environment.get_template(template).render(context)


def csv(frame: pd.DataFrame) -> bytes:
    """Return a table as CSV bytes with full precision."""
    return frame.to_csv(index=False, lineterminator="\n").encode()


def figure(plot: figures.Plot) -> dict[str, Any]:
    """Return what the template needs of a figure; its SVG was drawn here, so it goes in as it is."""
    return {"title": plot.title, "note": plot.note, "svg": Markup(plot.svg), "name": plot.name}


def cell(row: text.Row) -> dict[str, str]:
    """Return a row of tables.EVALUATION as text: value, interval, reference, change, change's interval, judgement."""
    judged = "unclear" if row.statistic in ("std", "diversity") else row.judged  # less spread is no virtue
    return {
        "title": text.label(row.statistic, row.m),
        "value": text.number(row.value),
        "interval": text.interval(row.value_low, row.value_high),
        "reference": text.number(row.reference),
        "change": text.number(row.difference, signed=True),
        "change_interval": text.interval(row.ci_low, row.ci_high, signed=True),
        "judged": judged,
    }


def metric_sections(found: Sequence[families.Line]) -> list[dict[str, Any]]:
    """Return the families that a run has, each with the rows of its metrics as text."""
    sections: dict[str, list[dict[str, Any]]] = {}
    for line in found:
        row, spread = line.row, line.spread
        cells = {"title": text.label(line.metric, row.m), "winner": line.winner, "judged": row.judged}
        cells |= {"reference": line.number(row.reference), "value": line.number(row.value)}
        cells |= {"change": line.difference, "change_interval": line.interval}
        cells |= {"reference_std": line.number(spread.reference) if spread else ""}
        cells |= {"value_std": line.number(spread.value) if spread else ""}
        sections.setdefault(line.family, []).append(cells)
    return [{"family": family, "rows": rows} for family, rows in sections.items()]


def metric_files(found: Sequence[families.Line], **words: str) -> Files:
    """Return the metric and stability tables of a data set as CSV (full precision), Markdown and LaTeX."""
    name, files = words["dataset"], {f"tables/metrics-{words['dataset']}.csv": csv(families.frame(found))}
    for kind, grid in (
        ("metrics", families.metric_grid(found, **words)),
        ("stability", families.stability_grid(found, **words)),
    ):
        files |= _written(f"tables/{kind}-{name}", grid)
    return files


def _written(stem: str, grid: markup.Grid) -> Files:
    return {f"{stem}.md": markup.markdown(grid).encode(), f"{stem}.tex": markup.latex(grid).encode()}


def policy_table(evaluation: pd.DataFrame, order: list[str]) -> dict[str, Any]:
    """Return policies and controls side by side: heads, and one row of cells a policy."""
    by_policy = {name: text.at_largest_m(evaluation, name) for name in order}
    columns = [*CARDS, *(name for name in METRICS if name in set(evaluation["statistic"]))]
    columns = [name for name in columns if any(name in rows for rows in by_policy.values())]
    lines = []
    for name, rows in by_policy.items():
        num = max((row.m for row in rows.values()), default=0)
        cells = [cell(rows[column]) if column in rows else None for column in columns]
        lines.append({"policy": name, "m": num, "cells": cells})
    heads = [text.label(column, 0).replace("@0", "@M") for column in columns]
    return {"heads": heads, "rows": lines}


def _order(evaluation: pd.DataFrame, policy: str, reference: str) -> list[str]:
    found = set(evaluation["policy"])
    return [name for name in (reference, policy) if name in found] + sorted(found - {policy, reference})


def _forest(evaluation: pd.DataFrame, *, dataset: str, policy: str, reference: str) -> figures.Plot:
    records = []
    for name in _order(evaluation, policy, reference):
        rows = text.at_largest_m(evaluation, name)
        statistics = ("mean_at_m", "worst_at_m", "best_at_m", "fr", "nr") if name == policy else ("mean_at_m",)
        for row in [rows[statistic] for statistic in statistics if statistic in rows and name != reference]:
            ends = {"difference": row.difference, "ci_low": row.ci_low, "ci_high": row.ci_high}
            records.append({"label": f"{name}: {text.label(row.statistic, row.m)}", "group": name, **ends})
    return figures.forest(
        pd.DataFrame(records),
        name=f"differences-{dataset}",
        title=f"Differences to {reference} on {dataset}",
        note="The policy's gains (blue) beside those of the controls (grey); a bar that crosses 0 is no clear change.",
        highlight=policy,
        unit=f"reward minus that of {reference}, with interval",
    )


def _level(job: ReportJob) -> str:
    """Return the level of the intervals as text."""
    return f"{100 * job.evaluate.confidence:g} %"


def _test_section(test: TestSet, material: Material) -> tuple[dict[str, Any], Files]:
    job = material.job
    names = {"dataset": test.name, "policy": job.name, "reference": job.run.reference}
    rows = text.at_largest_m(test.evaluation, job.name)
    values = {job.name: test.policy["reward"].to_numpy(), job.run.reference: test.reference["reward"].to_numpy()}
    plots = [
        figures.at_m(test.evaluation, **names),
        figures.histogram(values, **names),
        _forest(test.evaluation, **names),
    ]
    lines = families.lines(rows)
    files = {f"figures/{plot.name}.png": plot.png for plot in plots}
    files[f"tables/evaluation-{test.name}.csv"] = csv(test.evaluation)
    files |= metric_files(lines, **names, level=_level(job))
    known = published.beside(test.evaluation, test.name, job.report.published)
    files |= {f"tables/published-{test.name}.csv": csv(known)} if len(known) else {}
    section = {
        "name": test.name,
        "published": published.section(known, job.report.published.datasets.get(test.name, "")),
        "verdict": text.verdict(test.evaluation, confidence=job.evaluate.confidence, **names),
        "judged": rows["mean_at_m"].judged,
        "cards": [cell(rows[name]) for name in CARDS if name in rows],
        "figures": [figure(plot) for plot in plots],
        "families": metric_sections(lines),
        "has_std": any(line.spread for line in lines),
        "policies": policy_table(test.evaluation, _order(test.evaluation, job.name, job.run.reference)),
        "blocks": test.blocks,
        "without_hr": test.name in job.without_hr,
        "no_reward": int(np.isnan(test.policy["reward"]).sum() + np.isnan(test.reference["reward"]).sum()),
        "candidates": len(test.policy) + len(test.reference),
    }
    return section, files


def _image_rows(images: Mapping[str, pd.DataFrame]) -> list[dict[str, Any]]:
    rows = []
    for name, frame in images.items():
        ok = frame["status"] == "ok"
        reasons = frame.loc[~frame["status"].isin(["ok", "partner"]), "reason"].value_counts()
        rows.append(
            {
                "dataset": name,
                "photographs": frame.loc[ok, "photo_id"].nunique(),
                "images": int(ok.sum()),
                "rejected": int((frame["status"] == "rejected").sum()),
                "duplicate": int((frame["status"] == "duplicate").sum()),
                "reasons": "; ".join(f"{reason} ({amount})" for reason, amount in reasons.items()),
            }
        )
    return rows


def _pair_rows(pairs: pd.DataFrame) -> list[tuple[str, str]]:
    means = {
        "mean gap (reward)": "gap",
        "mean w_intra": "w_intra",
        "mean w_inter": "w_inter",
        "mean weight": "weight",
    }
    sizes = [("pairs", f"{len(pairs):,}"), ("groups (LR images)", f"{pairs['group_id'].nunique():,}")]
    return sizes + [(name, text.number(pairs[column].mean())) for name, column in means.items()]


def run_page(material: Material) -> tuple[str, Files]:
    """Return the page of a run and the files beside it (figures, tables, contact sheets)."""
    job = material.job
    files: Files = {"contact_sheet.png": sheets.sheet([], zoom=1)}
    sections = []
    for at, test in enumerate(material.tests):
        section, found = _test_section(test, material)
        sections.append(section)
        files |= found
        name = "contact_sheet.png" if at == 0 else f"contact_sheet-{test.name}.png"
        files[name] = sheets.sheet(test.blocks, zoom=job.report.zoom)
    plots = [figures.training(material.log)] if len(material.log) else []
    plots += [figures.validation(material.validation)] if len(material.validation) else []
    files |= {f"figures/{plot.name}.png": plot.png for plot in plots}
    images = _image_rows(material.images)
    files |= {
        "tables/train_log.csv": csv(material.log),
        "tables/validation.csv": csv(material.validation),
        "tables/images.csv": csv(pd.DataFrame(images)),
        "tables/timings.csv": csv(material.timings),
    }
    models = {"policy": job.name, "reference": job.run.reference}
    lines = [(test.name, families.lines(text.at_largest_m(test.evaluation, job.name))) for test in material.tests]
    files |= _written("tables/paper", families.paper_grid(lines, **models))
    sentence, fired = text.training_sentence(material.validation, material.log)
    context = {
        "title": f"Run {job.name}",
        "job": job,
        "tests": sections,
        "training": {"sentence": sentence, "fired": fired, "figures": [figure(plot) for plot in plots]},
        "images": images,
        "pairs": _pair_rows(material.pairs),
        "explorer": f"../../../{job.run.dataset}/{job.run.reference}/explorer/{job.run.reward}/index.html",
        "settings": yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False),
        "software": dict(material.software),
        "timings": material.timings.to_dict("records"),
        "total_hours": material.timings["seconds"].sum() / 3600,
        "zoom": job.report.zoom,
        "confidence": _level(job),
    }
    return render("run.html.j2", context), files
