"""Wrong input and full or read-only disks: one clear line each, no traceback, and no half-written file."""

import contextlib
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dp2osr import config, stage, tables
from dp2osr.stages import degrade, embed, ingest, pairs, reward, rollout, score
from workflow_rig import CONFIG, SMALLEST, Workflow

SETTINGS = config.read(CONFIG, SMALLEST)
Main = Callable[[Sequence[str] | None], None]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return a function that runs a stage, which has to fail, and returns its one line of error."""
    monkeypatch.setattr(logging, "raiseExceptions", False)  # pyiqa's log goes on to the stream of an earlier test
    monkeypatch.delenv("DP2OSR_DEBUG", raising=False)

    def run(main: Main, job: Any, **options: Any) -> str:
        given = [str(part) for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
        with pytest.raises(SystemExit) as stopped:
            stage.run(lambda: main([*given, "--config", json.dumps(job)]))
        text = capsys.readouterr().err
        errors = [line for line in text.splitlines() if "error: " in line]
        assert stopped.value.code in (1, 2) and len(errors) == 1 and "Traceback" not in text, text
        return errors[0].partition("error: ")[2]

    return run


@pytest.fixture(scope="module")
def results(smallest: Workflow) -> Path:
    return smallest.directory / "results"


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Return a folder of two photographs of noise."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (128, 128, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def ingest_job(entry: Path, **changes: Any) -> dict[str, Any]:
    settings = SETTINGS.datasets["train"].model_dump(exclude={"degradation", "prompt"})
    return settings | {"images": [str(entry)], "seed": 0} | changes


def degrade_job() -> dict[str, Any]:
    settings = SETTINGS.datasets["train"].model_dump(include={"downscale", "max_pixels", "degradation"})
    return settings | {"seed": 0}


def policy_job(model: Path) -> dict[str, Any]:
    return SETTINGS.policies["base"].model_dump() | {"model": str(model), "control": str(model / "controlnet")}


def truncated(path: Path, folder: Path, share: float) -> Path:
    """Write the first `share` of a file's bytes to a new file."""
    data = path.read_bytes()
    cut = folder / path.name
    cut.write_bytes(data[: int(share * len(data))])
    return cut


def without(path: Path, column: str, folder: Path) -> Path:
    """Write a table again, less one column."""
    copy = folder / path.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pq.read_table(path).drop_columns([column]), copy)
    return copy


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """Mount a file system in memory, or skip the test where this user may not."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a writer that failed may wait for its end


def test_unknown_key(fails: Callable[..., str], photographs: Path, tmp_path: Path) -> None:
    line = fails(ingest.main, ingest_job(photographs, crop_per_image=3), images=tmp_path / "images.parquet")
    assert "crop_per_image: unknown key" in line


def test_misspelt_metric(fails: Callable[..., str], results: Path, tmp_path: Path) -> None:
    paths = {"candidates": results / "train/base/candidates/shard-0000.block-000.tar"}
    paths |= {"lr": results / "train/lr/shard-0000.tar", "scores": tmp_path / "scores.parquet"}
    line = fails(score.main, {"metrics": ["gmds"], "niqe_block": 32}, device="cpu", **paths)
    assert "'gmds'" in line and "wanted one of" in line and "gmsd" in line


def test_more_winners_than_half_the_candidates(fails: Callable[..., str], results: Path, tmp_path: Path) -> None:
    job = {"pairs": SETTINGS.runs["default"].pairs.model_dump() | {"top": 3}, "seed": 0}
    rewards = results / "train/base/rewards/default.parquet"
    line = fails(pairs.main, job, rewards=rewards, pairs=tmp_path / "pairs.parquet")
    assert line.startswith("pairs.top: found 3")


def test_missing_weights(fails: Callable[..., str], results: Path, tiny_model: Path, tmp_path: Path) -> None:
    prompts = results / "train/prompts/shard-0000.parquet"
    absent = tmp_path / "absent"
    line = fails(embed.main, policy_job(absent), prompts=prompts, device="cpu", embeddings=tmp_path / "e.safetensors")
    assert str(absent) in line and "not found" in line
    job = {"policy": policy_job(tiny_model), "seed": 0, "first": 0, "count": 1, "scale": 4, "image_format": "png"}
    paths = {"lr": results / "train/lr/shard-0000.tar", "candidates": tmp_path / "c.tar", "control": absent}
    paths |= {"embeddings": results / "train/base/embeddings/shard-0000.safetensors"}
    line = fails(rollout.main, job, batch_size=4, speed=SETTINGS.rollout.speed.model_dump_json(), device="cpu", **paths)
    assert str(absent) in line and "not found" in line


def test_folder_without_images_stops_the_workflow(tmp_path: Path) -> None:
    """The stage's line is in the log that Snakemake names and shows."""
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("no image")
    target = "results/train/images.parquet"
    changes = {"datasets": {"train": {"images": [str(empty)]}}}
    done = Workflow(tmp_path).snakemake("--cores", "1", target, changes=changes)
    log = (tmp_path / "results/logs/train/ingest.log").read_text()
    assert done.returncode != 0 and "results/logs/train/ingest.log" in done.stdout
    assert log.startswith(f"error: images: {empty}: no image there") and log.count("\n") == 1
    assert not (tmp_path / target).exists()


def test_truncated_png_is_a_row_with_a_reason(photographs: Path, tmp_path: Path) -> None:
    cut = truncated(photographs / "0.png", tmp_path, 0.5)
    cut.rename(photographs / "cut.png")
    ingest.main(["--config", json.dumps(ingest_job(photographs)), "--images", str(tmp_path / "images.parquet")])
    frame = tables.read(tmp_path / "images.parquet", tables.IMAGES)
    bad = frame[frame["status"] == "rejected"]
    assert bad["source"].str.endswith("cut.png").tolist() == [True] and "truncated" in bad["reason"].iloc[0]
    assert (frame["status"] == "ok").sum() == 2


def test_as_a_command_it_ends_in_one_line(tmp_path: Path) -> None:
    job = {"pairs": SETTINGS.runs["default"].pairs.model_dump(), "seed": 0}
    missing, output = tmp_path / "none.parquet", tmp_path / "pairs.parquet"
    command = [sys.executable, "-m", "dp2osr.stages.pairs", "--rewards", str(missing), "--pairs", str(output)]
    done = subprocess.run([*command, "--config", json.dumps(job)], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr == f"error: table {missing}: not found\n"


@pytest.mark.parametrize("where", ["in a member", "before the end mark"])
def test_truncated_shard(fails: Callable[..., str], results: Path, tmp_path: Path, where: str) -> None:
    whole = results / "train/base/candidates/shard-0000.block-000.tar"
    cut = truncated(whole, tmp_path, 0.5)
    if where == "before the end mark":
        data = whole.read_bytes().rstrip(b"\0")
        cut.write_bytes(data + bytes(-len(data) % 512))
    paths = {"candidates": cut, "lr": results / "train/lr/shard-0000.tar", "scores": tmp_path / "scores.parquet"}
    line = fails(score.main, {"metrics": ["gmsd"], "niqe_block": 32}, device="cpu", **paths)
    assert str(cut) in line and "delete it and run again" in line
    assert not paths["scores"].exists()


def test_table_without_a_column(fails: Callable[..., str], results: Path, tmp_path: Path) -> None:
    rewards = without(results / "train/base/rewards/default.parquet", "reward", tmp_path)
    job = {"pairs": SETTINGS.runs["default"].pairs.model_dump(), "seed": 0}
    line = fails(pairs.main, job, rewards=rewards, pairs=tmp_path / "pairs.parquet")
    assert str(rewards) in line and "column 'reward' is missing" in line
    without(results / "train/base/scores/light/shard-0000.block-000.parquet", "score", tmp_path / "light")
    job = {"reward": SETTINGS.rewards["default"].model_dump(), "num_candidates": 4}
    job |= {"groups": ["light"], "shards": ["0000"], "blocks": ["000"]}
    line = fails(reward.main, job, scores=tmp_path, rewards=tmp_path / "r.parquet", scales=tmp_path / "s.parquet")
    assert "column 'score' is missing" in line


def test_full_disk(fails: Callable[..., str], results: Path, photographs: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "full", "size=8k") as disk:
        (disk / "filling").write_bytes(bytes(8000))
        line = fails(ingest.main, ingest_job(photographs), images=disk / "images.parquet")
        assert "No space left on device" in line
        images = results / "train/images.parquet"
        line = fails(degrade.main, degrade_job(), images=images, shard=0, device="cpu", lr=disk / "shard-0000.tar")
        assert "No space left on device" in line
        assert [path.name for path in disk.iterdir()] == ["filling"]


def test_read_only_results(fails: Callable[..., str], photographs: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "frozen", "ro") as disk:
        line = fails(ingest.main, ingest_job(photographs), images=disk / "train" / "images.parquet")
        assert "Read-only file system" in line
