"""From prompts to a policy on either backend, by the stages' command lines; what comes out loads in diffusers."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

import tiny_shards
from dp2osr import resume, tables
from dp2osr.config import PolicySettings, TrainSettings
from dp2osr.models.backend import load_backend
from dp2osr.stages import embed, encode, pairs, reward, rollout, score, train
from dp2osr.training.batches import Schedule
from training_rig import DEFAULTS, train_settings

GROUPS = tiny_shards.names(4)
WEIGHTS = "diffusion_pytorch_model.safetensors"
BRANCHES: dict[str, Any] = {"sd": diffusers.ControlNetModel, "flux": diffusers.FluxControlNetModel}
SAMPLING: dict[str, dict[str, Any]] = {
    "sd": {"guidance": 2.0, "negative_prompt": "blur"},
    "flux": {"scheduler": "FlowMatchEulerDiscreteScheduler", "guidance": 2.5, "text_tokens": 16},
}
REWARD = {"fr": ["psnr"], "nr": ["entropy"], "weight_fr": 0.5, "num_rollouts": 6}
SEED = 1
FILES = {
    **{name: f"{name}.parquet" for name in ("prompts", "rewards", "scales", "pairs", "train-log", "validation")},
    **{"lr": "lr.tar", "embeddings": "embeddings.safetensors", "candidates": "candidates.tar"},
    **{"encoded": "encoded.tar", "policy": "policy"},
}


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """Let each training choose its precision: accelerate keeps the first for the whole process."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def settings_of(kind: str, model: Path, config_dict: dict[str, Any], dtype: str) -> PolicySettings:
    config_dict["policy_defaults"] |= {"backend": kind, "native_size": 32}
    found: PolicySettings = tiny_shards.policy(config_dict, model, dtype=dtype, **SAMPLING[kind])
    return found


def run_stages(folder: Path, policy: PolicySettings, *, control: Path, training: TrainSettings) -> None:
    """Go from LR images and prompts to a tuned policy, all in a folder."""
    settings, device = policy.model_dump(), ["--device", "cpu"]
    tiny_shards.write_lr(folder / FILES["lr"], GROUPS)
    prompts = pd.DataFrame({"group_id": GROUPS, "prompt": ["a cat", "", "a cat", "leaves"], "status": "ok"})
    tables.write(prompts, folder / FILES["prompts"], tables.PROMPTS)

    def arguments(job: Any, *names: str) -> list[str]:
        paths = [part for name in names for part in (f"--{name}", str(folder / FILES[name]))]
        return [*paths, "--config", json.dumps(job)]

    embed.main([*arguments(settings, "prompts", "embeddings"), *device])
    job: dict[str, Any] = {"policy": settings, "seed": 7, "first": 0, "count": 6, "scale": 4, "image_format": "png"}
    sampled = ["--control", str(control), "--batch-size", "5", *tiny_shards.speed(), *device]
    rollout.main([*arguments(job, "lr", "embeddings", "candidates"), *sampled])
    job = {"metrics": ["psnr", "entropy"], "niqe_block": 32}
    table = folder / "scores" / "light" / "shard-0000.block-000.parquet"
    score.main([*arguments(job, "candidates", "lr"), "--scores", str(table), *device])
    cut = {"groups": ["light"], "shards": ["0000"], "blocks": ["000"], "num_candidates": 6}
    reward.main([*arguments({"reward": REWARD, **cut}, "rewards", "scales"), "--scores", str(folder / "scores")])
    pairs.main(arguments({"pairs": DEFAULTS["run_defaults"]["pairs"] | {"top": 2}, "seed": SEED}, "rewards", "pairs"))
    encode.main([*arguments(settings, "pairs", "candidates", "lr", "encoded"), *device])
    job = {"run": "test", "policy": settings, "train": training.model_dump(), "reward": REWARD}
    job |= {"niqe_block": 32, "seed": SEED, "base_seed": 0}
    files = arguments(job, "pairs", "encoded", "embeddings", "policy", "train-log", "validation")
    train.main([*files, "--reference", str(control), *device])


CASES = [("sd", "float32", "logit_normal"), ("flux", "float32", "uniform"), ("flux", "bfloat16", "uniform")]


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize(("kind", "dtype", "density"), CASES)
def test_from_prompts_to_a_policy_that_diffusers_loads(
    kind: str,
    dtype: str,
    density: str,
    tiny_model: Path,
    tiny_flux: Path,
    tmp_path: Path,
    config_dict: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """bfloat16: of the networks, and of accelerate's mixed precision in training, as config/c-flux.yaml has it."""
    model = tiny_flux if kind == "flux" else tiny_model
    policy, before = settings_of(kind, model, config_dict, dtype), resume.fingerprint(model)
    control = tmp_path / "control" / "model.safetensors"
    control.parent.mkdir()
    published = load_file(model / "controlnet" / WEIGHTS)
    save_file(published, control)
    trainers: list[Any] = []
    make = train.make_trainer
    monkeypatch.setattr(train, "make_trainer", lambda *found: trainers.append(make(*found)) or trainers[0])
    mixed = {"precision": "bf16" if dtype == "bfloat16" else "no", "gradient_checkpointing": True}
    training = train_settings(timestep_density=density, learning_rate=1e-4, **mixed)
    run_stages(tmp_path, policy, control=control, training=training)
    check_log(tmp_path, training)
    start = {name: tensor.to(getattr(torch, dtype)).float() for name, tensor in published.items()}
    (trainer,) = trainers
    assert same(trainer.reference.state_dict(), start)
    fresh = load_backend(policy, device=torch.device("cpu"), parts=frozenset({"backbone"}))
    assert same(trainer.feed.backend.backbone.state_dict(), fresh.backbone.state_dict())
    assert {parameter.dtype for parameter in fresh.backbone.parameters()} == {getattr(torch, dtype)}
    assert resume.fingerprint(model) == before and same(load_file(control), published)
    tuned = BRANCHES[kind].from_pretrained(tmp_path / "policy").state_dict()
    assert all(tensor.isfinite().all() and tensor.dtype == torch.float32 for tensor in tuned.values())
    assert tuned.keys() == start.keys() and not same(tuned, start)


def check_log(folder: Path, training: TrainSettings) -> None:
    """The policy starts as the reference, |z| = 0 and the loss log 2 times the weights; then it moves."""
    log = tables.read(folder / FILES["train-log"], tables.TRAIN_LOG)
    table = tables.read(folder / FILES["pairs"], tables.PAIRS)
    assert table["weight"].nunique() > 1 and set(table["group_id"]) == set(GROUPS)
    first = [weight for unit in Schedule(table, settings=training, seed=SEED).step(1) for weight in unit.weights]
    assert log["loss"][0] == pytest.approx(math.log(2) * np.mean(first), rel=1e-5)
    assert log["abs_logit"][0] == 0 and (log["abs_logit"][1:] > 0).all()
    assert np.isfinite(log.select_dtypes("number")).all(axis=None) and (log["grad_norm"] > 0).all()


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts hold the same bits."""
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in found)
