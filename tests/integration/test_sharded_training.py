"""A training whose backbone is shared out over two processes goes as that of one process which holds it whole.

One launch of two processes (gloo, on the CPU) does all cases, the last of which is short of memory; one process,
unsharded, does the same in the test's own process.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import sharded_rig
from dp2osr.training import launch
from made_once import made_once
from training_rig import LENIENT, command

pytestmark = pytest.mark.timeout(400)  # processes that wait for each other would do so for ever
BASE = {"steps": 2, "beta": 50.0, "learning_rate": 1e-4, "checkpoint_every": 1000}
# 3 groups of 4 images, one perhaps of 3, for 2 processes: two turns and one, each of two passes; 3 validation images
GROUPS = {"groups_per_step": 3, "micro_batch": 3, "gradient_checkpointing": True, "guard": {"every": 2, **LENIENT}}
CASES: dict[str, dict[str, Any]] = {
    "sd-groups": {**GROUPS, "sampling": {"guidance": 2.0}},
    "flow-groups": {**GROUPS, "sampling": {"true_guidance": 2.0}},
    "flow-pairs": {"batching": "pairs", "pairs_per_step": 5, "accumulation": 2, "micro_batch": 3, "ema_decay": 0.5},
    "sd-alone": {"groups_per_step": 1, "steps": 1},  # the second process never has a unit
    "flow-half": {"precision": "bf16", "sampling": {"dtype": "bfloat16"}, "gradient_checkpointing": True, "steps": 1},
    "sd-resumed": {"batching": "pairs", "pairs_per_step": 3, "steps": 3, "ema_decay": 0.5},
    "sd-short": {"micro_batch": 8},
}
COLUMNS = {
    "log": ("loss", "error_chosen", "error_rejected", "abs_logit"),
    "validation": ("reward", "fr", "nr", "diversity"),
}


@dataclass(frozen=True)
class Runs:
    """Folders with what one process wrote, and two; the exit code of the two, and the seconds after the last case."""

    one: Path
    two: Path
    code: int
    seconds: float


def case(folder: Path, name: str, model: Path, *, until: int = 0, sharding: str = "none") -> dict[str, Any]:
    """Return a case of the rig whose files and checkpoints lie in a folder of its name."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    changes = BASE | CASES[name] | {"sharding": sharding}
    arguments = command(model, folder / name, folder / name, validation=3, **changes)
    short = name == "sd-short"
    return {"name": name, "arguments": arguments, "until": until, "short": short, "results": str(folder)}


def launch_two(cases: list[dict[str, Any]], folder: Path, root: Path) -> int:
    """Run cases in two processes of the stage's own launcher; return its exit code."""
    path = folder / "cases.json"
    path.write_text(json.dumps(cases))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(root / "tests"), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        return launch.Launcher().run("sharded_rig", [str(path)], launch.place(1), processes=2)


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory, root: Path) -> Runs:
    """Run all cases, once for all workers of pytest-xdist."""
    models = {name: tiny_flux if name.startswith("flow") else tiny_model for name in CASES}
    folder = made_once(tmp_path_factory, "sharded", lambda path: run_all(path, models, root))
    ended = json.loads((folder / "ended.json").read_text())
    return Runs(folder / "one", folder / "two", **ended)


def run_all(folder: Path, models: dict[str, Path], root: Path) -> None:
    """Run the cases by one process, and by two; write how the two ended."""
    one, two = folder / "one", folder / "two"
    for name in list(CASES)[:-1]:
        sharded_rig.run(case(one, name, models[name]))
    sharded_rig.run(case(two, "sd-resumed", models["sd-resumed"], until=1))
    untils = {"sd-resumed": 2}
    cases = [case(two, name, models[name], until=untils.get(name, 0), sharding="backbone") for name in CASES]
    code = launch_two(cases, folder, root)
    seconds = time.time() - (two / "sd-resumed.0.json").stat().st_mtime
    sharded_rig.run(case(two, "sd-resumed", models["sd-resumed"]))
    (folder / "ended.json").write_text(json.dumps({"code": code, "seconds": seconds}))


def figures(folder: Path, name: str, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"{name}.{rank}.json").read_text())


@pytest.mark.parametrize("name", list(CASES)[:-1])
def test_two_sharded_processes_train_as_one_that_holds_all(runs: Runs, name: str) -> None:
    """Also sd-resumed: a step by one process, one by two sharded ones, which are stopped, one by one process again."""
    atol = 2e-2 if name == "flow-half" else 1e-5
    found, wanted = figures(runs.two, name), figures(runs.one, name)
    for table, columns in COLUMNS.items():
        assert [row["step"] for row in found[table]] == [row["step"] for row in wanted[table]]
        for row, before in zip(found[table], wanted[table], strict=True):
            for column in columns:
                assert row[column] == pytest.approx(before[column], abs=atol), column
    weights, others = (load_file(folder / f"{name}.safetensors") for folder in (runs.two, runs.one))
    assert max(float((weights[key] - others[key]).abs().max()) for key in others) < atol


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("sd-resumed", "sd-short")])
def test_each_process_holds_its_share(runs: Runs, name: str) -> None:
    whole = figures(runs.one, name)["held"]
    shares = [figures(runs.two, name, rank) for rank in (0, 1)]
    assert [share["whole"] for share in shares] == [whole, whole]
    assert sum(share["held"] for share in shares) == whole
    assert all(share["held"] == pytest.approx(whole / 2, rel=0.02) for share in shares)


def test_short_memory_in_one_process_ends_all(runs: Runs) -> None:
    """The other waits in the backbone meanwhile; the launcher ends it. The next try takes half as many images."""
    assert runs.code == 1 and not (runs.two / "sd-short.0.json").exists()
    (left,) = (runs.two / "sd-short" / "checkpoints").glob("*/micro_batch")
    assert left.read_text() == "4\n"
    assert runs.seconds < 60
