"""The score stage: long table, statuses, resumed equals undisturbed byte for byte, clear errors."""

import json
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from dp2osr import tables, versions
from dp2osr.config import RewardSettings
from dp2osr.errors import UserError
from dp2osr.iqa.metric import Scorer
from dp2osr.preference.reward import rewards
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


def test_no_number_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN and infinity stay what they are, each with its status, and neither enters a reward or moves another's."""
    write_inputs(tmp_path)
    original = Scorer._call
    monkeypatch.setattr(Scorer, "_call", lambda self, *given: spoil(given[0], original(self, *given)))

    def spoil(name: str, values: np.ndarray) -> np.ndarray:
        values[1] = np.inf if name == "psnr" else np.nan
        return values

    score.main(arguments(tmp_path, "psnr", "gmsd"))
    frame = tables.read(tmp_path / "scores.parquet", tables.SCORES)
    bad = frame[frame["status"] != "ok"]
    assert set(bad["rollout"]) == {1} and len(bad) == 2 * len(GROUPS)
    assert bad.groupby("metric")["status"].unique().map(list).to_dict() == {"gmsd": ["nan"], "psnr": ["inf"]}
    assert np.isposinf(bad["score"][bad["metric"] == "psnr"]).all()
    settings = RewardSettings(fr=["psnr"], nr=[], weight_fr=0.5, num_rollouts=ROLLOUTS)
    for used in ("psnr", "gmsd"):
        rewarded, scales = rewards(frame, settings.model_copy(update={"fr": [used]}))
        assert set(rewarded["reward"][rewarded["rollout"] != 1]) == {0.0, 1.0}
        assert rewarded["reward"][rewarded["rollout"] == 1].isna().all()
        assert set(rewarded["rank"][rewarded["rollout"] == 1]) == {-1}
        assert np.isfinite(scales[["min", "max"]].to_numpy()).all()


def test_a_crash_names_the_candidate_and_keeps_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_inputs(tmp_path)
    monkeypatch.setattr(score, "CHUNK", 2)
    original = Scorer._call
    calls = 0

    def failing(self: Scorer, name: str, *images: torch.Tensor) -> np.ndarray:
        nonlocal calls
        calls += name == "gmsd"
        if name == "gmsd" and calls > 2:
            raise ValueError("negative\nsize")
        return original(self, name, *images)

    monkeypatch.setattr(Scorer, "_call", failing)
    with pytest.raises(UserError) as caught:
        score.main(arguments(tmp_path, "psnr", "gmsd"))
    assert str(caught.value) == f"metric 'gmsd': group {GROUPS[1]}, rollout 0: ValueError: negative size"
    (folder,) = (tmp_path / "scores.parquet.parts").iterdir()
    assert [part.name for part in folder.iterdir()] == ["000000.json"]
    assert not (tmp_path / "scores.parquet").exists()


def test_the_rates_are_in_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of images that a metric has scored: none of a metric for which all are too small."""
    write_inputs(tmp_path)
    score.main(arguments(tmp_path, "psnr", "ms_ssim"))
    log = capsys.readouterr().err
    told = re.findall(r"(\S+): ([\d.]+) images/s \((cpu)\), (\d+) images in ([\d.]+) s", log)
    assert [(name, count) for name, _, _, count, _ in told] == [("psnr", str(len(GROUPS) * ROLLOUTS))]
    assert re.search(r"reading and decoding: the metrics waited [\d.]+ s", log)
    assert "ms_ssim: 9 of 9 scores are too_small" in log


@pytest.mark.parametrize("cut", [0, 40, 500])
def test_a_damaged_image_is_named(tmp_path: Path, cut: int) -> None:
    write_inputs(tmp_path)
    for shard, wanted in (
        ("candidates.tar", f"candidates .*candidates.tar: group {GROUPS[1]}, rollout 1: no readable PNG or WebP image"),
        ("lr.tar", f"LR shard .*lr.tar: {GROUPS[1]}.hr.png: no readable PNG or WebP image"),
    ):
        samples = [(key, dict(fields)) for key, fields in read_shard(tmp_path / shard)]
        fields = samples[4 if shard == "candidates.tar" else 1][1]
        name = "png" if shard == "candidates.tar" else "hr.png"
        whole = fields[name]
        fields[name] = whole[:cut]
        write_shard(tmp_path / shard, samples)
        with pytest.raises(UserError, match=wanted):
            score.main(arguments(tmp_path, "psnr"))
        fields[name] = whole
        write_shard(tmp_path / shard, samples)


@pytest.mark.parametrize("json_text", [b"{}", b"no", b'{"group_id": "a", "rollout": null}'])
def test_damaged_notes_are_named(tmp_path: Path, json_text: bytes) -> None:
    write_inputs(tmp_path)
    write_shard(
        tmp_path / "candidates.tar", [("a-r0000", {"png": encode_image(torch.rand(3, 8, 8)), "json": json_text})]
    )
    with pytest.raises(UserError, match=r"candidates.tar: a-r0000.json: wanted group_id and rollout"):
        score.main(arguments(tmp_path, "piqe"))


def test_truncated_candidates_are_found_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    candidates, _ = write_inputs(tmp_path)
    whole = candidates.read_bytes()
    monkeypatch.setattr(Scorer, "score", None)
    with tarfile.open(candidates) as tar:
        last = tar.getmembers()[-1]
    end = last.offset_data + (last.size + 511) // 512 * 512
    for size in (end, end + 512, last.offset, last.offset_data + 1, 700):
        candidates.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"candidates.tar: truncated"):
            score.main(arguments(tmp_path, "psnr"))


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
