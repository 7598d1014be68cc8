"""One shard or four, batch 1 or 8: equal candidates; the same batch size: the same bytes."""

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_shards
from dp2osr import sampling, seeds
from dp2osr.models.backend import load_backend, read_embeddings, stack
from dp2osr.shards import decode_image, read_shard
from dp2osr.stages import rollout

GROUPS = tiny_shards.names(4)
SAMPLERS = ["UniPCMultistepScheduler", "DDPMScheduler", "EulerAncestralDiscreteScheduler"]


def candidates(folder: Path, policy: Any, groups: list[str], batch: int) -> dict[str, dict[str, bytes]]:
    folder.mkdir()
    tiny_shards.write_lr(folder / "lr.tar", groups)
    tiny_shards.write_embeddings(folder / "embeddings.safetensors", groups, policy)
    job = rollout.RolloutJob(policy=policy, seed=0, first=0, count=3, scale=4, image_format="png")
    arguments = {
        "--lr": folder / "lr.tar",
        "--embeddings": folder / "embeddings.safetensors",
        "--control": policy.control,
        "--batch-size": batch,
        "--device": "cpu",
        "--config": job.model_dump_json(),
        "--candidates": folder / "out.tar",
    }
    rollout.main([*tiny_shards.speed(), *(str(part) for pair in arguments.items() for part in pair)])
    return dict(read_shard(folder / "out.tar"))


def test_shards_and_batches_do_not_change_candidates(
    tmp_path: Path, config_dict: dict[str, Any], tiny_model: Path
) -> None:
    policy = tiny_shards.policy(config_dict, tiny_model, guidance=2.0)
    whole = candidates(tmp_path / "whole", policy, GROUPS, 8)
    assert len(whole) == 12
    single = candidates(tmp_path / "single", policy, GROUPS, 1)
    split: dict[str, dict[str, bytes]] = {}
    for index, group in enumerate(GROUPS):
        split |= candidates(tmp_path / f"split-{index}", policy, [group], 3)
    again = candidates(tmp_path / "again", policy, GROUPS, 8)
    assert again == whole
    for other in (single, split):
        assert list(other) == list(whole)
        for key, fields in whole.items():
            assert other[key]["json"] == fields["json"]
            difference = decode_image(other[key]["png"]) - decode_image(fields["png"])
            assert difference.abs().max() <= 1.01 / 255  # a rounding of 1e-5 may cross half a level
            assert (difference != 0).float().mean() < 0.01


@pytest.mark.parametrize("scheduler", SAMPLERS)
def test_batches_agree_before_rounding(
    tmp_path: Path, config_dict: dict[str, Any], tiny_model: Path, scheduler: str
) -> None:
    policy = tiny_shards.policy(config_dict, tiny_model, scheduler=scheduler, steps=4)
    tiny_shards.write_lr(tmp_path / "lr.tar", GROUPS)
    tiny_shards.write_embeddings(tmp_path / "embeddings.safetensors", GROUPS, policy)
    embeddings, negative = read_embeddings(tmp_path / "embeddings.safetensors")
    images = {group: decode_image(fields["lr.png"]) for group, fields in read_shard(tmp_path / "lr.tar")}
    device = torch.device("cpu")
    backend = load_backend(policy, device=device)
    branch = backend.load_control(policy.control)

    def restore(groups: list[str]) -> torch.Tensor:
        return sampling.restore(
            backend,
            branch,
            torch.stack([images[group] for group in groups]),
            scale=4,
            embeddings=stack([embeddings[group] for group in groups], device),
            negative=stack([negative] * len(groups), device),
            seeds=[seeds.candidate(0, group, 0) for group in groups],
            sampling=policy.sampling,
        )

    together = restore(GROUPS)
    alone = torch.cat([restore([group]) for group in GROUPS])
    assert (together - alone).abs().max() < 1e-5
    assert (restore(GROUPS[::-1]).flip(0) - together).abs().max() < 1e-5
    assert (together[0] - together[1]).abs().max() > 0.01
