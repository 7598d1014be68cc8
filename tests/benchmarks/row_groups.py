"""Row groups of a rewards table: time to write it, its size, and time to read one image of it or all.

python tests/benchmarks/row_groups.py --groups 30000 --rollouts 64
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dp2osr import tables

PAPER = ["lpips", "topiq_fr", "afine_fr", "maniqa", "musiq", "clipiqa+", "topiq_nr", "afine_nr", "qalign"]


def random_table(groups: int, rollouts: int) -> pa.Table:
    """Return a rewards table of random scores, sorted by group."""
    rng, schema = np.random.default_rng(0), tables.rewards_schema(PAPER)
    ids = pa.array([f"{number:016x}-000" for number in np.sort(rng.integers(0, 2**62, groups))])
    rows = np.repeat(np.arange(groups, dtype=np.int32), rollouts)
    columns: dict[str, pa.Array] = {}
    for field in schema:
        if field.name == "group_id":
            columns[field.name] = pa.DictionaryArray.from_arrays(pa.array(rows), ids).cast(pa.string())
        elif field.name == "status":
            columns[field.name] = pa.array(["ok"]).take(pa.array(np.zeros(len(rows), dtype=np.int64)))
        elif field.type == pa.int32():
            columns[field.name] = pa.array(np.tile(np.arange(rollouts, dtype=np.int32), groups))
        else:
            columns[field.name] = pa.array(rng.random(len(rows)))
    return pa.table(columns, schema=schema)


def seconds(action: Callable[[], Any]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=30000)
    parser.add_argument("--rollouts", type=int, default=64)
    args = parser.parse_args()
    table = random_table(args.groups, args.rollouts)
    one = table["group_id"][len(table) // 2].as_py()
    repeating = [field.name for field in table.schema if not pa.types.is_floating(field.type)]
    ways: dict[str, dict[str, Any]] = {"pyarrow's defaults": {}}
    for rows in (65536, 32768, tables.ROW_GROUP):
        ways[f"{rows:,}, all dictionary-encoded"] = {"row_group_size": rows}
        ways[f"{rows:,}, text and whole numbers"] = {"row_group_size": rows, "use_dictionary": repeating}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rewards.parquet"
        for name, options in ways.items():
            written = seconds(partial(pq.write_table, table, path, compression="zstd", **options))
            single = seconds(lambda: tables.load(path, groups=[one]))
            whole = seconds(lambda: pq.read_table(path, use_threads=False))
            footer = pq.read_metadata(path).serialized_size / 1024
            size = path.stat().st_size / 2**20
            print(f"{name}: written in {written:.1f} s, {size:.0f} MiB, footer {footer:.0f} KiB", end="; ")
            print(f"one image {1000 * single:.0f} ms, all {whole:.1f} s")


if __name__ == "__main__":
    main()
