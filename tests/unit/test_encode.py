"""Encoding: only selected candidates, each once; resumable; errors that name what is missing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from dp2osr import shards, tables
from dp2osr.errors import UserError
from dp2osr.models.backend import load_backend
from dp2osr.sampling import images_control
from dp2osr.stages import encode
from dp2osr.training.batches import Schedule
from dp2osr.training.checkpoint import Store
from dp2osr.training.loop import Trainer
from dp2osr.training.pack import FIELD, Pack, TarIndex, dump_group
from dp2osr.training.step import Feed
from training_rig import GROUPS, SCALE, SIZE, TEXT, make_backend, make_pairs, policy_settings, train_settings


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Two groups in this shard of four; 6 candidates each, in two blocks of seeds."""
    generator = torch.Generator().manual_seed(0)
    blocks: dict[int, list[shards.Sample]] = {0: [], 1: []}
    images = []
    for group in GROUPS[:2]:
        lr = torch.rand(3, SIZE // SCALE, SIZE // SCALE, generator=generator)
        images.append((group, {"hr.png": b"", "lr.png": shards.encode_image(lr), "json": b"{}"}))
        for rollout in range(6):
            data = shards.encode_image(torch.rand(3, SIZE, SIZE, generator=generator))
            blocks[rollout // 3].append((f"{group}-r{rollout:04d}", {"png": data, "json": b"{}"}))
    paths = {"pairs": tmp_path / "pairs.parquet", "lr": tmp_path / "lr.tar"}
    tables.write(make_pairs(top=1), paths["pairs"], tables.PAIRS)
    shards.write_shard(paths["lr"], images)
    for block, samples in blocks.items():
        paths[f"block{block}"] = tmp_path / f"block-{block}.tar"
        shards.write_shard(paths[f"block{block}"], samples)
    return paths


def run(files: dict[str, Path], tiny_model: Path, output: Path, **sampling: Any) -> Pack:
    settings = policy_settings(tiny_model, **sampling)
    argv = ["--pairs", str(files["pairs"]), "--lr", str(files["lr"]), "--encoded", str(output)]
    argv += ["--batch-size", "2", "--device", "cpu"]
    argv += ["--config", settings.model_dump_json(), "--candidates", str(files["block0"]), str(files["block1"])]
    encode.main(argv)
    backend = load_backend(settings, device=torch.device("cpu"), parts=frozenset())
    return Pack([output], backend.prepare_control)


def test_selected_candidates_once_each(files: dict[str, Path], tiny_model: Path, tmp_path: Path) -> None:
    pack = run(files, tiny_model, tmp_path / "out.tar")
    pack.check(GROUPS[:2])
    latents, control = pack.load(GROUPS[1], [4, 0])
    assert latents.shape == (2, 4, SIZE // 2, SIZE // 2) and latents.dtype == torch.float32
    candidates = encode.read_candidates(TarIndex([files["block0"], files["block1"]]), GROUPS[1], [4, 0])
    torch.testing.assert_close(latents, make_backend(tiny_model).encode_images(candidates), rtol=1e-4, atol=1e-5)
    lr = dict(shards.read_shard(files["lr"]))[GROUPS[1]]["lr.png"]
    torch.testing.assert_close(control, images_control(shards.decode_image(lr)[None], SCALE)[0])
    with pytest.raises(UserError, match="rollout 1 of group"):
        pack.load(GROUPS[0], [0, 1])
    with pytest.raises(UserError, match=f"group {GROUPS[2]} is missing"):
        pack.check(GROUPS[:3])


def test_an_interrupted_job_goes_on(
    files: dict[str, Path], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(files, tiny_model, tmp_path / "whole.tar")
    calls: list[str] = []
    group_encoder = encode.encode_group

    def dies_at_the_second(*args: Any, **options: Any) -> bytes:
        calls.append("group")
        if len(calls) == 2:
            raise KeyboardInterrupt
        return group_encoder(*args, **options)

    monkeypatch.setattr(encode, "encode_group", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(files, tiny_model, tmp_path / "cut.tar")
    assert not (tmp_path / "cut.tar").exists()
    run(files, tiny_model, tmp_path / "cut.tar")
    assert len(calls) == 3
    assert (tmp_path / "cut.tar").read_bytes() == (tmp_path / "whole.tar").read_bytes()
    assert not (tmp_path / "cut.tar.parts").exists()


def test_short_memory_encodes_one_by_one(
    files: dict[str, Path], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = run(files, tiny_model, tmp_path / "whole.tar")
    backend = type(make_backend(tiny_model))
    real = backend.encode_images

    def crowded(self: Any, images: torch.Tensor) -> torch.Tensor:
        if len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, images)

    monkeypatch.setattr(backend, "encode_images", crowded)
    short = run(files, tiny_model, tmp_path / "short.tar")
    for group in GROUPS[:2]:
        torch.testing.assert_close(short.load(group, [0, 4])[0], pack.load(group, [0, 4])[0], rtol=1e-4, atol=1e-5)


def test_a_missing_candidate_is_named(files: dict[str, Path], tiny_model: Path, tmp_path: Path) -> None:
    shards.write_shard(files["block1"], [])
    with pytest.raises(UserError, match=f"{GROUPS[0]}-r0004 is missing"):
        run(files, tiny_model, tmp_path / "out.tar")


def test_a_truncated_shard_is_named(files: dict[str, Path], tiny_model: Path, tmp_path: Path) -> None:
    files["block1"].write_bytes(files["block1"].read_bytes()[:1000])
    with pytest.raises(UserError, match="block-1"):
        run(files, tiny_model, tmp_path / "out.tar")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_image_as_control_is_kept_as_the_lr_file(
    dtype: str, files: dict[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    """Read again it has the bits of the control that a rollout makes, which was once written in float32."""
    pack = run(files, tiny_model, tmp_path / "out.tar", dtype=dtype)
    images = dict(shards.read_shard(files["lr"]))
    for group, fields in shards.read_shard(tmp_path / "out.tar"):
        assert set(fields) == {"lr.png", "safetensors"} and fields["lr.png"] == images[group]["lr.png"]
        upsampled = images_control(shards.decode_image(fields["lr.png"])[None], SCALE)[0]
        _, control = pack.load(group, [0])
        assert control.dtype == torch.float32 and control.is_contiguous()
        assert torch.equal(control, upsampled.to(getattr(torch, dtype)).float())
        assert (upsampled * 255 != (upsampled * 255).round()).any()  # it has no 8-bit form of its own


def test_training_is_that_of_a_control_written_in_float32(
    files: dict[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    pack, samples = run(files, tiny_model, tmp_path / "lr.tar"), []
    for group in GROUPS[:2]:
        latents, control = pack.load(group, [0, 4])
        samples.append((group, {FIELD: dump_group(latents, [0, 4], control=control)}))
    shards.write_shard(tmp_path / "float.tar", samples)
    found = [train(tiny_model, tmp_path / name) for name in ("lr.tar", "float.tar")]
    assert len(found[0]) == 4 and found[0] == found[1]
    assert (tmp_path / "lr.tar").stat().st_size < 0.8 * (tmp_path / "float.tar").stat().st_size


def train(tiny_model: Path, encoded: Path) -> list[dict[str, Any]]:
    """Train on a pack; returns the rows of its log."""
    backend, settings = make_backend(tiny_model), train_settings()
    text = {group: {"prompt_embeds": torch.zeros(77, TEXT)} for group in GROUPS}
    trainer = Trainer(
        accelerator=Accelerator(cpu=True),
        feed=Feed(Pack([encoded], backend.prepare_control), text, backend, "uniform"),
        schedule=Schedule(make_pairs(GROUPS[:3], top=1), settings=settings, seed=3),  # the last group has no pair
        policy=backend.load_control(tiny_model / "controlnet"),
        reference=backend.load_control(tiny_model / "controlnet"),
        settings=settings,
        guard=None,
        store=Store(encoded.with_suffix(".checkpoints"), "mark", record={}),
    )
    trainer.run()
    return [{name: value for name, value in row.items() if name != "pairs_per_second"} for row in trainer.progress.log]
