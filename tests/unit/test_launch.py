"""Processes of a training: what each is told of the others, whose exit code counts, and who ends on SIGTERM."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from dp2osr.errors import UserError
from dp2osr.training import launch
from dp2osr.training.launch import Launcher, Place

ALONE = Place(1, 0, "127.0.0.1", 1)
SAVES = """
import os, signal, sys, time
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
open(f"up-{os.environ['RANK']}", "w").close()
while not told:
    time.sleep(0.02)
time.sleep(0.5 * int(os.environ["RANK"]))  # the others take longer
open(f"saved-{os.environ['RANK']}", "w").close()
sys.exit(143)
"""
FAILS = """
import os, sys, time
if os.environ["RANK"] == "1":
    sys.exit(3)
time.sleep(60)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder from which modules are run."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_NODES"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_what_each_process_is_told(here: Path) -> None:
    (here / "says.py").write_text(
        "import os, sys\nopen(sys.argv[1] + os.environ['RANK'], 'w').write(' '.join(sorted("
        "f'{k}={v}' for k, v in os.environ.items() if k.split('_')[0] in 'RANK LOCAL WORLD'.split())))"
    )
    assert Launcher().run("says", ["rank-"], Place(3, 1, "node0", 29), processes=2) == 0
    assert (here / "rank-3").read_text() == "LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 RANK=3 WORLD_SIZE=6"
    assert {path.name for path in here.glob("rank-*")} == {"rank-2", "rank-3"}


def test_the_first_failure_ends_all(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "PATIENCE_ERROR_S", 0.2)
    (here / "fails.py").write_text(FAILS)
    began = time.monotonic()
    assert Launcher().run("fails", [], ALONE, processes=2) == 3
    assert time.monotonic() - began < 30


def test_all_save_on_sigterm_however_often_it_comes(here: Path) -> None:
    (here / "saves.py").write_text(SAVES)

    def terminate() -> None:
        while len(list(here.glob("up-*"))) < 2:
            time.sleep(0.02)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)

    threading.Thread(target=terminate).start()
    before = signal.getsignal(signal.SIGTERM)
    assert Launcher().run("saves", [], ALONE, processes=2) == 143
    assert {path.name for path in here.glob("saved-*")} == {"saved-0", "saved-1"}
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_node_finds_its_place(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.place(1).address == "127.0.0.1"
    with pytest.raises(UserError, match=r"--nodes 2: found SLURM_STEP_NUM_NODES= and no NODE_RANK"):
        launch.place(2)
    (here / "scontrol").write_text('#!/bin/sh\n[ "$*" = "show hostnames gpu[07-08]" ] && printf "gpu07\\ngpu08\\n"')
    (here / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{here}:{os.environ['PATH']}")
    slurm = {"STEP_NUM_NODES": "2", "NODEID": "1", "STEP_NODELIST": "gpu[07-08]", "JOB_ID": "123456"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert launch.place(2) == Place(2, 1, "gpu07", 23456)
    with pytest.raises(UserError, match="SLURM_STEP_NUM_NODES=2 and no NODE_RANK"):
        launch.place(4)
    for name, value in {"NODE_RANK": "0", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"}.items():
        monkeypatch.setenv(name, value)
    assert launch.place(4) == Place(4, 0, "10.0.0.1", 7)


def test_one_process_needs_no_launcher_and_none_starts_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert launch.num_processes(0, "cpu") == 1 and launch.num_processes(3, "cpu") == 3
    assert [launch.needs_launch(*counts) for counts in ((1, 1), (2, 1), (1, 2))] == [False, True, True]
    monkeypatch.setenv("RANK", "0")
    assert not launch.needs_launch(2, 2)
