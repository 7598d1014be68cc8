import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tiny_shards
from dp2osr import sampling, upscale
from dp2osr.errors import UserError
from dp2osr.models import tiling


def save(path: Path, width: int = 12, height: int = 10, mode: str = "RGB") -> Path:
    pixels = np.random.default_rng(3).integers(0, 256, (height, width, 4), dtype=np.uint8)
    image = Image.fromarray(pixels, "RGBA").convert(mode)
    image.save(path)
    return path


@pytest.fixture(scope="module")
def upscaler(tiny_model: Path) -> upscale.Upscaler:
    import yaml

    config = yaml.safe_load((Path(__file__).parents[2] / "config" / "config.yaml").read_text())
    policy = tiny_shards.policy(config, tiny_model)
    return upscale.load(policy, device=torch.device("cpu"), prompt="", scale=4, tile=64)


def test_padding_reflects_or_repeats() -> None:
    image = torch.arange(5.0).expand(1, 3, 5, 5)
    assert sampling.pad(image, 4)[0, 0, 0].tolist() == [0, 1, 2, 3, 4, 3, 2, 1]
    assert sampling.pad(image, 16).shape == (1, 3, 16, 16)
    assert sampling.pad(image, 16)[0, 0, 0, 5:].unique().tolist() == [4.0]
    assert sampling.pad(image, 5) is image


@pytest.mark.parametrize(("width", "height"), [(1, 1), (5, 7), (16, 16), (37, 23)])
def test_any_size_becomes_four_times_as_large(upscaler: upscale.Upscaler, width: int, height: int) -> None:
    restored = upscaler.restore(torch.rand(3, height, width), 1)
    assert restored.shape == (3, 4 * height, 4 * width)
    assert restored.isfinite().all()


def test_seed_decides(upscaler: upscale.Upscaler) -> None:
    lr = torch.rand(3, 8, 8)
    assert torch.equal(upscaler.restore(lr, 1), upscaler.restore(lr, 1))
    assert not torch.equal(upscaler.restore(lr, 1), upscaler.restore(lr, 2))


def test_tiled_decoding_equals_decoding_at_once_for_a_local_decoder() -> None:
    class Local:
        latent_factor = 2

        def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
            return latents[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3)

    latents = torch.rand(2, 4, 19, 33)
    backend: Any = Local()
    tiled = sampling.decode(backend, latents, tile=16, overlap=4)
    assert torch.allclose(tiled, backend.decode_latents(latents), atol=1e-6)


def test_windows_cover_everything() -> None:
    for length in range(1, 60):
        found = tiling.starts(length, 16, 4)
        covered = {cell for start in found for cell in range(start, min(start + 16, length))}
        assert covered == set(range(length))
        assert found[-1] + 16 == length or length <= 16


def largest_step(image: torch.Tensor) -> float:
    return max(float(image.diff(dim=2).abs().max()), float(image.diff(dim=3).abs().max()))


def test_tiles_that_disagree_leave_no_seam_when_decoded() -> None:
    """Every tile is off by its own brightness; blended over 16 pixels, no step is larger than a 16th of that."""

    class Disagreeing:
        latent_factor = 2
        calls = 0

        def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return torch.full((1, 3, 2 * latents.shape[2], 2 * latents.shape[3]), float(self.calls % 2))

    backend: Any = Disagreeing()
    latents = torch.zeros(1, 4, 40, 72)
    assert largest_step(sampling.decode(backend, latents, tile=32, overlap=16)) < 1.5 / 16
    assert largest_step(sampling.decode(backend, latents, tile=32, overlap=0)) >= 0.5


def test_tiles_that_disagree_leave_no_seam_when_predicted() -> None:
    def window(rows: slice, columns: slice) -> torch.Tensor:
        value = (rows.start // 8 + columns.start // 8) % 2
        return torch.full((1, 4, rows.stop - rows.start, columns.stop - columns.start), float(value))

    shape = torch.Size((1, 4, 40, 72))
    assert largest_step(tiling.blend(window, shape, tile=16, overlap=8)) < 1.5 / 8
    assert largest_step(tiling.blend(window, shape, tile=16, overlap=0)) >= 0.5


def test_tiled_restoration_stays_close_to_one_pass(upscaler: upscale.Upscaler) -> None:
    lr = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 6), size=(32, 48), mode="bicubic").clamp(0, 1)[0]
    whole = replace(upscaler, tile=192).restore(lr, 0)
    tiled = upscaler.restore(lr, 0)
    assert not torch.equal(whole, tiled)
    assert (whole - tiled).abs().mean() < 0.05


def test_outputs_are_planned(tmp_path: Path) -> None:
    a, b = tmp_path / "a.jpg", tmp_path / "b.png"
    assert upscale.plan_outputs([a], tmp_path / "x.png", num_files=1) == [[tmp_path / "x.png"]]
    assert upscale.plan_outputs([a, b], tmp_path / "o", num_files=1) == [[tmp_path / "o/a.png"], [tmp_path / "o/b.png"]]
    names = [path.name for path in upscale.plan_outputs([a], tmp_path / "o", num_files=2)[0]]
    assert names == ["a-0000.png", "a-0001.png"]
    for inputs, out, count in (
        ([b], b, 1),  # the input itself
        ([b], tmp_path, 1),  # its folder
        ([a, tmp_path / "sub/a.png"], tmp_path / "o", 1),  # one name twice
        ([a, b], tmp_path / "x.png", 1),
        ([a], tmp_path / "x.png", 2),
        ([a], tmp_path / "x.jpg", 1),
    ):
        with pytest.raises(UserError):
            upscale.plan_outputs(inputs, out, num_files=count)


def test_inputs_and_folders(tmp_path: Path) -> None:
    save(tmp_path / "b.png")
    save(tmp_path / "a.JPG")
    (tmp_path / "notes.txt").write_text("x")
    assert [path.name for path in upscale.expand([tmp_path])] == ["a.JPG", "b.png"]
    with pytest.raises(UserError, match="not found"):
        upscale.expand([tmp_path / "absent.png"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images in this folder"):
        upscale.expand([tmp_path / "empty"])


def test_alpha_and_truncated_files(tmp_path: Path) -> None:
    image, name = upscale.read_image(save(tmp_path / "alpha.png", mode="RGBA"))
    assert image.shape == (3, 10, 12)
    assert len(name) == 16
    path = save(tmp_path / "cut.png", 64, 64)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"cut\.png: unreadable"):
        upscale.read_image(path)


def test_files_are_written_and_the_best_is_chosen(tmp_path: Path, upscaler: upscale.Upscaler) -> None:
    class Brightness:
        def score(self, candidates: torch.Tensor) -> dict[str, np.ndarray]:
            return {"niqe": candidates.mean((1, 2, 3)).double().numpy()}

    path = save(tmp_path / "in.png")
    options: dict[str, Any] = {"seed": 0, "scorer": Brightness()}
    every = upscale.run(upscaler, [path], tmp_path / "all", candidates=3, best_of="", **options)
    best = upscale.run(upscaler, [path], tmp_path / "best.png", candidates=3, best_of="niqe", **options)
    means = [np.asarray(Image.open(file)).mean() for file in every]
    assert len(set(means)) == 3
    assert np.asarray(Image.open(best[0])).mean() == min(means)  # lower niqe is better
    assert Image.open(best[0]).size == (48, 40)


def test_a_metric_without_a_number_never_wins() -> None:
    class Broken:
        values = iter([float("nan"), 2.0, 1.0])

        def score(self, candidates: torch.Tensor) -> dict[str, list[float]]:
            return {"niqe": [next(self.values)]}

    assert upscale.pick([torch.zeros(3, 4, 4)] * 3, "niqe", Broken()) == 2


def test_only_no_reference_metrics_judge() -> None:
    upscale.check_judge("niqe")
    with pytest.raises(UserError, match=r"'psnr', which compares with an original .* a no-reference metric: niqe"):
        upscale.check_judge("psnr")
    with pytest.raises(UserError, match="'nique', wanted a no-reference metric: niqe"):
        upscale.check_judge("nique")


def test_policies_are_found(tmp_path: Path, config_dict: dict[str, Any]) -> None:
    import yaml

    config_dict["results"] = str(tmp_path / "results")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config_dict))
    base = upscale.find_policy("builtin", model="", config_path=path)
    assert (base.model, base.control) == ("builtin:tiny-sd", "builtin:tiny-sd/controlnet")
    assert upscale.find_policy("weights/c.safetensors", model="m", config_path=path).control == "weights/c.safetensors"
    folder = tmp_path / "results" / "runs" / "default" / "policy"
    folder.mkdir(parents=True)
    recorded = base.model_copy(update={"model": "elsewhere"})
    (folder / "policy.json").write_text(json.dumps({"config": {"policy": recorded.model_dump()}}))
    for name in ("default", str(folder)):
        found = upscale.find_policy(name, model="", config_path=path)
        assert (found.model, found.control) == ("elsewhere", str(folder))
    (folder / "policy.json").write_text("{}")
    with pytest.raises(UserError, match=r"policy\.json does not say"):
        upscale.find_policy(str(folder), model="", config_path=path)


def test_sixteen_bit_greyscale(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), 65535, np.uint16)).save(buffer, "PNG")
    (tmp_path / "deep.png").write_bytes(buffer.getvalue())
    assert upscale.read_image(tmp_path / "deep.png")[0].min() == 1.0
