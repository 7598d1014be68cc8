"""What users and disks do wrong: a stage says it in one line on standard error, without a traceback.

Mistakes in config keys, metrics and N are in tests/workflow/test_config_errors.py.
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import tiny_shards
from dp2osr import stage, tables
from dp2osr.stages import derive, embed, ingest, pairs

Fails = Callable[..., str]
DERIVE = {"kind": "bicubic", "sigma": 0.0, "scale": 4, "image_format": "png"}


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fails:
    """Return a function that runs a stage's command line, and returns the one line with which it ends."""
    monkeypatch.delenv("DP2OSR_DEBUG", raising=False)

    def call(main: Callable[[], None], **options: Any) -> str:
        monkeypatch.setattr(sys, "argv", ["stage", *arguments(**options)])
        with pytest.raises(SystemExit) as ended:
            stage.run(main)
        assert ended.value.code == 1
        told = capsys.readouterr().err
        assert "Traceback" not in told
        (line,) = [line for line in told.splitlines() if line.startswith("error: ")]
        assert told.endswith(line + "\n")
        return line

    return call


def arguments(**options: Any) -> list[str]:
    """Return options as a command line; a dictionary becomes JSON."""
    texts = {name: json.dumps(value) if isinstance(value, dict) else str(value) for name, value in options.items()}
    return [part for name, text in texts.items() for part in (f"--{name.replace('_', '-')}", text)]


def ingest_job(config_dict: dict[str, Any], *entries: Path) -> dict[str, Any]:
    settings = config_dict["dataset_defaults"] | {"images": [str(entry) for entry in entries], "downscale": 1}
    return {name: settings[name] for name in ingest.IngestJob.model_fields if name != "seed"} | {"seed": 0}


def pairs_job(config_dict: dict[str, Any]) -> dict[str, Any]:
    return {"pairs": config_dict["run_defaults"]["pairs"] | {"top": 1}, "seed": 0}


@pytest.fixture
def rewards(tmp_path: Path) -> Path:
    """Return a rewards table of 200 groups of four, written without a schema."""
    groups = [name for name in tiny_shards.names(200) for _ in range(4)]
    table = {"group_id": groups, "rollout": np.tile(np.arange(4, dtype=np.int32), 200)}
    values = np.random.default_rng(0).random(len(groups))
    pd.DataFrame(table | {"reward": values, "fr": values, "nr": values}).to_parquet(tmp_path / "rewards.parquet")
    return tmp_path / "rewards.parquet"


def photo(path: Path) -> bytes:
    """Write a PNG of 128 x 128 pixels of noise and return its bytes."""
    pixels = np.random.default_rng(len(path.name)).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path.read_bytes()


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[str], None]]:
    """Mount a file system of 64 KiB at `folder`; yields a function that mounts it again with other options."""
    folder.mkdir()

    def mount(options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no permission to mount a small disk: {error}")

    mount("size=64k")
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_folder_without_images(tmp_path: Path, config_dict: dict[str, Any], fails: Fails) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "notes.txt").write_text("no image")
    line = fails(ingest.main, config=ingest_job(config_dict, folder), images=tmp_path / "images.parquet")
    assert f"images: {folder}: no image there" in line
    assert not (tmp_path / "images.parquet").exists()


def test_a_truncated_png_is_a_recorded_row(tmp_path: Path, config_dict: dict[str, Any]) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    photo(folder / "whole.png")
    cut = folder / "cut.png"
    cut.write_bytes(photo(cut)[:5000])
    output = tmp_path / "images.parquet"
    ingest.main(arguments(config=ingest_job(config_dict, folder), images=output))
    table = tables.read(output, tables.IMAGES)
    (bad,) = table[table["source"] == str(cut)].to_dict("records")
    assert (bad["status"], bad["shard"]) == ("rejected", -1)
    assert "truncated" in bad["reason"]
    assert (table.loc[table["source"] != str(cut), "status"] == "ok").all()


def test_missing_weights(tmp_path: Path, config_dict: dict[str, Any], fails: Fails) -> None:
    prompts = pd.DataFrame({"group_id": tiny_shards.names(1), "prompt": [""], "status": ["ok"]})
    tables.write(prompts, tmp_path / "prompts.parquet", tables.PROMPTS)
    policy = config_dict["policy_defaults"] | {"model": str(tmp_path / "no-such-model")}
    line = fails(
        embed.main,
        prompts=tmp_path / "prompts.parquet",
        embeddings=tmp_path / "embeddings.safetensors",
        device="cpu",
        config=policy,
    )
    assert "no-such-model" in line


@pytest.mark.parametrize("kept", [0.5, -1024], ids=["in a member", "only the end mark"])
def test_a_truncated_shard(tmp_path: Path, fails: Fails, kept: float) -> None:
    shard = tiny_shards.write_lr(tmp_path / "shard-0000.tar", tiny_shards.names(4))
    data = shard.read_bytes()
    length = len(data.rstrip(b"\0")) // 512 * 512 + 512 if kept < 0 else int(len(data) * kept)
    shard.write_bytes(data[:length])
    line = fails(derive.main, source=shard, candidates=tmp_path / "candidates.tar", config=DERIVE)
    assert f"shard {shard}: truncated" in line
    assert "delete it and run again" in line
    assert not (tmp_path / "candidates.tar").exists()


def test_a_table_without_a_column(
    tmp_path: Path, config_dict: dict[str, Any], rewards: Path, fails: Fails
) -> None:
    pd.read_parquet(rewards).drop(columns="reward").to_parquet(rewards)
    line = fails(pairs.main, rewards=rewards, pairs=tmp_path / "pairs.parquet", config=pairs_job(config_dict))
    assert str(rewards) in line and "'reward'" in line


def test_a_full_disk(tmp_path: Path, config_dict: dict[str, Any], rewards: Path, fails: Fails) -> None:
    folder = tmp_path / "results"
    with small_disk(folder):
        with contextlib.suppress(OSError), (folder / "others").open("wb", buffering=0) as handle:
            while True:
                handle.write(bytes(4096))
        line = fails(pairs.main, rewards=rewards, pairs=folder / "pairs.parquet", config=pairs_job(config_dict))
        assert "No space left on device" in line
        assert [path.name for path in folder.iterdir()] == ["others"]  # no half-written table


def test_a_read_only_folder(tmp_path: Path, config_dict: dict[str, Any], rewards: Path, fails: Fails) -> None:
    folder = tmp_path / "results"
    with small_disk(folder) as mount:
        mount("remount,ro")
        line = fails(pairs.main, rewards=rewards, pairs=folder / "pairs.parquet", config=pairs_job(config_dict))
        assert "Read-only file system" in line and "pairs.parquet" in line


def test_as_a_command_it_ends_in_one_line(tmp_path: Path, config_dict: dict[str, Any]) -> None:
    options = {"rewards": tmp_path / "none.parquet", "pairs": tmp_path / "pairs.parquet"}
    command = [sys.executable, "-m", "dp2osr.stages.pairs", *arguments(**options, config=pairs_job(config_dict))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"error: table {options['rewards']}: not found"]
