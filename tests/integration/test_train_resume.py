"""The train stage from its command line: killed and resumed, stopped politely, on two processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from safetensors.torch import load

from dp2osr import tables
from dp2osr.errors import UserError
from dp2osr.stages import train
from training_rig import DEFAULTS, policy_settings, train_settings, write_files

STEPS = 12


def command(model: Path, folder: Path, output: Path, **changes: Any) -> list[str]:
    """Return the arguments of a training with guard whose outputs lie in `output`."""
    paths = write_files(folder)
    guard = {"every": 4, "patience": 99, "min_diversity": 0.0, "max_reward_drop": 99.0}
    settings = train_settings(**{"steps": STEPS, "guard": guard, "learning_rate": 1e-4} | changes)
    job = {
        "run": "test",
        "policy": policy_settings(model).model_dump(),
        "train": settings.model_dump(),
        "reward": DEFAULTS["rewards"]["default"] | {"fr": ["psnr"], "nr": ["entropy"]},
        "niqe_block": 32,
        "seed": 1,
        "base_seed": 0,
    }
    inputs = ["--pairs", paths["pairs.parquet"], "--encoded", paths["shard-0.tar"], paths["shard-1.tar"]]
    inputs += ["--embeddings", paths["embeddings.safetensors"], "--reference", model / "controlnet"]
    inputs += ["--val-lr", paths["lr.tar"], "--val-embeddings", paths["embeddings.safetensors"]]
    inputs += ["--val-scales", paths["scales.parquet"], "--device", "cpu", "--config", json.dumps(job)]
    outputs = ["--policy", output / "policy", "--train-log", output / "train_log.parquet"]
    return [str(part) for part in (*inputs, *outputs, "--validation", output / "validation.parquet")]


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "dp2osr.stages.train", *arguments], env=environment)


def results(output: Path) -> tuple[pd.DataFrame, pd.DataFrame, bytes, dict[str, Any]]:
    log = tables.read(output / "train_log.parquet", tables.TRAIN_LOG).drop(columns="pairs_per_second")
    weights = (output / "policy" / "diffusion_pytorch_model.safetensors").read_bytes()
    record = json.loads((output / "policy" / "policy.json").read_text())
    return log, tables.read(output / "validation.parquet", tables.VALIDATION), weights, record


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(command(tiny_model, folder, folder))
    assert process.wait(300) == 0
    return folder


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
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("checkpoints/*/step-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(100) == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    assert not (tmp_path / "policy").exists()
    train.main(arguments)
    found, wanted = results(tmp_path), results(undisturbed)
    pd.testing.assert_frame_equal(found[0], wanted[0], check_exact=True)
    pd.testing.assert_frame_equal(found[1], wanted[1], check_exact=True)
    assert found[2] == wanted[2]


def test_two_processes_equal_one(undisturbed: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Groups of unlike numbers of pairs are shared out, 3 of them to 2 processes."""
    process = start([*command(tiny_model, tmp_path, tmp_path), "--processes", "2"])
    assert process.wait(300) == 0
    found, wanted = results(tmp_path), results(undisturbed)
    weights, before = load(found[2]), load(wanted[2])
    assert max(float((weights[name] - before[name]).abs().max()) for name in before) < 1e-5
    # errors in float32 differ by 1e-8 with the size of a batch, and z is beta / 2 times their difference
    steep = ["loss", "abs_logit", "grad_norm"]
    pd.testing.assert_frame_equal(found[0].drop(columns=steep), wanted[0].drop(columns=steep), rtol=0, atol=1e-6)
    pd.testing.assert_frame_equal(found[0][steep], wanted[0][steep], rtol=1e-4, atol=2500 * 1e-7)
    columns = ["reward", "fr", "nr", "diversity"]
    pd.testing.assert_frame_equal(found[1][columns], wanted[1][columns], rtol=0, atol=1e-5)


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
