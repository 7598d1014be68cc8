"""Small LR shards and their embeddings for tests of what comes after degradation."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SIZE = 8  # pixels of an LR image; HR is four times as wide


def names(count: int) -> list[str]:
    """Return group ids."""
    return [f"{index:016x}-000" for index in range(count)]


def write_lr(path: Path, groups: Sequence[str]) -> Path:
    """Write an LR shard of random images; a group's image depends on its name alone."""
    import torch

    from dp2osr.shards import encode_image, write_shard

    def sample(group: str) -> tuple[str, dict[str, bytes]]:
        generator = torch.Generator().manual_seed(int(group[:16], 16))
        hr = torch.rand(3, 4 * SIZE, 4 * SIZE, generator=generator)
        lr = torch.nn.functional.avg_pool2d(hr, 4)
        told = json.dumps({"photo_id": group[:16], "seed": 0}).encode()
        return group, {"hr.png": encode_image(hr), "lr.png": encode_image(lr), "json": told}

    write_shard(path, [sample(group) for group in groups])
    return path


def write_embeddings(path: Path, groups: Sequence[str], settings: Any) -> Path:
    """Write the embeddings of two prompts, dealt in turn to the groups."""
    import torch

    from dp2osr.models.backend import load_backend, write_embeddings

    backend = load_backend(settings, device=torch.device("cpu"), parts=frozenset({"text"}))
    prompts = ["a bird" if int(group[:16], 16) % 2 else "" for group in groups]
    embeddings = backend.embed_prompts(sorted(set(prompts)))
    write_embeddings(path, list(groups), prompts, embeddings, backend.embed_prompts(["blur"]))
    return path


def policy(config_dict: dict[str, Any], model: Path, **sampling: Any) -> Any:
    """Return the settings of a policy on a tiny model."""
    from dp2osr.config import PolicySettings

    settings = config_dict["policy_defaults"] | {"model": str(model), "control": str(model / "controlnet")}
    settings["sampling"] = settings["sampling"] | {"steps": 2} | sampling
    return PolicySettings(**settings)


def speed(**changes: Any) -> list[str]:
    """Return the rollout stage's option for what makes it faster: the defaults with `changes`."""
    from training_rig import DEFAULTS

    return ["--speed", json.dumps(DEFAULTS["rollout"]["speed"] | changes)]
