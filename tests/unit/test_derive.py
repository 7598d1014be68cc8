import json
import math
from pathlib import Path

import pytest
import torch

from dp2osr.sampling import images_control
from dp2osr.shards import decode_image, encode_image, read_shard, write_shard
from dp2osr.stages import derive


def job(kind: str, sigma: float = 0.0, image_format: str = "png") -> derive.DeriveJob:
    return derive.DeriveJob(kind=kind, sigma=sigma, scale=4, image_format=image_format)


def write_candidates(path: Path, first: int, images: dict[str, list[torch.Tensor]]) -> Path:
    samples = []
    for group, members in images.items():
        for rollout, image in enumerate(members, start=first):
            facts = json.dumps({"group_id": group, "rollout": rollout, "seed": 3}).encode()
            samples.append((f"{group}-r{rollout:04d}", {"png": encode_image(image), "json": facts}))
    write_shard(path, samples)
    return path


def run(tmp_path: Path, settings: derive.DeriveJob, *sources: Path) -> dict[str, dict[str, bytes]]:
    out = tmp_path / "derived.tar"
    paths = ["--source", *map(str, sources), "--candidates", str(out)]
    derive.main([*paths, "--config", settings.model_dump_json()])
    return dict(read_shard(out))


def test_blur_of_a_point_is_a_gaussian() -> None:
    image = torch.zeros(3, 33, 33)
    image[:, 16, 16] = 1.0
    found = derive.blur(image, 1.5)
    offsets = torch.arange(-16, 17).float()
    assert found.sum() == pytest.approx(3.0, abs=1e-4)
    assert (found[0].sum(0) * offsets**2).sum() == pytest.approx(1.5**2, rel=0.01)
    assert found[0, 16, 17] / found[0, 16, 16] == pytest.approx(math.exp(-1 / (2 * 1.5**2)), rel=1e-4)


def test_blur_of_zero_width_changes_nothing() -> None:
    image = torch.rand(3, 8, 8)
    assert derive.blur(image, 0.0) is image
    assert torch.allclose(derive.blur(torch.full((3, 8, 8), 0.3), 5.0), torch.tensor(0.3))


def test_each_candidate_is_blurred(tmp_path: Path) -> None:
    images = {"g-000": [torch.rand(3, 16, 16) for _ in range(3)]}
    found = run(tmp_path, job("blur", 1.0, "webp"), write_candidates(tmp_path / "a.tar", 4, images))
    assert list(found) == ["g-000-r0004", "g-000-r0005", "g-000-r0006"]
    fields = found["g-000-r0005"]
    expected = derive.blur(images["g-000"][1].mul(255).round().div(255), 1.0)
    assert torch.allclose(decode_image(fields["webp"]), expected, atol=0.51 / 255)
    told = json.loads(fields["json"])
    assert told == {"group_id": "g-000", "rollout": 5, "derive": "blur", "sigma": 1.0}


def test_mean_over_all_blocks(tmp_path: Path) -> None:
    low, high = torch.full((3, 8, 8), 0.2), torch.full((3, 8, 8), 0.8)
    first = write_candidates(tmp_path / "a.tar", 0, {"g-000": [low, low], "h-000": [high, high]})
    second = write_candidates(tmp_path / "b.tar", 2, {"g-000": [low, high], "h-000": [high, high]})
    found = run(tmp_path, job("mean"), first, second)
    assert list(found) == ["g-000-r0000", "h-000-r0000"]
    assert decode_image(found["g-000-r0000"]["png"]).mean() == pytest.approx(0.35, abs=0.51 / 255)
    assert decode_image(found["h-000-r0000"]["png"]).mean() == pytest.approx(0.8, abs=0.51 / 255)


def test_bicubic_of_the_lr_image(tmp_path: Path) -> None:
    lr = torch.rand(3, 6, 6).mul(255).round().div(255)
    write_shard(tmp_path / "lr.tar", [("g-000", {"lr.png": encode_image(lr), "json": b"{}"})])
    found = run(tmp_path, job("bicubic"), tmp_path / "lr.tar")
    expected = images_control(lr[None], 4)[0]
    assert torch.allclose(decode_image(found["g-000-r0000"]["png"]), expected, atol=0.51 / 255)
