"""The train stage from its command line: killed and resumed, stopped politely, on two processes and two nodes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load

import training_rig
from dp2osr import tables
from dp2osr.errors import UserError
from dp2osr.stages import train
from dp2osr.training import step
from made_once import made_once

STEPS = 12


def command(model: Path, folder: Path, output: Path, **changes: Any) -> list[str]:
    """Return the arguments of a training with guard whose outputs lie in `output`."""
    base = {"steps": STEPS, "guard": {"every": 4, **training_rig.LENIENT}, "learning_rate": 1e-4}
    return training_rig.command(model, folder, output, **base | changes)


ACCELERATE = ["accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no"]
ACCELERATE += ["--main_process_port=0"]


def start(
    arguments: list[str], *, launcher: list[str] | None = None, log: Path | None = None, **variables: str
) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    with log.open("wb") if log else nullcontext() as stderr:
        command = [sys.executable, *(["-m", *launcher] if launcher else []), "-m", "dp2osr.stages.train", *arguments]
        return subprocess.Popen(command, env=environment, stderr=stderr)


def results(output: Path) -> tuple[pd.DataFrame, pd.DataFrame, bytes, dict[str, Any]]:
    log = tables.read(output / "train_log.parquet", tables.TRAIN_LOG).drop(columns="pairs_per_second")
    weights = (output / "policy" / "diffusion_pytorch_model.safetensors").read_bytes()
    record = json.loads((output / "policy" / "policy.json").read_text())
    return log, tables.read(output / "validation.parquet", tables.VALIDATION), weights, record


def assert_same_but_for_rounding(output: Path, undisturbed: Path) -> None:
    """Check a training that computed the same images in other batches."""
    found, wanted = results(output), results(undisturbed)
    weights, before = load(found[2]), load(wanted[2])
    assert max(float((weights[name] - before[name]).abs().max()) for name in before) < 1e-5
    # errors in float32 differ by 1e-8 with the size of a batch, and z is beta / 2 times their difference
    steep = ["loss", "abs_logit", "grad_norm"]
    pd.testing.assert_frame_equal(found[0].drop(columns=steep), wanted[0].drop(columns=steep), rtol=0, atol=1e-6)
    pd.testing.assert_frame_equal(found[0][steep], wanted[0][steep], rtol=1e-4, atol=2500 * 1e-7)
    columns = ["reward", "fr", "nr", "diversity"]
    pd.testing.assert_frame_equal(found[1][columns], wanted[1][columns], rtol=0, atol=1e-5)


def wait_for_a_checkpoint(output: Path) -> None:
    deadline = time.monotonic() + 200
    while not list(output.glob("checkpoints/*/step-*")) and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def train_once(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        assert start(command(tiny_model, folder, folder)).wait(300) == 0

    return made_once(tmp_path_factory, "undisturbed-training", train_once)


def test_outputs(undisturbed: Path) -> None:
    log, validation, _, record = results(undisturbed)
    assert log["step"].tolist() == list(range(1, STEPS + 1))
    assert log["loss"].iloc[0] == pytest.approx(0.693, abs=0.1) and log["abs_logit"].iloc[0] == 0
    assert validation["step"].tolist() == [0, 4, 8, 12] and validation["best"].iloc[0]
    assert record["step"] in (0, 4, 8, 12) and record["run"] == "test" and record["versions"]["torch"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_resumed_equals_undisturbed(
    undisturbed: Path, tiny_model: Path, tmp_path: Path, number: signal.Signals
) -> None:
    arguments = command(tiny_model, tmp_path, tmp_path)
    process = start(arguments)
    wait_for_a_checkpoint(tmp_path)
    process.send_signal(number)
    assert process.wait(100) == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    assert not (tmp_path / "policy").exists()
    train.main(arguments)
    found, wanted = results(tmp_path), results(undisturbed)
    pd.testing.assert_frame_equal(found[0], wanted[0], check_exact=True)
    pd.testing.assert_frame_equal(found[1], wanted[1], check_exact=True)
    assert found[2] == wanted[2]


@pytest.mark.parametrize(
    ("launcher", "sharding"), [(None, "none"), (ACCELERATE, "backbone")], ids=["own", "accelerate-sharded"]
)
def test_two_processes_equal_one(
    undisturbed: Path, tiny_model: Path, tmp_path: Path, launcher: list[str] | None, sharding: str
) -> None:
    """Groups of unlike numbers of pairs are shared out to 2 processes, whoever starts these, and so is the backbone."""
    arguments = command(tiny_model, tmp_path, tmp_path, sharding=sharding)
    process = start([*arguments, "--processes", "2"], launcher=launcher)
    assert process.wait(300) == 0
    assert_same_but_for_rounding(tmp_path, undisturbed)


def test_short_memory_leaves_a_smaller_micro_batch(
    undisturbed: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first step has 8 images, for which memory is short; the next try takes half as many at once, and ends."""
    arguments = command(tiny_model, tmp_path, tmp_path, micro_batch=8)
    real, sizes = step.branch_errors, []

    def crowded(accelerator: Any, backend: Any, branch: Any, batch: step.Batch) -> torch.Tensor:
        sizes.append(len(batch.latents))
        if sizes[-1] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(accelerator, backend, branch, batch)

    monkeypatch.setattr(step, "branch_errors", crowded)
    with pytest.raises(UserError, match=r"with micro_batch 8 \(OutOfMemoryError.*the same command goes on with 4"):
        train.main(arguments)
    assert sizes == [8] and not (tmp_path / "policy").exists()
    train.main(arguments)
    assert max(sizes[1:]) == 4
    assert_same_but_for_rounding(tmp_path, undisturbed)


PAIRS = {"batching": "pairs", "pairs_per_step": 4, "accumulation": 2, "beta": 50.0, "steps": 16, "learning_rate": 1e-4}


def pairs_command(model: Path, folder: Path, **changes: Any) -> list[str]:
    """Return the arguments of a training by pairs, in two micro steps a step, without guard."""
    folder.mkdir()
    return command(model, folder, folder, **PAIRS, checkpoint_every=1000, guard={"every": 0}, **changes)


def last_words(text: str) -> int:
    """Return the step at which each process of a training said that it was stopped: all the same."""
    steps = set(re.findall(r"step (\d+): stopped by SIGTERM", text))
    assert len(steps) == 1, text
    return int(steps.pop())


def assert_same_training(found: Path, wanted: Path) -> None:
    """Check the logs to 1e-5, and that the policies differ by no more."""
    (log, _, weights, _), (log_before, _, before, _) = results(found), results(wanted)
    pd.testing.assert_frame_equal(log, log_before, rtol=0, atol=1e-5)
    one, other = load(weights), load(before)
    assert max(float((one[name] - other[name]).abs().max()) for name in other) < 1e-5


def test_one_and_two_processes_go_on_from_each_other(tiny_model: Path, tmp_path: Path) -> None:
    """Two processes of one launcher, the backbone sharded, stopped by SIGTERM, then one, for whom sharding means
    nothing; one, stopped, then two nodes of one process each."""
    shardings = {"whole": "none", "two": "backbone", "one": "none"}
    commands = {name: pairs_command(tiny_model, tmp_path / name, sharding=how) for name, how in shardings.items()}
    train.main(commands["whole"])
    for name, processes in (("two", "2"), ("one", "1")):
        log = tmp_path / f"{name}.txt"
        process = start([*commands[name], "--processes", processes], log=log)
        while "step 1 of 16" not in log.read_text() and process.poll() is None:
            time.sleep(0.01)
        process.terminate()
        assert process.wait(300) == 143
        step = last_words(log.read_text())
        assert [path.name for path in (tmp_path / name).glob("checkpoints/*/step-*")] == [f"step-{step:06d}"]
    train.main(commands["two"])
    assert_same_training(tmp_path / "two", tmp_path / "whole")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    nodes = [start([*commands["one"], "--nodes", "2"], NODE_RANK=str(rank), **meeting) for rank in (1, 0)]
    assert [node.wait(400) for node in nodes] == [0, 0]
    assert_same_training(tmp_path / "one", tmp_path / "whole")


def test_a_group_without_latents_is_one_error(tiny_model: Path, tmp_path: Path) -> None:
    arguments = command(tiny_model, tmp_path, tmp_path)
    place = arguments.index("--encoded") + 2
    with pytest.raises(UserError, match="is missing, though pairs has it"):
        train.main([*arguments[:place], *arguments[place + 1 :]])


def test_half_precision_networks_need_mixed_precision(tiny_model: Path, tmp_path: Path) -> None:
    arguments = command(tiny_model, tmp_path, tmp_path)
    place = arguments.index("--config") + 1
    arguments[place] = arguments[place].replace('"dtype": "float32"', '"dtype": "float16"', 1)
    with pytest.raises(UserError, match="precision"):
        train.main(arguments)
