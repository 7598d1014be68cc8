"""`dp2osr status`: a results folder made by hand, in each state that a job can be in."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from dp2osr import cli, config, status, status_files, status_jobs, status_report, tables
from dp2osr.config import Config
from dp2osr.errors import UserError
from dp2osr.status import State
from dp2osr.status_files import Status

NOW = 1_800_000_000.0
AT = "2027-01-15 09:{:02d}:{:02d},000 "
BENCHMARK = "s\th:m:s\tmax_rss\n{}\t0:01:00\t100.0\n"
BLOCK = "shard-0000.block-000"


def write(path: Path, text: str = "", *, age_s: float = 0.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, (NOW - age_s, NOW - age_s))
    return path


def finish(results: Path, stage: str, *, seconds: float = 60, log: str = "", **wildcards: str) -> None:
    """Leave what a finished job leaves."""
    job = status_jobs.make(stage, **wildcards)
    write(results / job.output)
    write(results / job.log, log)
    write(results / job.benchmark, BENCHMARK.format(seconds))


def begin(results: Path, stage: str, log: str, *, age_s: float = 5.0, **wildcards: str) -> Path:
    """Leave what a job leaves that has no output yet; return the path of its log."""
    return write(results / status_jobs.make(stage, **wildcards).log, log, age_s=age_s)


def ingest(results: Path, dataset: str, images: int) -> None:
    frame = pd.DataFrame({"image_id": [f"{index:05d}" for index in range(images)], "photo_id": "p", "source": "s"})
    frame = frame.assign(sha256="", width=1, height=1, crop_x=0, crop_y=0, crop_size=1, split="train", reason="")
    frame = frame.assign(status="ok", shard=[index % 2 for index in range(images)])
    finish(results, "ingest", dataset=dataset)
    tables.write(frame, results / dataset / "images.parquet", tables.IMAGES)


@pytest.fixture
def settings(config_dict: dict[str, Any], tmp_path: Path) -> Config:
    """Return the default config with two shards and two blocks of 8 of its training set."""
    config_dict["results"] = str(tmp_path / "results")
    config_dict["datasets"]["train"]["num_shards"] = 2
    config_dict["rollout"]["rollouts_per_block"] = 8
    return config.load(config_dict)


def look(settings: Config | None, results: Path) -> Status:
    return status_files.look(results, settings, plan_of="config.yaml", now=NOW, stale_s=900)


def states(found: Status, stage: str) -> dict[str, State]:
    return {state.job.name: state for state in found.states if state.job.stage == stage}


@pytest.fixture
def results(settings: Config) -> Path:
    """Return a results folder of a run that is going on: rollouts in each state."""
    folder = Path(settings.results)
    ingest(folder, "train", 20)
    cell = {"dataset": "train", "policy": "base"}
    device = AT.format(0, 0) + "stage: device cuda (a card)\n"
    finish(folder, "rollout", seconds=100, log=device, **cell, shard="0000", block="000")
    line = "__main__: batches of 8 candidates: 5 of 10, 0.10/s, 50 s left\n"
    begin(folder, "rollout", device + AT.format(0, 50) + line, **cell, shard="0000", block="001")
    begin(folder, "rollout", device + "error: no room left\n", age_s=300, **cell, shard="0001", block="000")
    begin(folder, "rollout", device + AT.format(0, 30) + line, age_s=7200, **cell, shard="0001", block="001")
    return folder


def test_every_state(results: Path, settings: Config) -> None:
    found = look(settings, results)
    names = {name.rpartition("/")[2]: state for name, state in states(found, "rollout").items() if "train" in name}
    assert {name[6:10] + name[-3:]: state.state for name, state in names.items()} == {
        "0000000": "done",
        "0000001": "running",
        "0001000": "failed",
        "0001001": "stale",
    }
    running, failed = names["shard-0000.block-001"], names["shard-0001.block-000"]
    assert running.progress == status.Progress("batches of 8 candidates", 5, 10, 0.1, 50.0)
    assert (running.seconds, running.gpus, running.silent_s) == (50.0, 1, 5.0)
    assert failed.error == "no room left" and failed.silent_s == 300
    assert {state.state for state in states(found, "score").values()} == {"left"}
    assert len(found.states) == found.planned == len(status_jobs.planned(settings))


def test_sums_of_a_stage_by_hand(results: Path, settings: Config) -> None:
    row = next(row for row in look(settings, results).rows if row.stage == "rollout")
    others = sum("holdout" in name or "val" in name for name in states(look(settings, results), "rollout"))
    assert row.counts == {"done": 1, "running": 1, "failed": 1, "stale": 1, "left": others}
    assert row.images == 10 * 8 + 0.5 * 10 * 8 and row.whole
    assert row.rate == 80 / 100
    assert row.seconds == row.gpu_seconds == 100 + 50 + 0 + 30
    assert row.work_s == (50 - 5) + 100 * (2 + others)
    assert row.left_s == row.work_s


def test_text_names_the_last_error_and_its_log(results: Path, settings: Config) -> None:
    begin(results, "score", "error: older\n", age_s=4000, dataset="train", policy="base", metrics="light", shard="0000",
          block="000")  # fmt: skip
    begin(results, "rollout", "error: no room left\n", age_s=9000, dataset="val", policy="base", shard="0000",
          block="000")  # fmt: skip
    text = status_report.text(look(settings, results), stale_min=15)
    failed = text[text.index("failed, last error first") :].splitlines()
    log = f"{results}/logs/train/base/rollout/shard-0001.block-000.log"
    assert failed[1:4] == ["  no room left", f"    {log}, 5 min ago, and in 1 more logs", "  older"]
    assert "batches of 8 candidates 5 of 10, 0.1/s, 50 s left; heard of 5 s ago" in text
    assert "block-001.log: stale for 2 h; batches of 8 candidates 5 of 10" in text
    assert "0.05 GPU-hours" in text and "at 1 jobs at a time, as now" in text
    assert "\x1b" not in text


def test_json(results: Path, settings: Config) -> None:
    found = json.loads(status_report.as_json(look(settings, results)))
    assert found["counts"]["failed"] == found["counts"]["stale"] == found["counts"]["running"] == 1
    assert found["last_error"]["error"] == "no room left"
    assert found["last_error"]["log"] == "logs/train/base/rollout/shard-0001.block-000.log"
    assert found["gpu_seconds"] == 180 and found["plan"] == "config.yaml"
    assert {job["state"] for job in found["jobs"]} == {"running", "failed", "stale"}
    assert next(row for row in found["stages"] if row["stage"] == "rollout")["counts"]["done"] == 1


def test_without_a_config_nothing_is_guessed(results: Path) -> None:
    found = look(None, results)
    assert sum(row.counts["left"] for row in found.rows) == 0
    assert [row.images for row in found.rows if row.stage == "rollout"] == [None]
    text = status_report.text(found, stale_min=15)
    assert "what is left is not known" in text and "--configfile" in text and "left: " not in text
    assert json.loads(status_report.as_json(found))["work_s"] is None


def test_nothing_there(settings: Config, tmp_path: Path) -> None:
    found = look(settings, Path(settings.results))
    assert {state.state for state in found.states} == {"left"}
    text = status_report.text(found, stale_min=15)
    assert "no such folder yet" in text and "no job is running" in text
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "nothing there yet" in status_report.text(look(None, empty), stale_min=15)
    assert json.loads(status_report.as_json(look(None, empty)))["stages"] == []


def test_of_other_configs(results: Path, settings: Config) -> None:
    finish(results, "reward", dataset="train", policy="base", reward="another")
    write(results / "train" / "base" / "candidates" / "shard-0007.block-000.tar")
    write(results / "sweep" / "logs" / "train" / "ingest.log", "error: of another results folder\n")
    write(results / "notes.txt")
    found = look(settings, results)
    assert found.beyond == 2
    assert [name for name in states(found, "reward") if name.endswith("another")]
    assert "another results folder" not in status_report.text(found, stale_min=15)


def test_a_job_lives_where_its_parts_or_checkpoints_grow(results: Path, settings: Config) -> None:
    job = status_jobs.make("train", run="default")
    begin(results, "train", "", age_s=5000, run="default")
    assert states(look(settings, results), "train")[job.name].state == "stale"
    checkpoints = write(results / "runs/default/checkpoints/0123/step-000020/state.json").parents[1]
    os.utime(checkpoints, (NOW - 60, NOW - 60))
    os.utime(checkpoints.parent, (NOW - 6000, NOW - 6000))
    assert states(look(settings, results), "train")[job.name].silent_s == 60
    score = status_jobs.make("score", dataset="val", policy="base", metrics="light", shard="0000", block="000")
    folder = write(results / f"{score.output}.parts" / "0123" / "000000.json").parent
    for path in (folder, folder.parent):
        os.utime(path, (NOW - 3000, NOW - 3000))
    found = states(look(settings, results), "score")[score.name]
    assert (found.state, found.note) == ("stale", "log not readable (not there)")


def test_training_that_was_asked_to_stop(results: Path, settings: Config) -> None:
    log = AT.format(0, 0) + "dp2osr.training.loop: SIGTERM: saving a checkpoint and stopping\n"
    begin(results, "train", log, run="default")
    found = states(look(settings, results), "train")["runs/default/train"]
    assert (found.state, found.note) == ("stale", "stopped by SIGTERM, checkpoint saved")


def test_a_job_that_outlived_snakemake_has_no_benchmark(results: Path, settings: Config) -> None:
    log = AT.format(0, 0) + "stage: device cuda (a card)\n" + AT.format(5, 0) + "loop: last\n"
    finish(results, "train", log=log, run="default")
    (results / "benchmarks/runs/default/train.tsv").unlink()
    found = states(look(settings, results), "train")["runs/default/train"]
    assert (found.state, found.seconds, found.gpus) == ("done", 300, 1)


def test_logs_that_cannot_be_read(results: Path, settings: Config) -> None:
    (results / "logs/val/ingest.log").mkdir(parents=True)
    write(results / "logs/holdout/ingest.log").write_bytes(b"\xff\xfe\x00 half a li")
    write(results / "val/images.parquet", "no parquet")
    (results / "benchmarks/val").mkdir(parents=True)
    write(results / "benchmarks/val/ingest.tsv", "s\th:m:s\n")
    found = look(settings, results)
    ingested = states(found, "ingest")
    assert ingested["val/ingest"].state == "done" and ingested["val/ingest"].seconds is None
    assert any("val/images.parquet" in note for note in found.notes)
    (results / "val/images.parquet").unlink()
    os.utime(results / "logs/val/ingest.log", (NOW, NOW))
    again = states(look(settings, results), "ingest")["val/ingest"]
    assert again.state == "running" and "not readable" in again.note


def test_files_that_vanish_between_the_scan_and_the_reading(results: Path, settings: Config) -> None:
    plan = status_jobs.planned(settings)
    entries = status_files.scan(results).entries | {job.log for job in plan.values()}
    found = status_files.read_states(results, plan.values(), entries, plan, now=NOW, stale_s=900)
    assert len(found) == len(plan)


def test_nothing_is_written(results: Path, settings: Config) -> None:
    before = {path: path.stat().st_mtime_ns for path in results.rglob("*")}
    look(settings, results)
    assert {path: path.stat().st_mtime_ns for path in results.rglob("*")} == before


@pytest.mark.parametrize(
    ("log", "error"),
    [
        ("error: table s.parquet: not found\n", "table s.parquet: not found"),
        ("usage: score.py [-h]\nscore.py: error: argument --config: not JSON\n", "argument --config: not JSON"),
        ('Traceback (most recent call last):\n  File "a.py"\n    f()\nValueError: 3\n', "ValueError: 3"),
        ("Traceback (most recent call last):\n  File", "a traceback cut short"),
        (
            "error: loss nan\nTraceback (most recent call last):\n  x\ntorch.errors.ChildFailedError: \n",
            "loss nan",
        ),
        ("Traceback (most recent call last):\n  x\nKeyError: 1\n" + AT.format(0, 0) + "x: going on\n", ""),
        (AT.format(0, 0) + "x: degraded: 3 of 9, 1.00/s, 6 s left\n", ""),
        ("", ""),
    ],
)
def test_errors(log: str, error: str) -> None:
    assert status.find_error(log) == error


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("degrade: degraded: 3 of 9, 1.50/s, 4 s left", ("degraded", 3, 9, 1.5, 4.0)),
        ("a.loop: step 61 of 80: loss 0.1, 60 pairs/s, 0.5 steps/s, 38 s left", ("step", 61, 80, 0.5, 38.0)),
        ("a.loop: step 61 of 80: loss 0.1714, accuracy 0.922, 60 pairs/s", ("step", 61, 80, None, None)),
        ("a.loop: step 2 of 8: loss 0.1, 9e+03 pairs/s, 1e+03 steps/s, 0 s left", ("step", 2, 8, 1000.0, 0.0)),
        ("a.pretrain: vae 100/2000 loss 0.1, 12.0 steps/s, 158 s left", ("vae", 100, 2000, 12.0, 158.0)),
    ],
)
def test_progress_lines(line: str, wanted: tuple[Any, ...]) -> None:
    found = status.find_progress(AT.format(0, 0) + line + "\n" + AT.format(0, 1) + "x: psnr: 3 of 9 scores are nan\n")
    assert found == status.Progress(*wanted)
    assert status.find_progress("batches of 8: 1 of 2, 1/s, 1 s left") is None


def test_times_of_a_log() -> None:
    head, tail = AT.format(0, 0) + "x: a\n", "half a line\n" + AT.format(2, 30) + "x: b\n"
    assert status.elapsed(status.Log(head, tail, 0.0)) == 150
    assert status.elapsed(status.Log("", "", 0.0)) is None
    assert status.elapsed(status.Log("2027-99-99 99:99:99,000 x\n", "", 0.0)) is None


def test_devices() -> None:
    rank = AT.format(0, 0) + "stage: device cuda (a card)\n"
    assert status.num_gpus(rank) == 1 and status.num_gpus(rank * 4) == 4
    assert status.num_gpus(AT.format(0, 0) + "stage: device cpu\n") == 0
    assert status.num_gpus(AT.format(0, 0) + "score: niqe: 108.2 images/s (cuda:0)\n") == 1
    assert status.num_gpus("") is None


def test_progress_so_far_gives_the_time_left_where_no_job_is_finished(results: Path, settings: Config) -> None:
    log = AT.format(0, 0) + "x: a\n" + AT.format(1, 40) + "loop: step 20 of 80: loss 1, 9 pairs/s\n"
    begin(results, "train", log, run="default")
    row = next(row for row in look(settings, results).rows if row.stage == "train")
    assert row.job_s == pytest.approx(400) and row.work_s == row.left_s == pytest.approx(300)


def test_names_go_there_and_back(settings: Config) -> None:
    for job in status_jobs.planned(settings).values():
        assert status_jobs.from_log(job.log) == job
        found = status_jobs.from_output(job.output)
        assert found is not None and {found.stage, job.stage} in ({job.stage}, {"rollout", "derive"})
    assert status_jobs.from_log("logs/what/ever.log") is None and status_jobs.from_output("train/x.tar") is None


def test_command(
    results: Path, tmp_path: Path, config_dict: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config_dict | {"results": str(results)}))
    (tmp_path / "more.yaml").write_text("datasets: {train: {num_shards: 3}}")
    base = ["status", "--config", str(tmp_path / "config.yaml")]
    cli.dispatch([*base, "--json"])
    first = json.loads(capsys.readouterr().out)
    cli.dispatch([*base, "--configfile", str(tmp_path / "more.yaml"), "--stale", "1"])
    assert f"{results}: " in (text := capsys.readouterr().out) and "more.yaml" in text
    cli.dispatch([*base, str(tmp_path), "--json"])
    other = json.loads(capsys.readouterr().out)
    assert first["planned"] > 0 and other["planned"] == 0 and other["plan"] == ""
    with pytest.raises(UserError, match="not found"):
        cli.dispatch([*base, str(tmp_path / "none")])


def test_no_torch() -> None:
    code = "import sys, dp2osr.status_report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_four_thousand_jobs(config_dict: dict[str, Any], tmp_path: Path) -> None:
    results = tmp_path / "results"
    config_dict["datasets"]["train"]["num_shards"] = 300
    config_dict["rollout"]["rollouts_per_block"] = 3
    settings = config.load(config_dict | {"results": str(results)})
    ingest(results, "train", 3000)
    plan = status_jobs.planned(settings)
    log = "".join(AT.format(0, at) + f"x: chunks: {at} of 60, 1.00/s, {60 - at} s left\n" for at in range(60))
    for at, job in enumerate(plan.values()):
        write(results / job.log, log)
        if at % 20:
            write(results / job.benchmark, BENCHMARK.format(60))
            if job.output not in ("train/images.parquet",):
                write(results / job.output)
    started = time.perf_counter()
    found = look(settings, results)
    text = status_report.text(found, stale_min=15)
    seconds = time.perf_counter() - started
    print(f"{len(found.states)} jobs in {seconds:.2f} s")  # noqa: T201
    assert len(found.states) == len(plan) > 4000 and "more jobs" in text
    assert seconds < 30
