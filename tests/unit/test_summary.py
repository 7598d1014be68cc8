"""The table of a benchmark: hand-computed figures and differences, seeds, resamples, sources that do not agree."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dp2osr import tables
from dp2osr.downstream import summary
from dp2osr.errors import UserError

BOOTSTRAP = summary.Bootstrap(resamples=200, confidence=0.95, seed=0)
WORD = [[0, 0], [10, 0], [10, 10], [0, 10]]
OTHER = [[60, 0], [70, 0], [70, 10], [60, 10]]
NAMES = [f"img_{number}" for number in range(8)]


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    for name in NAMES:
        (tmp_path / f"gt_{name}.txt").write_text("0,0,10,0,10,10,0,10,word\n")
    return tmp_path


def predictions(*seeds: list[list[Any]], rejected: tuple[str, ...] = ()) -> pd.DataFrame:
    """Return rows of tables.PREDICTIONS: the boxes of each photograph, for each seed."""
    rows = [
        (name, rollout, "rejected" if name in rejected else "ok", "", json.dumps(boxes))
        for rollout, each in enumerate(seeds)
        for name, boxes in zip(NAMES, each, strict=True)
    ]
    return pd.DataFrame(rows, columns=tables.PREDICTIONS.names).astype({"rollout": "int32"})


def table(sources: dict[str, pd.DataFrame], annotations: Path) -> pd.DataFrame:
    options: dict[str, Any] = {"kind": "text", "annotations": annotations, "reference": "base"}
    return summary.summarise(sources, bootstrap=BOOTSTRAP, **options).set_index(["source", "statistic"])


def test_figures_and_differences(annotations: Path, tmp_path: Path) -> None:
    half = [[WORD], []] * 4
    sources = {"hr": predictions([[WORD]] * 8), "base": predictions(half), "tuned": predictions([[WORD, OTHER]] * 8)}
    found = table(sources, annotations)
    assert found.loc[("hr", "hmean"), "value"] == found.loc[("base", "precision"), "value"] == 1
    assert found.loc[("base", "recall"), ["value", "reference", "difference"]].tolist() == [0.5, 0.5, 0]
    row = found.loc[("tuned", "precision")]
    assert (row["value"], row["difference"], row["ci_low"], row["ci_high"]) == (0.5, -0.5, -0.5, -0.5)
    row = found.loc[("tuned", "recall")]  # eight photographs, each drawn into base's recall or not
    assert row["difference"] == 0.5 and 0.1 <= row["ci_low"] < 0.5 < row["ci_high"] <= 0.9
    assert (row["num_images"], row["num_rejected"], row["num_seeds"]) == (8, 0, 1) and np.isnan(row["seed_std"])
    path = tmp_path / "text.parquet"
    tables.write(found.reset_index(), path, tables.DOWNSTREAM)
    assert len(tables.read(path, tables.DOWNSTREAM)) == 9


def test_seeds_are_averaged(annotations: Path) -> None:
    base = predictions([[WORD]] * 8, [[WORD]] * 4 + [[]] * 4)
    found = table({"base": base, "tuned": predictions([[WORD]] * 8)}, annotations)
    row = found.loc[("base", "recall")]
    assert (row["value"], row["num_seeds"]) == (0.75, 2)
    assert row["seed_std"] == pytest.approx(0.5 / 2**0.5)
    assert found.loc[("tuned", "recall"), "difference"] == 0.25


def test_a_rejected_photograph_counts_for_no_source(annotations: Path) -> None:
    rejected = ("img_7",)
    base = predictions([[WORD]] * 4 + [[]] * 4, rejected=rejected)
    found = table({"base": base, "tuned": predictions([[WORD]] * 8, rejected=rejected)}, annotations)
    row = found.loc[("base", "recall")]
    assert (row["value"], row["num_images"], row["num_rejected"]) == (pytest.approx(4 / 7), 7, 1)


def test_sources_that_do_not_agree(annotations: Path) -> None:
    base = predictions([[WORD]] * 8)
    with pytest.raises(UserError, match="'tuned': photograph 'img_7' is not as in the others"):
        table({"base": base, "tuned": predictions([[WORD]] * 8, rejected=("img_7",))}, annotations)
    with pytest.raises(UserError, match="'tuned': photograph 'img_7'"):
        table({"base": base, "tuned": base[base["image_id"] != "img_7"]}, annotations)
    none = predictions([[WORD]] * 8, rejected=tuple(NAMES))
    with pytest.raises(UserError, match="no photograph that could be used"):
        table({"base": none}, annotations)


def test_equal_seeds_draw_equally() -> None:
    drawn = summary.draw(5, BOOTSTRAP)
    assert drawn.shape == (200, 5) and (drawn.sum(axis=1) == 5).all()
    assert np.array_equal(drawn, summary.draw(5, BOOTSTRAP))
    assert not np.array_equal(drawn, summary.draw(5, summary.Bootstrap(200, 0.95, 1)))
