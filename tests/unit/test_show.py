"""`dp2osr show` on each kind of table."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dp2osr import show, tables
from dp2osr.errors import UserError


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    """Return a score table of four groups whose scores rise with the group, one of them missing."""
    rows = [
        {"group_id": f"g{group}", "rollout": rollout, "metric": metric, "score": group + rollout / 10, "status": "ok"}
        for group in range(4)
        for rollout in range(3)
        for metric in ("psnr", "niqe")
    ]
    frame = pd.DataFrame(rows).astype({"rollout": "int32"})
    frame.loc[0, ["score", "status"]] = [np.nan, "nan"]
    tables.write(frame, tmp_path / "scores.parquet", tables.SCORES)
    return tmp_path / "scores.parquet"


def test_scores_by_metric_with_direction(scores: Path) -> None:
    text = show.summarise(scores, width=100, colour=False)
    assert "scores, 24 rows, 4 groups, 5 columns" in text
    assert "status: ok 23, nan 1" in text and "raw value of the metric" in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    at = lines.index("worst by mean psnr ↑ best by mean psnr ↑")
    assert lines[at + 1] == "g0 0.15 g3 3.1"
    at = lines.index("worst by mean niqe ↓ best by mean niqe ↓")
    assert lines[at + 1] == "g3 3.1 g0 0.1"
    assert any(line.startswith("psnr ↑ 0.1") and " 1 █" not in line for line in lines)


def test_table_is_known_by_columns_where_metadata_is_lost(scores: Path, tmp_path: Path) -> None:
    bare = pa.table({name: pq.read_table(scores)[name] for name in tables.SCORES.names})
    bare = bare.replace_schema_metadata(None)
    pq.write_table(bare, tmp_path / "bare.parquet")
    assert "bare.parquet: scores, 24 rows" in show.summarise(tmp_path / "bare.parquet", width=100, colour=False)


def test_any_other_parquet(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": [1.0, 2.0, np.nan], "b": ["x", "y", None], "c": [True, False, True]})
    frame.to_parquet(tmp_path / "other.parquet")
    text = show.summarise(tmp_path / "other.parquet", width=60, colour=False)
    assert "other.parquet: table, 3 rows, 3 columns" in text and "c: True 2, False 1" in text


def test_training_log_has_a_curve(tmp_path: Path) -> None:
    frame = pd.DataFrame({name: np.linspace(1, 0, 50) for name in tables.TRAIN_LOG.names})
    frame = frame.assign(step=range(1, 51), num_pairs=4).astype({"step": "int32", "num_pairs": "int32"})
    tables.write(frame, tmp_path / "log.parquet", tables.TRAIN_LOG)
    text = show.summarise(tmp_path / "log.parquet", width=100, colour=False)
    assert "█" in text and "over the steps" in text and "[nat]" in text


def test_empty_table(tmp_path: Path) -> None:
    frame = pd.DataFrame({field.name: pd.Series(dtype=field.type.to_pandas_dtype()) for field in tables.PAIRS})
    tables.write(frame, tmp_path / "pairs.parquet", tables.PAIRS)
    assert "pairs, 0 rows" in show.summarise(tmp_path / "pairs.parquet", width=100, colour=False)


def test_lines_fit_and_colour_is_for_terminals(scores: Path) -> None:
    text = show.summarise(scores, width=72, colour=False)
    columns = text[text.index("\ncolumns") : text.index("\nnumbers")]
    assert all(len(line) <= 72 for line in columns.splitlines())
    assert "\x1b[" not in text and "\x1b[1m" in show.summarise(scores, width=72, colour=True)


def test_no_parquet_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "no.parquet").write_text("text")
    for name, words in (("no.parquet", "no readable parquet"), ("gone.parquet", "not found")):
        with pytest.raises(UserError, match=words):
            show.summarise(tmp_path / name)


def test_bars_and_sparkline() -> None:
    assert show.bars([0, 1, 8]) == " ▁█" and show.bars([]) == ""
    assert show.sparkline([0, 0.5, 1]) == "▁▅█" and show.sparkline([2.0, 2.0]) == "▅▅"
    assert len(show.sparkline(list(range(1000)), 40)) == 40


def test_no_torch() -> None:
    code = "import sys, dp2osr.show; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
