"""Published figures beside ours, where the config says that model and test set are the same."""

import pandas as pd

from dp2osr import published
from dp2osr.config_datasets import PublishedSettings
from dp2osr.metrics import METRICS
from dp2osr.report import text

COLUMNS = ("policy", "model", "metric", "published", "here", "difference", "better", "num_groups", "m", "source")


def beside(evaluation: pd.DataFrame, dataset: str, settings: PublishedSettings) -> pd.DataFrame:
    """Return a row for each metric that both a published figure and the evaluation have.

    evaluation: rows of tables.EVALUATION of one data set. Columns: policy (ours), model (its published name), metric
    (pyiqa's name), published, here (mean over all candidates), difference (here - published), better (whether ours is
    the better one), num_groups and m (our images, and candidates of each), source. Empty where the config names none.
    """
    rows = []
    for policy, model in settings.policies.items():
        known = published.means(settings.datasets.get(dataset, ""), model)
        ours = text.at_largest_m(evaluation, policy)
        for metric in (name for name in METRICS if name in known and name in ours):
            row, figure = ours[metric], known[metric]
            gap = row.value - figure.value
            better = gap < 0 if METRICS[metric].lower_better else gap > 0
            rows.append(
                (policy, model, metric, figure.value, row.value, gap, better, row.num_groups, row.m, figure.source)
            )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def section(frame: pd.DataFrame, dataset: str) -> dict[str, object] | None:
    """Return what the template needs of the rows of `beside`; None where there are none."""
    if frame.empty:
        return None
    lines = [
        {
            "policy": row.policy,
            "model": row.model,
            "metric": text.label(str(row.metric), 0),
            "published": f"{row.published:.4f}",
            "here": f"{row.here:.4f}",
            "difference": f"{row.difference:+.4f}".replace("-", "−"),
            "judged": "better" if row.better else "worse" if row.difference else "unclear",
        }
        for row in frame.itertuples()
    ]
    first = frame.iloc[0]
    size = f"{text.count(first['num_groups'], 'image')}, {text.count(first['m'], 'candidate')} each"
    return {"rows": lines, "dataset": dataset, "size": size, "sources": list(dict.fromkeys(frame["source"]))}
