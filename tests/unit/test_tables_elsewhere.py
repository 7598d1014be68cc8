"""A rewards table as written here, opened by pandas, polars and DuckDB: types, notes, one group without the rest."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from dp2osr import tables

METRICS = ["psnr", "lpips", "clipiqa+"]
GROUPS = [f"{number:016x}-000" for number in range(900)]
M = 64
ONE = GROUPS[450]


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a table of 57,600 candidates, its rows out of order before they were written."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {"group_id": np.repeat(GROUPS, M), "rollout": np.tile(np.arange(M, dtype=np.int32), len(GROUPS))}
    )
    for name in (*METRICS, *(name + tables.NORM for name in METRICS), "fr", "nr", "reward"):
        frame[name] = rng.random(len(frame))
    frame.loc[frame["rollout"] == 3, "reward"] = np.nan
    frame = frame.assign(rank=frame["rollout"], status="ok").sample(frac=1, random_state=0)
    path = tmp_path_factory.mktemp("tables") / "default.parquet"
    tables.write(frame, path, tables.rewards_schema(METRICS))
    return path


@pytest.fixture(scope="module")
def damaged(rewards: Path) -> Path:
    """Return a copy in which the data of all row groups but that of ONE are zeros: whoever reads them fails."""
    data, metadata = bytearray(rewards.read_bytes()), pq.read_metadata(rewards)
    spared = 0
    for number in range(metadata.num_row_groups):
        part = metadata.row_group(number)
        span = part.column(0).statistics
        if span.min <= ONE <= span.max:
            spared += 1
            continue
        for at in range(part.num_columns):
            column = part.column(at)
            start = column.dictionary_page_offset or column.data_page_offset
            data[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    assert spared == 1 < metadata.num_row_groups
    path = rewards.with_name("damaged.parquet")
    path.write_bytes(data)
    with pytest.raises(Exception, match=r"damaged|Corrupt|Couldn't deserialize|Unexpected"):
        tables.read_rewards(path)
    return path


def test_pandas(rewards: Path, damaged: Path) -> None:
    frame = pd.read_parquet(rewards)
    assert frame["rollout"].dtype == np.int32 and frame["clipiqa+__norm"].dtype == np.float64
    assert pd.api.types.is_string_dtype(frame["group_id"]) and len(frame) == len(GROUPS) * M
    assert frame["reward"].isna().sum() == len(GROUPS)  # a candidate without a reward
    assert frame["group_id"].is_monotonic_increasing
    one = pd.read_parquet(damaged, filters=[("group_id", "==", ONE)])
    pd.testing.assert_frame_equal(one, frame[frame["group_id"] == ONE].reset_index(drop=True))


def test_polars(rewards: Path, damaged: Path) -> None:
    polars = pytest.importorskip("polars")
    assert polars.read_parquet_schema(rewards)["rollout"] == polars.Int32
    assert polars.read_parquet_schema(rewards)["reward"] == polars.Float64
    notes = json.loads(polars.read_parquet_metadata(rewards)["columns"])
    assert notes["lpips"]["description"] == "raw score ↓, lower is better" and notes["reward"]["range"] == "[0, 1]"
    one = polars.scan_parquet(damaged).filter(polars.col("group_id") == ONE).sort("rollout").collect()
    wanted = pd.read_parquet(rewards, filters=[("group_id", "==", ONE)])
    assert one["clipiqa+"].to_list() == wanted["clipiqa+"].to_list() and len(one) == M


def test_duckdb(rewards: Path, damaged: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    with duckdb.connect() as base:
        described = base.execute(f"DESCRIBE SELECT * FROM '{rewards}'").fetchall()
        kinds = {name: kind for name, kind, *_ in described}
        assert (kinds["group_id"], kinds["rank"], kinds["lpips__norm"]) == ("VARCHAR", "INTEGER", "DOUBLE")
        query = f"SELECT decode(value) FROM parquet_kv_metadata('{rewards}') WHERE decode(key) = 'columns'"
        assert json.loads(base.execute(query).fetchone()[0])["psnr"]["range"] == "[0.0, ∞]"
        found = base.execute(
            f"SELECT \"clipiqa+\" FROM '{damaged}' WHERE group_id = '{ONE}' ORDER BY rollout"
        ).fetchall()
        wanted = pd.read_parquet(rewards, filters=[("group_id", "==", ONE)])
        assert [value for (value,) in found] == wanted["clipiqa+"].to_list()


def test_our_own_reader(rewards: Path, damaged: Path) -> None:
    found = tables.read_rewards(damaged, groups=[ONE])
    assert len(found) == M and set(found["group_id"]) == {ONE}
    assert tables.read_rewards(rewards, groups=[]).empty
    several = tables.read_rewards(rewards, groups={GROUPS[899], GROUPS[0], "nobody"})
    assert list(several["group_id"].unique()) == [GROUPS[0], GROUPS[899]]


def test_notes_of_the_fields_are_those_of_the_file(rewards: Path) -> None:
    schema = pq.read_schema(rewards)
    notes = json.loads(schema.metadata[b"columns"])
    assert list(notes) == schema.names
    for field in schema:
        assert {
            key.decode(): text.decode() for key, text in field.metadata.items() if key != b"PARQUET:field_id"
        } == notes[field.name]
