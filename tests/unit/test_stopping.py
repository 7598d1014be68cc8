"""SIGTERM: at once where nothing is in hand, after the item in hand where something is, and told on by Snakemake."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dp2osr import stage, stopping

SNAKEMAKE = """
import signal, subprocess, sys
from dp2osr import stopping
stopping.forward()
signal.signal(signal.SIGTERM, lambda *_: None)  # as Snakemake's: it waits for its job
sys.exit(subprocess.run(sys.argv[1], shell=True).returncode)
"""
STAGE = "trap : TERM; {python} -c 'import time; print(\"runs\", flush=True); time.sleep(60)' || (echo code $?; exit 7)"


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Iterator[stopping.StopRequest]:
    """Return a request that listens, and that `stage.progress` asks, for one test."""
    before, request = signal.getsignal(signal.SIGTERM), stopping.StopRequest()
    monkeypatch.setattr(stage, "STOP", request)
    request.listen()
    yield request
    signal.signal(signal.SIGTERM, before)


def test_nothing_in_hand_ends_at_once(stop: stopping.StopRequest, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        terminate()
    assert ended.value.code == 143
    assert capfd.readouterr().err == "SIGTERM: stopped; the same command goes on from what was kept\n"


def test_what_is_in_hand_is_finished(stop: stopping.StopRequest, capfd: pytest.CaptureFixture[str]) -> None:
    with stop.in_hand():
        assert not stop.requested
        terminate()
        terminate()  # SLURM and Snakemake may both tell it
        assert stop.requested
    assert capfd.readouterr().err == "SIGTERM: stopping as soon as what is in hand is kept\n"


def test_progress_stops_between_two_items(stop: stopping.StopRequest, caplog: pytest.LogCaptureFixture) -> None:
    kept = []
    with caplog.at_level(logging.INFO), pytest.raises(SystemExit) as ended:
        for item in stage.progress("abcd", 4, "batches", logging.getLogger("x")):
            if item == "b":
                terminate()
            kept.append(item)
    assert ended.value.code == 143 and kept == ["a", "b"]
    assert caplog.messages[-1].startswith("batches: stopped by SIGTERM after 2 of 4; the same command goes on")


def test_progress_goes_on_after_the_last_item(stop: stopping.StopRequest) -> None:
    for item in stage.progress("ab", 2, "batches", logging.getLogger("x")):
        if item == "b":
            terminate()
    with pytest.raises(SystemExit):  # nothing is in hand any more
        terminate()


def test_snakemake_tells_the_stage_and_the_shell_waits(tmp_path: Path) -> None:
    """Only Snakemake gets the signal, as from SLURM under cgroups; the stage's exit code comes back."""
    command = [sys.executable, "-c", SNAKEMAKE, STAGE.format(python=sys.executable)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "runs\n"
        process.terminate()
        assert process.stdout.read() == "code 143\n"
    assert process.returncode == 7


def test_srun_is_not_told(tmp_path: Path) -> None:
    """SLURM tells the step that it starts; srun would kill it."""
    srun = tmp_path / "srun"
    srun.write_text("#!/bin/sh\necho runs\nread line\necho $line\n")
    srun.chmod(0o755)
    command = [sys.executable, "-c", SNAKEMAKE, f"trap : TERM; {srun} || (echo code $?; exit 7)"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "runs\n"
        process.terminate()
        time.sleep(1)
        process.stdin.write("done\n")
        process.stdin.close()
        assert process.stdout.read() == "done\n"
    assert process.returncode == 0
