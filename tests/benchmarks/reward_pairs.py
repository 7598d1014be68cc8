"""Time and memory of the reward and pairs stages on synthetic score tables, against the plain pandas way.

The two stages run as they do in the workflow, each in its own process, reading and writing included. The pandas way
(pivot, groupby-transform, a loop over groups) runs on a subset and its time is scaled to the full size.

    python tests/benchmarks/reward_pairs.py --groups 30000 --rollouts 64 --metrics 9
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from dp2osr import tables
from dp2osr.metrics import METRICS

PAPER = ["lpips", "topiq_fr", "afine_fr", "maniqa", "musiq", "clipiqa+", "topiq_nr", "afine_nr", "qalign"]


def names_of(count: int) -> list[str]:
    """Return the paper's nine metrics, or as many of all as wanted."""
    return [*PAPER, *(name for name in METRICS if name not in PAPER)][:count]


def write_scores(folder: Path, args: argparse.Namespace) -> dict[str, list[str]]:
    """Write long score tables, one a metric group, shard and block; return what the reward job needs to find them."""
    rng = np.random.default_rng(0)
    groups = np.array([f"{number:016x}-000" for number in rng.permutation(args.groups)], dtype=object)
    names = names_of(args.metrics)
    kinds = {kind: [name for name in names if METRICS[name].kind == kind] for kind in ("fr", "nr")}
    blocks = np.array_split(np.arange(args.rollouts), args.blocks)
    for kind, metrics in kinds.items():
        for shard, members in enumerate(np.array_split(groups, args.shards)):
            for block, rollouts in enumerate(blocks):
                size = len(members) * len(rollouts) * len(metrics)
                each = len(rollouts) * len(metrics)
                group = pa.DictionaryArray.from_arrays(np.repeat(np.arange(len(members)), each), pa.array(members))
                metric = pa.DictionaryArray.from_arrays(np.arange(size) % len(metrics), pa.array(metrics))
                columns = {
                    "group_id": group.cast(pa.string()),
                    "rollout": pa.array(np.tile(np.repeat(rollouts, len(metrics)), len(members)), pa.int32()),
                    "metric": metric.cast(pa.string()),
                    "score": pa.array(rng.random(size)),
                    "status": pa.array(["ok"]).take(pa.array(np.zeros(size, dtype=np.int64))),
                }
                path = folder / kind / f"shard-{shard:04d}.block-{block:03d}.parquet"
                path.parent.mkdir(parents=True, exist_ok=True)
                pq.write_table(pa.table(columns, schema=tables.SCORES), path, compression="zstd")
    return {
        "groups": list(kinds),
        "shards": [f"{shard:04d}" for shard in range(args.shards)],
        "blocks": [f"{block:03d}" for block in range(args.blocks)],
    }


def timed(stage: str, *options: str) -> tuple[float, float, float]:
    """Run a stage in its own process; return its seconds, its CPU seconds and its peak memory in GiB."""
    start = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", f"dp2osr.stages.{stage}", *options])
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{stage} failed")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def plain(scores: pd.DataFrame, job: dict, top: int) -> None:
    """Do both stages as one would in a notebook."""
    wide = scores.pivot_table(index=["group_id", "rollout"], columns="metric", values="score").reset_index()
    for name in (*job["fr"], *job["nr"]):
        aligned = -wide[name] if METRICS[name].lower_better else wide[name]
        wide[name + tables.NORM] = aligned.groupby(wide["group_id"]).transform(
            lambda score: (score - score.min()) / (score.max() - score.min())
        )
    fr = wide[[name + tables.NORM for name in job["fr"]]].mean(axis=1)
    nr = wide[[name + tables.NORM for name in job["nr"]]].mean(axis=1)
    wide["reward"] = job["weight_fr"] * fr + (1 - job["weight_fr"]) * nr
    rows = []
    for group, members in wide.groupby("group_id"):
        ordered = members.sort_values(["reward", "rollout"], ascending=[False, True])
        for _, winner in ordered.head(top).iterrows():
            for _, loser in ordered.tail(top).iterrows():
                gap = winner["reward"] - loser["reward"]
                rows.append((group, winner["rollout"], loser["rollout"], winner["reward"], loser["reward"], gap))
    assert len(pd.DataFrame(rows)) == top * top * wide["group_id"].nunique()


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("groups", 30000), ("rollouts", 64), ("metrics", 9), ("top", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--shards", type=int, default=300)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--subset", type=int, default=500, help="groups that the pandas way gets")
    args = parser.parse_args()
    names = names_of(args.metrics)
    sets = {kind: [name for name in names if METRICS[name].kind == kind] for kind in ("fr", "nr")}
    definition = {**sets, "weight_fr": 0.5, "num_rollouts": args.rollouts}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        found = write_scores(folder / "scores", args)
        rewards = str(folder / "rewards.parquet")
        job = {"reward": definition, "num_candidates": args.rollouts, **found}
        options = ["--scores", str(folder / "scores"), "--rewards", rewards, "--scales", str(folder / "scales.parquet")]
        seconds_r, cpu_r, memory_r = timed("reward", *options, "--config", json.dumps(job))
        pairs = {"selection": "reward", "top": args.top, "min_gap": 0, "max_pairs_per_group": 0, "weights": "both"}
        options = ["--rewards", rewards, "--pairs", str(folder / "pairs.parquet")]
        seconds_p, cpu_p, memory_p = timed("pairs", *options, "--config", json.dumps({"pairs": pairs, "seed": 0}))
        files = sorted((folder / "scores").rglob("*.parquet"))
        scores = pd.concat([pd.read_parquet(path) for path in files if path.name < "shard-0010"], ignore_index=True)
        subset = scores["group_id"].unique()[: args.subset]
        start = time.perf_counter()
        plain(scores[scores["group_id"].isin(subset)], definition, args.top)
        seconds_plain = (time.perf_counter() - start) * args.groups / len(subset)
    print(f"{args.groups * args.rollouts:,} candidates x {args.metrics} metrics in {len(files)} files")
    print(f"reward: {seconds_r:.1f} s ({cpu_r:.1f} s of CPU), {memory_r:.2f} GiB peak")
    print(f"pairs:  {seconds_p:.1f} s ({cpu_p:.1f} s of CPU), {memory_p:.2f} GiB peak")
    print(
        f"both:   {seconds_r + seconds_p:.1f} s; plain pandas, scaled from {len(subset)} groups: {seconds_plain:.0f} s"
    )
    print(f"ratio:  {seconds_plain / (seconds_r + seconds_p):.1f}")


if __name__ == "__main__":
    main()
