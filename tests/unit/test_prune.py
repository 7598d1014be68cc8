import json
from pathlib import Path

import pandas as pd

from dp2osr import tables
from dp2osr.shards import read_shard, write_shard
from dp2osr.stages import prune


def write_pairs(path: Path, rows: list[tuple[str, int, int]]) -> Path:
    frame = pd.DataFrame(rows, columns=["group_id", "chosen", "rejected"]).astype(
        {"chosen": "int32", "rejected": "int32"}
    )
    for name in tables.PAIRS.names[3:]:
        frame[name] = 1.0
    tables.write(frame, path, tables.PAIRS)
    return path


def test_what_any_run_selects_is_kept(tmp_path: Path) -> None:
    shards = []
    for shard in range(2):
        shards.append(tmp_path / f"shard-{shard}.tar")
        keys = [f"g{shard}-000-r{rollout:04d}" for rollout in range(5)]
        write_shard(shards[-1], [(key, {"png": key.encode() * 50, "json": b"{}"}) for key in keys])
    before = [path.stat() for path in shards]
    a = write_pairs(tmp_path / "a.parquet", [("g0-000", 0, 4), ("g0-000", 1, 4)])
    b = write_pairs(tmp_path / "b.parquet", [("g0-000", 0, 3)])
    summary = tmp_path / "pruned.json"
    command = ["--pairs", str(a), str(b), "--candidates", *map(str, shards), "--summary", str(summary)]
    prune.main(command)
    kept = [key for path in shards for key, _ in read_shard(path)]
    assert kept == [f"g0-000-r000{rollout}" for rollout in (0, 1, 3, 4)]
    assert [path.stat().st_mtime_ns for path in shards] == [stat.st_mtime_ns for stat in before]
    told = json.loads(summary.read_text())
    assert told == {"kept": 4, "bytes": sum(path.stat().st_size for path in shards)}
    assert told["bytes"] < sum(stat.st_size for stat in before)
    first = [path.read_bytes() for path in (*shards, summary)]
    prune.main(command)
    assert [path.read_bytes() for path in (*shards, summary)] == first
    assert not list(tmp_path.glob(".*"))
