"""Reading some columns of a table, for the two stages whose tables have tens of millions of cells."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dp2osr import tables
from dp2osr.errors import UserError
from dp2osr.metrics import METRICS


def read_columns(
    path: Path | str, columns: Sequence[str], *, schema: pa.Schema | None = None, encoded: Sequence[str] = ()
) -> pa.Table:
    """Read `columns` of a table whose whole schema is checked; `encoded` text columns come as dictionary arrays.

    schema: what the file must hold; None is a rewards table, whose metrics are those of its normalised columns.
    """
    if not Path(path).is_file():
        raise UserError(f"table {path}: not found")
    try:
        with pq.ParquetFile(path, read_dictionary=list(encoded)) as file:
            found = _plain(file.schema_arrow)
            tables.check(found, rewards_schema(found, path) if schema is None else schema, path)
            return file.read(columns=list(columns), use_threads=False)
    except pa.ArrowInvalid as error:
        raise UserError(f"table {path}: no readable parquet file ({error})") from None


def rewards_schema(found: pa.Schema, path: Path | str) -> pa.Schema:
    """Return the rewards schema that a file with these columns should have."""
    metrics = [name.removesuffix(tables.NORM) for name in found.names if name.endswith(tables.NORM)]
    if unknown := [name for name in metrics if name not in METRICS]:
        raise UserError(f"table {path}: unknown metric '{unknown[0]}'")
    return tables.rewards_schema(metrics)


def _plain(schema: pa.Schema) -> pa.Schema:
    """Return the schema with dictionary columns as what they encode."""
    fields = [f.with_type(f.type.value_type) if pa.types.is_dictionary(f.type) else f for f in schema]
    return pa.schema(fields)
