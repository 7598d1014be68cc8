"""A made-up run: the tables, shards and command line that its report is made of."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dp2osr import config, tables
from dp2osr.metrics import METRICS

SCORED = ("fsim", "gmsd", "nlpd", "niqe", "psnr", "ssim", "piqe")
GROUPS = [f"{photo:016x}-{crop:03d}" for photo in range(4) for crop in range(2)]
M = 4


def scale_table() -> pd.DataFrame:
    """Return a scale [0, 1] for each group and metric."""
    return pd.DataFrame(
        [{"group_id": group, "metric": name, "min": 0.0, "max": 1.0} for group in GROUPS for name in sorted(SCORED)]
    )


def rewards_table(shift: float, seed: int) -> pd.DataFrame:
    """Return a wide rewards table whose aligned scores are raised by `shift`."""
    rng = np.random.default_rng(seed)
    size = len(GROUPS) * M
    frame = pd.DataFrame({"group_id": np.repeat(GROUPS, M), "rollout": np.tile(np.arange(M), len(GROUPS))})
    for name in SCORED:
        good = rng.uniform(0, 1, size) + shift
        frame[name] = 1 - good if METRICS[name].lower_better else good
        frame[f"{name}__norm"] = rng.uniform(0, 1, size)
    frame = frame.assign(fr=0.5, nr=0.5, reward=rng.uniform(0, 1, size), rank=0, status="ok")
    return frame.astype({"rollout": "int32", "rank": "int32"})


def evaluation_row(policy: str, statistic: str, m: int, reference: float, gain: float, **other: Any) -> dict[str, Any]:
    """Return a row of tables.EVALUATION with intervals of ±0.05; a gain of 0 has an interval of no width."""
    half = 0.05 if gain else 0.0
    row = {
        "policy": policy,
        "statistic": statistic,
        "m": m,
        "value": reference + gain,
        "value_low": reference + gain - 0.05,
        "value_high": reference + gain + 0.05,
        "reference": reference,
        "difference": gain,
        "ci_low": gain - half,
        "ci_high": gain + half,
        "in_reward": False,
        "higher_better": True,
        "num_groups": len(GROUPS),
        "num_photos": 4,
    }
    return row | other


def evaluation_table(*, gain: float = 0.3, policy: str = "default") -> pd.DataFrame:
    """Return an evaluation in which the worst candidate gains most, and piqe gets worse."""
    rows = []
    for name, share in (("base", 0.0), (policy, gain), ("blurred", -0.1)):
        for at, m in enumerate((1, 2, 4)):
            rows.append(evaluation_row(name, "mean_at_m", m, 0.5, share))
            rows.append(evaluation_row(name, "worst_at_m", m, 0.5 - 0.15 * at, 1.3 * share))
            rows.append(evaluation_row(name, "best_at_m", m, 0.5 + 0.15 * at, 0.7 * share))
        for statistic in ("fr", "nr", "win_rate", "std"):
            rows.append(evaluation_row(name, statistic, M, 0.5, share))
        for metric in SCORED:
            down = METRICS[metric].lower_better
            change = -share if down != (metric == "piqe") else share
            in_reward = metric in ("fsim", "gmsd", "nlpd", "niqe")
            extra = {"in_reward": in_reward, "higher_better": not down}
            rows.append(evaluation_row(name, metric, M, 0.4, change, **extra))
            rows.append(
                evaluation_row(name, metric + tables.STD, M, 0.1, -0.02, in_reward=in_reward, higher_better=False)
            )
    return pd.DataFrame(rows).astype({"m": "int32", "num_groups": "int32", "num_photos": "int32"})


def train_log(steps: int = 60) -> pd.DataFrame:
    """Return a log whose loss falls from log 2."""
    at = np.arange(1, steps + 1)
    wave = np.sin(at) * 0.02
    frame = pd.DataFrame({"step": at, "loss": 0.693 * np.exp(-at / 80) + wave, "implicit_accuracy": 0.5 + at / 200})
    frame["margin"], frame["abs_logit"] = at * 1e-5, at / 40
    frame["error_chosen"], frame["error_rejected"] = at * 1e-6, at * 1.2e-5
    frame["grad_norm"], frame["lr"], frame["num_pairs"], frame["pairs_per_second"] = 1 + wave, 1e-5, 64, 20.0
    return frame.astype({"step": "int32", "num_pairs": "int32"})


def validation_table(verdict: str = "ok") -> pd.DataFrame:
    """Return three checks; the last carries `verdict`."""
    frame = pd.DataFrame({"step": [0, 40, 80], "reward": [0.5, 0.7, 0.6], "fr": [0.5, 0.72, 0.7]})
    frame["nr"], frame["diversity"] = [0.5, 0.68, 0.5], [0.07, 0.06, 0.02]
    return frame.assign(best=[True, True, False], verdict=["ok", "ok", verdict]).astype({"step": "int32"})


def images_table() -> pd.DataFrame:
    """Return the images of GROUPS and one rejected file, whose names hold characters that HTML must escape."""
    rows = [
        {"image_id": group, "photo_id": group[:16], "source": f"photo <{group[15]}>.png", "status": "ok", "reason": ""}
        for group in GROUPS
    ]
    rows.append({**rows[0], "image_id": "f" * 16 + "-000", "status": "rejected", "reason": "<script>cannot be read"})
    frame = pd.DataFrame(rows).assign(sha256="0" * 64, split="test")
    for name in ("width", "height", "crop_x", "crop_y", "crop_size", "shard"):
        frame[name] = np.int32(0)
    return frame


def pairs_table() -> pd.DataFrame:
    """Return two pairs a group."""
    rows = [
        {"group_id": group, "chosen": 0, "rejected": 2 + at, "reward_chosen": 0.9, "reward_rejected": 0.2, "gap": 0.7}
        for group in GROUPS
        for at in range(2)
    ]
    frame = pd.DataFrame(rows).assign(w_intra=1.0, w_inter=1.0, weight=1.0)
    return frame.astype({"chosen": "int32", "rejected": "int32"})


def write_shards(folder: Path, *, size: int = 32) -> dict[str, Path]:
    """Write LR and candidate shards; return their paths by option."""
    import torch

    from dp2osr import shards

    generator = torch.Generator().manual_seed(0)
    samples, candidates = [], {"reference": [], "policy": []}
    ramp = torch.linspace(0, 1, size).expand(3, size, size)
    for at, group in enumerate(GROUPS):
        hr = (0.5 + 0.5 * torch.sin(ramp * (8 + 3 * at)) * ramp.transpose(1, 2)).clamp(0, 1)
        lr = torch.nn.functional.interpolate(hr[None], scale_factor=0.25, mode="area")[0]
        samples.append((group, {"hr.png": shards.encode_image(hr), "lr.png": shards.encode_image(lr), "json": b"{}"}))
        for side, noise in (("reference", 0.15), ("policy", 0.05)):
            for rollout in range(M):
                image = hr + noise * torch.randn(hr.shape, generator=generator)
                candidates[side].append((f"{group}-r{rollout:04d}", {"png": shards.encode_image(image)}))
    paths = {
        "lr": folder / "lr.tar",
        "candidates-reference": folder / "ref.tar",
        "candidates-policy": folder / "pol.tar",
    }
    shards.write_shard(paths["lr"], samples)
    shards.write_shard(paths["candidates-reference"], candidates["reference"])
    shards.write_shard(paths["candidates-policy"], candidates["policy"])
    return paths


def job(root: Path, **changes: Any) -> str:
    """Return the settings of the default run's report as JSON."""
    loaded = config.read(root / "config" / "config.yaml")
    found = {
        "name": "default",
        "run": loaded.runs["default"].model_dump(),
        "reward": loaded.rewards["default"].model_dump(),
        "tuned_on": loaded.rewards["default"].model_dump(),
        "evaluate": loaded.evaluate.model_dump(),
        "report": loaded.report.model_dump() | {"num_groups": 3},
    }
    return json.dumps(found | changes)


def write_run(folder: Path, *, verdict: str = "ok", size: int = 32) -> list[str]:
    """Write everything a report needs below `folder`; return the command line without --config and --report."""
    rewards = tables.rewards_schema(SCORED)
    for name, frame, schema in (
        ("pairs", pairs_table(), tables.PAIRS),
        ("train_log", train_log(), tables.TRAIN_LOG),
        ("validation", validation_table(verdict), tables.VALIDATION),
        ("evaluation", evaluation_table(), tables.EVALUATION),
        ("reference", rewards_table(0.0, 1), rewards),
        ("policy", rewards_table(0.3, 2), rewards),
        ("scales", scale_table(), tables.SCALES),
        ("images", images_table(), tables.IMAGES),
    ):
        made = {"fsim": "pyiqa 9.9, score 1"} if name == "evaluation" else None
        tables.write(frame, folder / f"{name}.parquet", schema, origins=made)
    (folder / "benchmarks").mkdir()
    (folder / "benchmarks" / "score-0000.tsv").write_text("s\th:m:s\tmax_rss\n12.5\t0:00:12\t310.2\n")
    (folder / "benchmarks" / "score-0001.tsv").write_text("s\th:m:s\tmax_rss\n7.5\t0:00:07\t-\n")
    (folder / "benchmarks" / "score-0002.tsv").touch()  # of a killed job
    argv = ["--pairs", f"{folder}/pairs.parquet", "--train-log", f"{folder}/train_log.parquet"]
    argv += ["--validation", f"{folder}/validation.parquet", "--benchmarks", f"{folder}/benchmarks"]
    for option, name in (
        ("evaluation", "evaluation"),
        ("rewards-reference", "reference"),
        ("rewards-policy", "policy"),
        ("scales", "scales"),
        ("images", "images"),
    ):
        argv += [f"--{option}", f"holdout={folder}/{name}.parquet"]
    for option, path in write_shards(folder, size=size).items():
        argv += [f"--{option}", f"holdout={path}"]
    return argv
