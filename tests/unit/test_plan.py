"""`dp2osr plan`: rows by hand, what is given, measured and unknown, and how it is printed."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from dp2osr import cli, config, tables
from dp2osr.config import Config
from dp2osr.errors import UserError
from dp2osr.plan import PNG_BYTES, SAMPLE_BYTES, Amount, Facts, Planner, Row, check_names
from dp2osr.plan_facts import gather


@pytest.fixture
def settings(config_dict: dict[str, Any], tmp_path: Path) -> Config:
    config_dict["results"] = str(tmp_path / "results")
    return config.load(config_dict)


def rows(settings: Config, facts: Facts) -> dict[tuple[str, str], Row]:
    return {(row.stage, row.subject): row for row in Planner(settings, facts, {}).rows()}


def test_images_hours_and_bytes_by_hand(settings: Config) -> None:
    facts = Facts(images={"train": Amount(10, "given")}, given={"rollout": 2.5, "train": 0.5})
    found = rows(settings, facts)
    rollout = found["rollout", "train, base"]
    assert (rollout.jobs, rollout.images, rollout.seconds, rollout.origin) == (1, Amount(160, "given"), 2.5, "given")
    assert rollout.hours == pytest.approx(160 * 2.5 / 3600)
    assert rollout.num_bytes == 160 * (PNG_BYTES * 96 * 96 + SAMPLE_BYTES)
    assert found["encode", "default"].images == Amount(10 * 8, "given", True)
    assert found["train", "default"].images == Amount(80 * 4 * 8, "steps x images", True)
    assert found["train", "default"].hours == pytest.approx(2560 * 0.5 / 3600)
    assert found["score", "train, base"].images == Amount(160, "given")
    unknown = found["rollout", "holdout, base"]
    assert (unknown.images, unknown.hours, unknown.num_bytes) == (None, None, None)


def test_jobs_follow_shards_blocks_and_groups(config_dict: dict[str, Any]) -> None:
    config_dict["datasets"]["train"]["num_shards"] = 300
    config_dict["rollout"]["rollouts_per_block"] = 3
    config_dict["iqa"]["groups"]["extra"] = ["psnr"]
    config_dict["runs"]["default"] = {"controls": ["averaged", "bicubic", "blurred"]}
    found = rows(config.load(config_dict), Facts())
    assert found["rollout", "train, base"].jobs == found["score", "train, base"].jobs / 2 == 300 * 6
    assert found["encode", "default"].jobs == 300
    assert found["derive", "holdout, blurred"].jobs == 6
    assert found["derive", "holdout, bicubic"].jobs == found["derive", "holdout, averaged"].jobs == 1
    assert found["score", "holdout, averaged"].jobs == 2
    assert ("rollout", "val, default") not in found and ("degrade", "base") not in found


def test_prompts_that_a_model_writes(config_dict: dict[str, Any]) -> None:
    config_dict["datasets"]["train"]["prompt"] = {"source": "caption", "caption": {"model": "weights/captions"}}
    found = rows(config.load(config_dict), Facts(images={"train": Amount(10, "given"), "val": Amount(6, "given")}))
    assert ("describe", "train") in found and ("prompt", "train") not in found and ("prompt", "val") in found
    assert found["embed", "train, base"].images == Amount(10, "given", True)
    assert found["embed", "val, base"].images == Amount(1, "one prompt a shard")


def test_what_is_counted_and_what_is_listed(settings: Config, tmp_path: Path) -> None:
    facts = gather(settings, given_images={}, given_seconds={})
    assert facts.images["train"] == Amount(21 * 6, "files x 6 crops", True)
    assert facts.images["holdout"] == Amount(7 * 4, "files x 4 crops", True)
    write_images(tmp_path / "results" / "train" / "images.parquet", ok=5, rejected=2)
    facts = gather(settings, given_images={"val": 9}, given_seconds={})
    assert facts.images["train"] == Amount(5, "images.parquet")
    assert facts.images["val"] == Amount(9, "given")


def write_images(path: Path, *, ok: int, rejected: int) -> None:
    count = ok + rejected
    frame = pd.DataFrame({"image_id": [f"{index:03d}" for index in range(count)], "photo_id": "p", "source": "s"})
    frame = frame.assign(sha256="", width=1, height=1, crop_x=0, crop_y=0, crop_size=1, split="train", reason="")
    frame["status"] = ["ok"] * ok + ["rejected"] * rejected
    frame["shard"] = [0] * ok + [-1] * rejected
    path.parent.mkdir(parents=True, exist_ok=True)
    tables.write(frame, path, tables.IMAGES)


def test_folders_are_counted_and_archives_are_not(config_dict: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.JPG", "notes.txt"):
        (tmp_path / "in" / name).touch()
    config_dict["results"] = str(tmp_path / "results")
    config_dict["datasets"]["train"] = {"images": [str(tmp_path / "in")], "crop": "center"}
    assert gather(config.load(config_dict), given_images={}, given_seconds={}).images["train"] == Amount(
        2, "files x 1 crops", True
    )
    (tmp_path / "in" / "shard.tar").touch()
    assert "train" not in gather(config.load(config_dict), given_images={}, given_seconds={}).images


def test_earlier_jobs_are_measured(settings: Config, tmp_path: Path) -> None:
    results = tmp_path / "results"
    write_images(results / "train" / "images.parquet", ok=5, rejected=2)
    benchmark(results / "benchmarks/train/base/rollout/shard-0000.block-000.tsv", 40.0)
    benchmark(results / "benchmarks/train/base/score/light/shard-0000.block-000.tsv", 8.0)
    shard = results / "train/base/candidates/shard-0000.block-000.tar"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(bytes(80_000))
    facts = gather(settings, given_images={}, given_seconds={})
    assert facts.seconds == {("rollout", "base"): 40 / (5 * 16), ("score", "light"): 8 / (5 * 16)}
    found = rows(settings, facts)
    assert found["rollout", "holdout, base"].seconds == 0.5 and found["rollout", "holdout, default"].seconds == 0.5
    assert found["rollout", "train, base"].origin == "measured"
    assert found["rollout", "train, base"].num_bytes == 80_000
    given = gather(settings, given_images={}, given_seconds={"rollout": 3.0})
    assert rows(settings, given)["rollout", "train, base"].origin == "given"


def benchmark(path: Path, seconds: float) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(f"s\th:m:s\tmax_rss\n{seconds}\t0:00:40\t1.0\n")


def test_unknown_names_are_named(settings: Config) -> None:
    with pytest.raises(UserError, match="--images trian: unknown; wanted one of base, holdout, pristine, train, val"):
        check_names(settings, images={"trian": 3}, seconds={})
    with pytest.raises(UserError, match="--seconds rolout: unknown; wanted one of degrade"):
        check_names(settings, images={}, seconds={"rolout": 3.0})


@pytest.fixture
def files(config_dict: dict[str, Any], tmp_path: Path) -> list[str]:
    """Return the command of a plan on the embedded model in an empty folder."""
    config_dict["results"] = str(tmp_path / "results")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config_dict))
    return ["plan", "--config", str(tmp_path / "config.yaml")]


def test_printed_plan(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    cli.main([*files, "--images", "train=100", "--seconds", "rollout=9", "score=1"])
    found = capsys.readouterr().out
    lines = {" ".join(line.split()[:3]): line.split() for line in found.splitlines()}
    assert lines["rollout train, base"][3:9] == ["GPU", "1", "1,600", "9", "given", "4"]
    assert "seconds of an image in train are unknown: give --seconds train=S" in found
    assert "base: builtin:tiny-sd: backbone" in found and "at most (fits an 80 GB card)" in found


def test_json_has_the_same_figures(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    cli.main([*files, "--json", "--images", "train=100", "--seconds", "rollout=9"])
    found = json.loads(capsys.readouterr().out)
    (row,) = [row for row in found["rows"] if row["stage"] == "rollout" and row["subject"] == "train, base"]
    assert (row["images"]["count"], row["hours"], row["origin"]) == (1600, 4.0, "given")
    assert {(need["stage"], need["subject"]) for need in found["memory"]} == {
        ("embed", "base"),
        ("rollout", "base"),
        ("encode", "base"),
        ("score", "light"),
        ("train", "default"),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--images", "trian=3"], "--images trian: unknown"),
        (["--architecture", "sd3"], "--architecture sd3: unknown"),
        (["--configfile", "absent.yaml"], "config file absent.yaml: not found"),
    ],
)
def test_mistakes_are_one_line(
    files: list[str], capsys: pytest.CaptureFixture[str], change: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([*files, *change])
    assert stopped.value.code == 1 and message in capsys.readouterr().err.strip().splitlines()[-1]


def test_model_that_is_not_here(config_dict: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    config_dict["policy_defaults"]["model"] = "weights/absent"
    config_dict["results"] = str(tmp_path / "results")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config_dict))
    cli.main(["plan", "--config", str(tmp_path / "config.yaml")])
    found = capsys.readouterr().out
    assert "policy base: model weights/absent: not found here; its sizes need --architecture" in found
    assert "score, light" in found and "rollout, base" not in found and "train, default" not in found
