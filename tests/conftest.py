"""Fixtures that all tests share. Nothing here needs a network, a GPU or trained weights."""

import copy
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from made_once import made_once

if TYPE_CHECKING:
    from workflow_rig import Workflow

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

ROOT = Path(__file__).resolve().parents[1]
_DEFAULTS = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what only the full proof of tests/workflow/test_kill.py needs."""
    parser.addoption("--kills", type=int, default=1, help="how often each stage is killed (default: 1)")


@pytest.fixture(scope="session")
def root() -> Path:
    """Return the top folder of the repository."""
    return ROOT


@pytest.fixture
def config_dict() -> dict[str, Any]:
    """Return a fresh copy of config/config.yaml, to be changed and given to `config.load`."""
    return copy.deepcopy(_DEFAULTS)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Use one thread where torch is already loaded: the tests share two cores, and sums keep their order."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a random model of a few thousand weights in diffusers' layout (tests/tiny.py)."""
    import torch

    import tiny

    torch.set_num_threads(1)
    return made_once(tmp_path_factory, "tiny-model", tiny.build)


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the like in FLUX's layout."""
    import torch

    import tiny

    torch.set_num_threads(1)
    return tiny.build_flux(tmp_path_factory.mktemp("tiny") / "flux")


@pytest.fixture(scope="session")
def smallest(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> "Workflow":
    """Return the workflow of tests/data/smallest.yaml, run once from images to report for all tests."""
    import workflow_rig

    folder = made_once(tmp_path_factory, "smallest", lambda path: workflow_rig.smallest(path, tiny_model).run())
    return workflow_rig.smallest(folder, tiny_model)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where torch sees no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
