"""Embed, rollout, encode and train on either backend, from their command lines; what comes out loads in diffusers."""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_shards
from dp2osr import resume, tables
from dp2osr.stages import embed, encode, rollout, train
from training_rig import DEFAULTS, make_pairs, train_settings

GROUPS = tiny_shards.names(4)
WEIGHTS = "diffusion_pytorch_model.safetensors"
FLUX = {"scheduler": "FlowMatchEulerDiscreteScheduler", "guidance": 2.5, "text_tokens": 16}


def settings_of(kind: str, model: Path, config_dict: dict[str, Any]) -> Any:
    config_dict["policy_defaults"] |= {"backend": kind, "native_size": 32}
    sampling = FLUX if kind == "flux" else {"guidance": 2.0, "negative_prompt": "blur"}
    return tiny_shards.policy(config_dict, model, **sampling)


def run_stages(folder: Path, policy: Any, *, control: Path, density: str) -> Path:
    """Go from LR images and prompts to a tuned policy; return its folder."""
    tiny_shards.write_lr(folder / "lr.tar", GROUPS)
    rows = {"group_id": GROUPS, "prompt": ["a cat", "", "a cat", "leaves"], "status": "ok"}
    tables.write(pd.DataFrame(rows), folder / "prompts.parquet", tables.PROMPTS)
    tables.write(make_pairs(tuple(GROUPS)), folder / "pairs.parquet", tables.PAIRS)
    paths = {name: str(folder / name) for name in ("lr.tar", "prompts.parquet", "pairs.parquet", "encoded.tar")}
    paths |= {name: str(folder / name) for name in ("embeddings.safetensors", "candidates.tar")}
    common = ["--device", "cpu"]
    text = ["--prompts", paths["prompts.parquet"], "--embeddings", paths["embeddings.safetensors"]]
    embed.main([*text, *common, "--config", policy.model_dump_json()])
    job = {"policy": policy.model_dump(), "seed": 7, "first": 0, "count": 6, "scale": 4, "image_format": "png"}
    inputs = ["--lr", paths["lr.tar"], "--embeddings", paths["embeddings.safetensors"], "--control", str(control)]
    sampled = ["--batch-size", "5", "--candidates", paths["candidates.tar"]]
    rollout.main([*inputs, *sampled, *common, "--config", json.dumps(job)])
    inputs = ["--pairs", paths["pairs.parquet"], "--candidates", paths["candidates.tar"], "--lr", paths["lr.tar"]]
    encode.main([*inputs, "--encoded", paths["encoded.tar"], *common, "--config", policy.model_dump_json()])
    training = train_settings(timestep_density=density, gradient_checkpointing=True, learning_rate=1e-4)
    job = {
        "run": "test",
        "policy": policy.model_dump(),
        "train": training.model_dump(),
        "reward": DEFAULTS["rewards"]["default"],
        "niqe_block": 32,
        "seed": 1,
        "base_seed": 0,
    }
    inputs = ["--pairs", paths["pairs.parquet"], "--encoded", paths["encoded.tar"], "--reference", str(control)]
    outputs = [str(folder / name) for name in ("policy", "train_log.parquet", "validation.parquet")]
    named = [part for pair in zip(("--policy", "--train-log", "--validation"), outputs, strict=True) for part in pair]
    arguments = [*inputs, "--embeddings", paths["embeddings.safetensors"], *named]
    train.main([*arguments, *common, "--config", json.dumps(job)])
    return folder / "policy"


@pytest.mark.parametrize(("kind", "density"), [("sd", "logit_normal"), ("flux", "uniform")])
def test_from_prompts_to_a_policy_that_diffusers_loads(
    kind: str,
    density: str,
    tiny_model: Path,
    tiny_flux: Path,
    tmp_path: Path,
    config_dict: dict[str, Any],
) -> None:
    model = tiny_flux if kind == "flux" else tiny_model
    policy = settings_of(kind, model, config_dict)
    before = resume.fingerprint(model)
    control = tmp_path / "control" / "model.safetensors"
    control.parent.mkdir()
    reference = load_file(model / "controlnet" / WEIGHTS)
    save_file(reference, control)
    tuned = run_stages(tmp_path, policy, control=control, density=density)
    log = tables.read(tmp_path / "train_log.parquet", tables.TRAIN_LOG)
    weights = make_pairs(tuple(GROUPS))["weight"]
    assert log["abs_logit"].iloc[0] == 0 and (log["abs_logit"].iloc[1:] > 0).all()  # it starts as the reference
    assert log["loss"].iloc[0] == pytest.approx(np.log(2) * weights.mean(), rel=0.2)
    assert log["loss"].map(np.isfinite).all() and (log["grad_norm"] > 0).all()
    branch = diffusers.FluxControlNetModel if kind == "flux" else diffusers.ControlNetModel
    found = branch.from_pretrained(tuned).state_dict()
    assert found.keys() == reference.keys()
    assert any(not torch.equal(found[name], reference[name]) for name in found)
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert resume.fingerprint(model) == before and load_file(control).keys() == reference.keys()
    assert all(torch.equal(value, reference[name]) for name, value in load_file(control).items())
