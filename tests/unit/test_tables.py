"""Tables: the schema is checked on every read and write, and travels with the file."""

import math
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dp2osr import tables
from dp2osr.errors import UserError

SCHEMAS = {name: value for name, value in vars(tables).items() if isinstance(value, pa.Schema)}
SCHEMAS["REWARDS"] = tables.rewards_schema(["fsim", "gmsd", "niqe"])


def scores() -> pd.DataFrame:
    """Return a small table, its rows out of order."""
    rows = [
        ("b-000", 1, "psnr", 20.5, "ok"),
        ("b-000", 0, "psnr", math.nan, "nan"),
        ("a-000", 0, "ssim", 0.5, "ok"),
    ]
    return pd.DataFrame(rows, columns=tables.SCORES.names)


def write_arrow(path: Path, columns: dict[str, pa.Array]) -> Path:
    """Write a parquet file without any check."""
    pq.write_table(pa.table(columns), path)
    return path


def columns() -> dict[str, pa.Array]:
    """Return the columns of a correct scores table."""
    table = pa.Table.from_pandas(scores(), schema=tables.SCORES, preserve_index=False)
    return dict(zip(table.column_names, table.columns, strict=True))


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_column_says_what_it_is(name: str) -> None:
    schema = SCHEMAS[name]
    assert set(tables.keys(schema)) <= set(schema.names)
    for field in schema:
        assert field.metadata[b"description"], field.name


@pytest.mark.parametrize("name", SCHEMAS)
def test_an_empty_table_of_each_schema_is_read_back(name: str, tmp_path: Path) -> None:
    frame = SCHEMAS[name].empty_table().to_pandas()
    tables.write(frame, tmp_path / "t.parquet", SCHEMAS[name])
    assert tables.read(tmp_path / "t.parquet", SCHEMAS[name]).empty


def test_rows_are_sorted_by_key_and_values_are_kept(tmp_path: Path) -> None:
    tables.write(scores(), tmp_path / "s.parquet", tables.SCORES)
    found = tables.read(tmp_path / "s.parquet", tables.SCORES)
    wanted = scores().sort_values(["group_id", "rollout", "metric"], ignore_index=True)
    pd.testing.assert_frame_equal(found, wanted, check_dtype=False)


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    tables.write(scores(), tmp_path / "a.parquet", tables.SCORES)
    tables.write(scores().iloc[::-1], tmp_path / "b.parquet", tables.SCORES)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_unit_and_direction_are_in_the_file(tmp_path: Path) -> None:
    schema = SCHEMAS["REWARDS"]
    tables.write(schema.empty_table().to_pandas(), tmp_path / "r.parquet", schema)
    found = pq.read_schema(tmp_path / "r.parquet")
    assert found.metadata[b"table"] == b"rewards"
    assert b"lower is better" in found.field("gmsd").metadata[b"description"]
    assert b"higher is better" in found.field("fsim").metadata[b"description"]
    assert found.field("gmsd__norm").metadata[b"range"] == b"[0, 1]"


def test_a_missing_column_is_named_with_the_file(tmp_path: Path) -> None:
    found = columns()
    del found["metric"]
    path = write_arrow(tmp_path / "s.parquet", found)
    with pytest.raises(UserError, match=r"s\.parquet.*'metric' is missing"):
        tables.read(path, tables.SCORES)


def test_a_wrong_type_is_named_with_the_one_wanted(tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "s.parquet", columns() | {"score": columns()["score"].cast(pa.float32())})
    with pytest.raises(UserError, match=r"s\.parquet.*'score' is float, wanted double"):
        tables.read(path, tables.SCORES)


def test_an_unknown_column_is_named(tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "s.parquet", columns() | {"extra": columns()["score"]})
    with pytest.raises(UserError, match="'extra'"):
        tables.read(path, tables.SCORES)


def test_the_order_of_columns_does_not_matter(tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "s.parquet", dict(reversed(columns().items())))
    assert list(tables.read(path, tables.SCORES).columns) == tables.SCORES.names


@pytest.mark.parametrize("data", [b"", b"not a table", b"PAR1" * 3])
def test_a_file_that_is_no_table(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "s.parquet"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"s\.parquet"):
        tables.read(path, tables.SCORES)


def test_a_truncated_table(tmp_path: Path) -> None:
    path = tmp_path / "s.parquet"
    tables.write(scores(), path, tables.SCORES)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"s\.parquet"):
        tables.read(path, tables.SCORES)


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"s\.parquet: not found"):
        tables.read(tmp_path / "s.parquet", tables.SCORES)


def test_writing_checks_names_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'score' is missing"):
        tables.write(scores().drop(columns="score"), tmp_path / "s.parquet", tables.SCORES)
    assert list(tmp_path.iterdir()) == []


def test_writing_checks_types_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises((pa.ArrowInvalid, pa.ArrowTypeError, ValueError)):
        tables.write(scores().assign(rollout="first"), tmp_path / "s.parquet", tables.SCORES)
    assert list(tmp_path.iterdir()) == []


def test_rewards_are_read_with_the_metrics_that_the_file_holds(tmp_path: Path) -> None:
    schema = tables.rewards_schema(["clipiqa+", "psnr"])
    frame = pd.DataFrame({name: [0] for name in schema.names}).assign(group_id="a-000", status="ok")
    tables.write(frame, tmp_path / "r.parquet", schema)
    assert list(tables.read_rewards(tmp_path / "r.parquet").columns) == schema.names


def test_rewards_with_an_unknown_metric(tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "r.parquet", {"group_id": pa.array(["a"]), "fsmi__norm": pa.array([0.5])})
    with pytest.raises(UserError, match="'fsmi'"):
        tables.read_rewards(path)


def test_many_tables_are_joined_in_their_order(tmp_path: Path) -> None:
    frame = scores().sort_values(["group_id", "rollout"], ignore_index=True)
    for i in range(len(frame)):
        tables.write(frame.iloc[[i]], tmp_path / f"{i}.parquet", tables.SCORES)
    found = tables.read_many([tmp_path / f"{i}.parquet" for i in range(len(frame))], tables.SCORES)
    pd.testing.assert_frame_equal(found, frame, check_dtype=False)
    with pytest.raises(UserError, match="scores"):
        tables.read_many([], tables.SCORES)
