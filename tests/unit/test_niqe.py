"""NIQE with our own pristine model: equal to pyiqa's at 96 px, sensible order, same bytes, clear errors."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dp2osr.errors import UserError
from dp2osr.images import load_builtin
from dp2osr.iqa import niqe
from dp2osr.iqa.metric import Scorer
from dp2osr.shards import encode_image, write_shard
from dp2osr.stages import niqe as niqe_stage

CPU = torch.device("cpu")


def photo(name: str) -> torch.Tensor:
    array = np.array(Image.open(io.BytesIO(load_builtin(name))).convert("RGB"))
    return torch.from_numpy(array).permute(2, 0, 1).float().div(255)


@pytest.fixture(scope="module")
def pristine() -> list[torch.Tensor]:
    torch.set_num_threads(1)
    images = [photo(f"pyiqa/{name}") for name in ("I03", "I04", "I06", "I08")]
    return [image[:, :288, :384] for image in images]


@pytest.fixture(scope="module", params=[32, 96])
def model(request: pytest.FixtureRequest, pristine: list, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    path = tmp_path_factory.mktemp("niqe") / "niqe.mat"
    mean, covariance = niqe.fit(pristine, block_size=request.param, sharpness=0.0)
    niqe.save(path, mean, covariance, block_size=request.param)
    return path, request.param


def test_pristine_is_better_than_noisy_and_blurred(model: tuple[Path, int]) -> None:
    path, block = model
    held_out = photo("pyiqa/I19")[:, :288, :288]
    noise = torch.randn(held_out.shape, generator=torch.Generator().manual_seed(0))
    noisy = (held_out + 0.1 * noise).clamp(0, 1)
    blurred = torch.nn.functional.avg_pool2d(held_out[None], 7, 1, 3, count_include_pad=False)[0]
    judge = Scorer(["niqe"], device=CPU, niqe=path, niqe_block=block, batch_size=4)
    clean, with_noise, with_blur = judge.score(torch.stack([held_out, noisy, blurred]))["niqe"]
    assert clean < with_noise and clean < with_blur


def test_equals_pyiqas_wrapper_at_96(pristine: list[torch.Tensor], tmp_path: Path) -> None:
    import pyiqa

    niqe.save(tmp_path / "niqe.mat", *niqe.fit(pristine, block_size=96, sharpness=0.0), block_size=96)
    images = torch.stack([image[:, :200, :300] for image in pristine])
    theirs = pyiqa.create_metric("niqe", device=CPU, pretrained_model_path=str(tmp_path / "niqe.mat"))(images)
    judge = Scorer(["niqe"], device=CPU, niqe=tmp_path / "niqe.mat", niqe_block=96, batch_size=4)
    np.testing.assert_array_equal(judge.score(images)["niqe"], theirs.numpy())


def test_features_are_those_of_pyiqas_distance(pristine: list[torch.Tensor]) -> None:
    """With our features as the model, an image is at distance 0 of itself in pyiqa's own function."""
    from pyiqa.archs.niqe_arch import niqe as distance

    image = niqe.luma(pristine[0][None])
    features = niqe.block_features(image, block_size=32)
    mean, covariance = niqe.fit([pristine[0]], block_size=32, sharpness=0.0)
    np.testing.assert_allclose(features.mean(dim=0), mean)
    np.testing.assert_allclose(covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-9, atol=1e-12)
    assert features.shape == (9 * 12, niqe.NUM_FEATURES)
    found = distance(image, torch.from_numpy(mean)[None], torch.from_numpy(covariance)[None], 32, 32)
    assert float(found) < 1e-6


def test_sharpness_leaves_flat_blocks_out(pristine: list[torch.Tensor]) -> None:
    flat = torch.full((3, 96, 96), 0.5)
    half = torch.cat([pristine[0][:, :96, :96], flat], dim=2)
    sharp = niqe.block_sharpness(niqe.luma(half[None]), block_size=96)
    assert sharp.shape == (2,) and sharp[1] < 0.1 * sharp[0]
    all_blocks, _ = niqe.fit(pristine, block_size=96, sharpness=0.0)
    some_blocks, _ = niqe.fit(pristine, block_size=96, sharpness=0.75)
    assert not np.allclose(all_blocks, some_blocks)


def test_same_images_same_bytes(pristine: list[torch.Tensor], tmp_path: Path) -> None:
    for name in ("a.mat", "b.mat"):
        niqe.save(tmp_path / name, *niqe.fit(pristine[:2], block_size=32, sharpness=0.0), block_size=32)
    assert (tmp_path / "a.mat").read_bytes() == (tmp_path / "b.mat").read_bytes()


def test_errors_name_the_file(pristine: list[torch.Tensor], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="0 usable blocks"):
        niqe.fit([torch.rand(3, 20, 20)], block_size=32, sharpness=0.0)
    path = tmp_path / "niqe.mat"
    niqe.save(path, *niqe.fit(pristine[:1], block_size=32, sharpness=0.0), block_size=32)
    with pytest.raises(UserError, match="blocks of 32 px, wanted 96"):
        niqe.check(path, block_size=96)
    niqe.save(path, np.zeros(3), np.zeros((3, 3)), block_size=32)
    with pytest.raises(UserError, match="found 3 numbers, wanted 36"):
        niqe.check(path, block_size=32)
    path.write_bytes(b"no such thing")
    with pytest.raises(UserError, match=r"niqe.mat: no readable"):
        niqe.check(path, block_size=32)


def test_stage(pristine: list[torch.Tensor], tmp_path: Path) -> None:
    shards = [tmp_path / f"shard-{index}.tar" for index in range(2)]
    for path, image in zip(shards, pristine, strict=False):
        write_shard(path, [("a-000", {"hr.png": encode_image(image), "json": b"{}"})])
    config = json.dumps({"dataset": "train", "block_size": 32, "sharpness": 0.0})
    argv = ["--lr", *map(str, shards), "--niqe", str(tmp_path / "niqe.mat"), "--config", config]
    niqe_stage.main(argv)
    first = (tmp_path / "niqe.mat").read_bytes()
    niqe.check(tmp_path / "niqe.mat", block_size=32)
    niqe_stage.main(argv)
    assert (tmp_path / "niqe.mat").read_bytes() == first
    write_shard(shards[0], [("a-000", {"json": b"{}"})])
    with pytest.raises(UserError, match=r"shard-0.tar: a-000 has no hr.png"):
        niqe_stage.main(argv)
