"""The score stage: long table, statuses, resumed equals undisturbed byte for byte, clear errors."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dp2osr import tables, versions
from dp2osr.errors import UserError
from dp2osr.iqa.metric import Scorer
from dp2osr.shards import decode_image, encode_image, read_shard, write_shard
from dp2osr.stages import score

GROUPS = ["00000000000000aa-000", "00000000000000bb-000", "00000000000000bb-001"]
SIZE, ROLLOUTS = 40, 3


def write_inputs(folder: Path, image_format: str = "png") -> tuple[Path, Path]:
    """Write an LR shard with random HR images, and noisy candidates of each."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(3)
    hr = {group: torch.rand(3, SIZE, SIZE, generator=generator) for group in GROUPS}
    write_shard(folder / "lr.tar", [(g, {"hr.png": encode_image(hr[g]), "json": b"{}"}) for g in GROUPS])
    samples = []
    for group in GROUPS:
        for rollout in range(ROLLOUTS):
            image = hr[group] + 0.1 * (rollout + 1) * torch.randn(hr[group].shape, generator=generator)
            notes = json.dumps({"group_id": group, "rollout": rollout, "seed": 1}).encode()
            fields = {image_format: encode_image(image, image_format), "json": notes}
            samples.append((f"{group}-r{rollout:04d}", fields))
    write_shard(folder / "candidates.tar", samples)
    return folder / "candidates.tar", folder / "lr.tar"


def arguments(folder: Path, *metrics: str, out: str = "scores.parquet") -> list[str]:
    config = json.dumps({"metrics": list(metrics), "niqe_block": 32})
    paths = ["--candidates", str(folder / "candidates.tar"), "--lr", str(folder / "lr.tar")]
    return [*paths, "--device", "cpu", "--batch-size", "4", "--scores", str(folder / out), "--config", config]


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_rows_are_raw_scores(tmp_path: Path, image_format: str) -> None:
    candidates, lr = write_inputs(tmp_path, image_format)
    score.main(arguments(tmp_path, "psnr", "gmsd", "ms_ssim"))
    frame = tables.read(tmp_path / "scores.parquet", tables.SCORES)
    assert len(frame) == 3 * len(GROUPS) * ROLLOUTS
    assert frame.equals(frame.sort_values(["group_id", "rollout", "metric"]).reset_index(drop=True))
    small = frame[frame["metric"] == "ms_ssim"]
    assert set(small["status"]) == {"too_small"} and small["score"].isna().all()
    assert set(frame[frame["metric"] != "ms_ssim"]["status"]) == {"ok"}
    hr = {key: decode_image(fields["hr.png"]) for key, fields in read_shard(lr)}
    for row in frame[frame["metric"] == "psnr"].itertuples():
        fields = dict(read_shard(candidates))[f"{row.group_id}-r{row.rollout:04d}"]
        error = (decode_image(fields[image_format]) - hr[row.group_id]).square().mean()
        assert row.score == pytest.approx(float(-10 * torch.log10(error)), abs=1e-3)
    assert not (tmp_path / "scores.parquet.parts").exists()


def test_table_says_what_made_its_numbers(tmp_path: Path) -> None:
    from importlib.metadata import version

    write_inputs(tmp_path)
    score.main(arguments(tmp_path, "psnr", "gmsd"))
    made = f"pyiqa {version('pyiqa')}, score {versions.SCORE}"
    assert tables.read_origins(tmp_path / "scores.parquet") == {"psnr": made, "gmsd": made}


def test_killed_and_rerun_equals_undisturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_inputs(tmp_path)
    monkeypatch.setattr(score, "CHUNK", 2)
    names = ("psnr", "fsim", "nlpd")
    score.main(arguments(tmp_path, *names))
    calls = 0
    original = Scorer.score

    def dying(self: Scorer, *images: torch.Tensor) -> dict[str, np.ndarray]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return original(self, *images)

    monkeypatch.setattr(Scorer, "score", dying)
    with pytest.raises(KeyboardInterrupt):
        score.main(arguments(tmp_path, *names, out="again.parquet"))
    assert not (tmp_path / "again.parquet").exists()
    score.main(arguments(tmp_path, *names, out="again.parquet"))
    assert calls == 3 + 3  # five chunks in all, two of them finished before
    assert (tmp_path / "again.parquet").read_bytes() == (tmp_path / "scores.parquet").read_bytes()


def test_parts_of_other_inputs_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_inputs(tmp_path)
    monkeypatch.setattr(tables, "write", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        score.main(arguments(tmp_path, "psnr"))
    monkeypatch.undo()
    assert (tmp_path / "scores.parquet.parts").is_dir()
    shutil.copy(tmp_path / "lr.tar", tmp_path / "old.tar")
    first, *rest = read_shard(tmp_path / "old.tar")
    other = {**first[1], "hr.png": encode_image(torch.zeros(3, SIZE, SIZE))}
    write_shard(tmp_path / "lr.tar", [(first[0], other), *rest])
    score.main(arguments(tmp_path, "psnr"))
    frame = tables.read(tmp_path / "scores.parquet", tables.SCORES)
    assert frame[frame["group_id"] == GROUPS[0]]["score"].max() < 10


def test_hr_is_not_needed_without_reference(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    write_shard(tmp_path / "lr.tar", [(GROUPS[0], {"json": b"{}"})])
    score.main(arguments(tmp_path, "piqe", "entropy"))
    assert len(tables.read(tmp_path / "scores.parquet", tables.SCORES)) == 2 * len(GROUPS) * ROLLOUTS


def test_user_errors(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    kept = [sample for sample in read_shard(tmp_path / "lr.tar") if sample[0] != GROUPS[1]]
    write_shard(tmp_path / "lr.tar", kept)
    with pytest.raises(UserError, match=f"group {GROUPS[1]} has candidates but no HR"):
        score.main(arguments(tmp_path, "psnr"))
    write_shard(tmp_path / "lr.tar", [(g, {"hr.png": encode_image(torch.rand(3, 8, 8))}) for g in GROUPS])
    with pytest.raises(UserError, match=r"HR is \(8, 8\), candidates \(40, 40\)"):
        score.main(arguments(tmp_path, "psnr"))
    with pytest.raises(UserError, match="metric 'niqe': no model"):
        score.main(arguments(tmp_path, "niqe"))
    write_shard(tmp_path / "candidates.tar", [("a-r0000", {"png": b""})])
    with pytest.raises(UserError, match=r"candidates.tar: a-r0000: found fields \['png'\]"):
        score.main(arguments(tmp_path, "psnr"))
    whole = (tmp_path / "lr.tar").read_bytes()
    (tmp_path / "lr.tar").write_bytes(whole[:1500])
    with pytest.raises(UserError, match=r"lr.tar: truncated"):
        score.main(arguments(tmp_path, "psnr"))
