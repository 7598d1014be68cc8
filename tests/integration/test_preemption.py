"""SIGTERM in rollout, score and encode: the batch in hand is kept, and the next start ends with the same bytes.

The train stage, with processes of its own, is in test_train_resume.py.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tiny_shards
from dp2osr import resume, stage, stopping, tables
from dp2osr.stages import encode, rollout, score
from training_rig import DEFAULTS, make_pairs

GROUPS, ROLLOUTS = tiny_shards.names(4), 6
MAINS: dict[str, Callable[[list[str]], None]] = {"rollout": rollout.main, "score": score.main, "encode": encode.main}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of all inputs; candidates.tar in it is what an undisturbed rollout makes."""
    return tmp_path_factory.mktemp("inputs")


@pytest.fixture(scope="module")
def arguments(folder: Path, tiny_model: Path) -> Callable[[str, Path], list[str]]:
    """Return a function from a stage and its output to its command line."""
    policy = tiny_shards.policy(DEFAULTS, tiny_model)
    tiny_shards.write_lr(folder / "lr.tar", GROUPS)
    tiny_shards.write_embeddings(folder / "embeddings.safetensors", GROUPS, policy)
    tables.write(make_pairs(tuple(GROUPS), top=1), folder / "pairs.parquet", tables.PAIRS)
    lr = ["--device", "cpu", "--lr", str(folder / "lr.tar")]
    candidates, pairs = (
        ["--" + name.split(".")[0], str(folder / name)] for name in ("candidates.tar", "pairs.parquet")
    )

    def command(name: str, output: Path) -> list[str]:
        if name == "rollout":
            job = rollout.RolloutJob(policy=policy, seed=7, first=0, count=ROLLOUTS, scale=4, image_format="png")
            given = ["--embeddings", str(folder / "embeddings.safetensors"), "--control", policy.control]
            given += tiny_shards.speed()
            return [*lr, *given, "--batch-size", "1", "--config", job.model_dump_json(), "--candidates", str(output)]
        if name == "score":
            job_text = json.dumps({"metrics": ["psnr", "gmsd"], "niqe_block": 32})
            return [*lr, *candidates, "--config", job_text, "--scores", str(output)]
        given = ["--batch-size", "2", "--config", policy.model_dump_json()]
        return [*lr, *candidates, *pairs, *given, "--encoded", str(output)]

    rollout.main(command("rollout", folder / "candidates.tar"))
    return command


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Iterator[stopping.StopRequest]:
    """Return a request of this test alone, for `stage.run` and `stage.progress`."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(stage, "STOP", stopping.StopRequest())
    yield stage.STOP
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("name", MAINS)
def test_the_batch_in_hand_is_kept(
    name: str,
    arguments: Callable[[str, Path], list[str]],
    stop: stopping.StopRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(score, "CHUNK", 8)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    MAINS[name](arguments(name, whole))
    put, kept = resume.Parts.put, []

    def interrupted(self: resume.Parts, part: str, data: bytes) -> None:
        if len(kept) == 1:
            os.kill(os.getpid(), signal.SIGTERM)  # the second is computed and not kept yet
        put(self, part, data)
        kept.append(part)

    monkeypatch.setattr(resume.Parts, "put", interrupted)
    with pytest.raises(SystemExit) as ended:
        stage.run(lambda: MAINS[name](arguments(name, cut)))
    assert ended.value.code == stopping.TERMINATED == 143
    assert not cut.exists()
    assert sorted(path.name for path in (tmp_path / "cut.parts").rglob("*") if path.is_file()) == sorted(kept)
    assert 2 <= len(kept) <= 3  # a rollout keeps a batch while it samples the next one, which is then kept, too
    stop.requested = False
    MAINS[name](arguments(name, cut))
    assert len(kept) == len(set(kept)) > 2, "a batch was computed twice"
    assert cut.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "whole"]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dp2osr.stages.rollout", *arguments]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def test_a_process_in_the_middle_of_its_batches(
    arguments: Callable[[str, Path], list[str]], folder: Path, tmp_path: Path
) -> None:
    parts = tmp_path / "cut.parts"
    with start(arguments("rollout", tmp_path / "cut")) as process:
        while not list(parts.glob("*/batch-*")) and process.poll() is None:
            time.sleep(0.002)
        process.terminate()
        assert process.stderr is not None
        text = process.stderr.read()
    stopped = re.search(r"stopped by SIGTERM after (\d+) of 24; the same command goes on from what was kept$", text)
    assert process.returncode == 143 and stopped, text
    assert "SIGTERM: stopping as soon as what is in hand is kept\n" in text
    assert len(list(parts.glob("*/batch-*"))) == int(stopped[1])
    rollout.main(arguments("rollout", tmp_path / "cut"))
    assert (tmp_path / "cut").read_bytes() == (folder / "candidates.tar").read_bytes()


def test_a_process_that_loads_its_model(arguments: Callable[[str, Path], list[str]], tmp_path: Path) -> None:
    """Nothing is in hand: it ends at once, and leaves nothing."""
    with start(arguments("rollout", tmp_path / "out")) as process:
        assert process.stderr is not None
        text = process.stderr.readline()  # the device, after which the model is loaded
        process.terminate()
        text += process.stderr.read()
    assert process.returncode == 143 and "device cpu" in text, text
    assert text.endswith("SIGTERM: stopped; the same command goes on from what was kept\n") and "Traceback" not in text
    assert list(tmp_path.iterdir()) == []
