"""A small training on random data: files as the stages write them, and the objects that train on them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml

from dp2osr import shards, tables
from dp2osr.config import PolicySettings, TrainSettings
from dp2osr.models.backend import Backend, load_backend, read_embeddings, write_embeddings
from dp2osr.training.pack import FIELD, Pack, dump_group
from dp2osr.training.step import Feed

DEFAULTS = yaml.safe_load((Path(__file__).parents[1] / "config" / "config.yaml").read_text())
GROUPS = tuple(f"{index:016x}-000" for index in range(4))
SIZE, SCALE, TEXT = 32, 4, 16
LENIENT = {"patience": 99, "min_diversity": 0.0, "max_reward_drop": 99.0}  # a guard that measures and never stops


def train_settings(**changes: Any) -> TrainSettings:
    """Return the defaults on a small scale, without guard, tracker and warm-up, with `changes`."""
    small = {"steps": 4, "groups_per_step": 2, "pairs_per_step": 3, "warmup_steps": 0, "checkpoint_every": 2}
    base = DEFAULTS["run_defaults"]["train"] | small | {"tracker": "none", "learning_rate": 1e-3}
    guard = base["guard"] | {"every": 0, "num_rollouts": 2} | changes.pop("guard", {})
    return TrainSettings(**{**base, **changes, "guard": guard})


def policy_settings(model: Path, **sampling: Any) -> PolicySettings:
    """Return the tiny model, of whichever backend, as a policy that is sampled in two steps."""
    flow = is_flow(model)
    base = DEFAULTS["policy_defaults"] | {"backend": "flux" if flow else "sd"}
    quick = base["sampling"] | {"steps": 2, "guidance": 1.0} | sampling
    if flow:
        quick["scheduler"] = "FlowMatchEulerDiscreteScheduler"
    return PolicySettings(**{**base, "model": str(model), "control": str(model / "controlnet"), "sampling": quick})


def is_flow(model: Path) -> bool:
    """Return whether a model folder is in FLUX's layout."""
    return (model / "transformer").is_dir()


def make_pairs(groups: tuple[str, ...] = GROUPS, *, top: int = 2) -> pd.DataFrame:
    """Return rows of tables.PAIRS: winners 0..top-1, losers 4.., weights about 1; the last group lacks a pair."""
    rows = [
        {"group_id": group, "chosen": winner, "rejected": 4 + loser, "weight": 1 + 0.1 * winner - 0.1 * loser}
        for group in groups
        for winner in range(top)
        for loser in range(top)
    ]
    frame = pd.DataFrame(rows[:-1]).astype({"chosen": np.int32, "rejected": np.int32})
    rewards = {"reward_chosen": 0.7, "reward_rejected": 0.3, "gap": 0.4, "w_intra": 1.0, "w_inter": 1.0}
    return frame.assign(**rewards)


def write_files(folder: Path, *, flow: bool = False, validation: int = 2) -> dict[str, Path]:
    """Write pairs, encoded shards, embeddings, LR images and scales; return their paths by name.

    flow: as the flow model takes them: latents as control, pooled embeddings. validation: number of LR images.
    """
    generator = torch.Generator().manual_seed(7)
    paths = {name: folder / name for name in ("pairs.parquet", "shard-0.tar", "shard-1.tar", "lr.tar")}
    paths |= {name: folder / name for name in ("embeddings.safetensors", "scales.parquet")}
    tables.write(make_pairs(), paths["pairs.parquet"], tables.PAIRS)
    samples = []
    for group in GROUPS:
        latents = torch.randn(8, 4, SIZE // 2, SIZE // 2, generator=generator)
        control = torch.rand(*((4, SIZE // 2, SIZE // 2) if flow else (3, SIZE, SIZE)), generator=generator)
        samples.append((group, {FIELD: dump_group(latents, range(8), control=control)}))
    shards.write_shard(paths["shard-0.tar"], samples[:1])
    shards.write_shard(paths["shard-1.tar"], samples[1:])
    embed = {"prompt_embeds": torch.randn(2, 77, TEXT, generator=generator)}
    negative = {"prompt_embeds": torch.randn(1, 77, TEXT, generator=generator)}
    if flow:
        embed["pooled"], negative["pooled"] = (torch.randn(count, TEXT, generator=generator) for count in (2, 1))
    write_embeddings(paths["embeddings.safetensors"], GROUPS, ["a", "a", "b", "b"], embed, negative)
    images = []
    for group in GROUPS[:validation]:
        hr = torch.rand(3, SIZE, SIZE, generator=generator)
        lr = torch.nn.functional.avg_pool2d(hr, SCALE)
        images.append((group, {"hr.png": shards.encode_image(hr), "lr.png": shards.encode_image(lr), "json": b"{}"}))
    shards.write_shard(paths["lr.tar"], images)
    rows = [
        {"group_id": group, "metric": metric, "min": low, "max": high}
        for group in GROUPS[:validation]
        for metric, low, high in (("psnr", 4.0, 8.0), ("entropy", 5.0, 8.0))
    ]
    tables.write(pd.DataFrame(rows), paths["scales.parquet"], tables.SCALES)
    return paths


def make_backend(model: Path) -> Backend:
    """Return the tiny model on the CPU, without its text encoder."""
    return load_backend(policy_settings(model), device=torch.device("cpu"), parts=frozenset({"backbone", "vae"}))


def make_feed(paths: dict[str, Path], backend: Backend) -> Feed:
    """Return the source of training images of `write_files`."""
    pack = Pack([paths["shard-0.tar"], paths["shard-1.tar"]], backend.prepare_control)
    return Feed(
        pack=pack,
        embeddings=read_embeddings(paths["embeddings.safetensors"])[0],
        backend=backend,
        timestep_density="uniform",
    )


def command(model: Path, folder: Path, output: Path, *, validation: int = 2, **changes: Any) -> list[str]:
    """Return the arguments of a train stage with guard, its inputs in `folder`, its outputs in `output`.

    validation: number of the guard's images. changes: to the train settings, `sampling` to the policy's.
    """
    paths = write_files(folder, flow=is_flow(model), validation=validation)
    sampling = changes.pop("sampling", {})
    job = {
        "run": "test",
        "policy": policy_settings(model, **sampling).model_dump(),
        "train": train_settings(**changes).model_dump(),
        "reward": DEFAULTS["rewards"]["default"] | {"fr": ["psnr"], "nr": ["entropy"]},
        "niqe_block": 32,
        "seed": 1,
        "base_seed": 0,
    }
    inputs = ["--pairs", paths["pairs.parquet"], "--encoded", paths["shard-0.tar"], paths["shard-1.tar"]]
    inputs += ["--embeddings", paths["embeddings.safetensors"], "--reference", model / "controlnet"]
    inputs += ["--val-lr", paths["lr.tar"], "--val-embeddings", paths["embeddings.safetensors"]]
    inputs += ["--val-scales", paths["scales.parquet"], "--device", "cpu", "--config", json.dumps(job)]
    outputs = ["--policy", output / "policy", "--train-log", output / "train_log.parquet"]
    return [str(part) for part in (*inputs, *outputs, "--validation", output / "validation.parquet")]
