"""What several workers of pytest-xdist, or two runs side by side, need alike and make once."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that `make` fills once for all workers of pytest-xdist; the others wait for it.

    It lies in TESTS_SHARE where that is set, so that two runs side by side have it in common.
    """
    own = factory.getbasetemp()
    parallel = "PYTEST_XDIST_WORKER" in os.environ
    folder = Path(os.environ.get("TESTS_SHARE") or (own.parent if parallel else own)) / name
    done = folder.with_name(f"{name}.done")
    with FileLock(f"{folder}.lock"):
        if not done.exists():
            make(folder)
            done.touch()
    return folder
