"""The pinned environment: complete, hashed, free of addresses, the same in its conda form and in what is installed."""

import importlib.metadata
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FILES = ("requirements.txt", "bootstrap.txt", "environment.yaml")


@pytest.fixture(scope="module")
def maker(root: Path) -> ModuleType:
    """Return envs/make_conda.py as a module."""
    spec = importlib.util.spec_from_file_location("make_conda", root / "envs" / "make_conda.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pinned(text: str) -> list[Requirement]:
    """Return the requirements of a file, markers included, without their hashes."""
    return [Requirement(line.rstrip(" \\")) for line in text.splitlines() if re.match(r"[A-Za-z0-9]", line)]


@pytest.mark.parametrize("name", FILES[:2])
def test_every_line_is_one_version_with_hashes(root: Path, name: str) -> None:
    text = (root / "envs" / name).read_text()
    blocks = re.split(r"\n(?=[A-Za-z0-9])", text.strip())
    assert len(blocks) == len(pinned(text))
    for block in blocks:
        assert re.match(r"[A-Za-z0-9._-]+==[^ ]+ (; .+ )?\\\n", block)
        assert re.fullmatch(r" {4}--hash=sha256:[0-9a-f]{64}", block.splitlines()[1].rstrip(" \\"))


@pytest.mark.parametrize("name", FILES)
def test_no_address_and_no_path_is_recorded(root: Path, name: str) -> None:
    text = (root / "envs" / name).read_text()
    assert not re.search(r"://|--(extra-)?index-url|--find-links|file:|/home/|@ ", text)


def test_the_conda_form_has_the_same_pins(root: Path, maker: ModuleType) -> None:
    requirements = (root / "envs" / "requirements.txt").read_text()
    assert (root / "envs" / "environment.yaml").read_text() == maker.environment(requirements)
    found = {Requirement(pin).name for pin in maker.pins(requirements)}
    wanted = {item.name for item in pinned(requirements) if not item.marker or item.marker.evaluate(maker.PLATFORM)}
    assert found == wanted
    assert {"torch", "snakemake", "pyiqa", "nvidia-cublas"} <= found
    assert "pyreadline3" not in found  # of Windows alone


def test_every_wish_of_the_package_is_pinned_and_met(root: Path) -> None:
    import tomllib

    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    wishes = project["dependencies"] + [wish for extra in project["optional-dependencies"].values() for wish in extra]
    pins = {canonicalize_name(item.name): item for item in pinned((root / "envs" / "requirements.txt").read_text())}
    for wish in map(Requirement, wishes):
        pin = pins[canonicalize_name(wish.name)]
        assert wish.specifier.contains(str(pin.specifier).removeprefix("==")), wish
    assert "opencv-python" not in pins


def test_what_is_installed_is_what_is_pinned(root: Path) -> None:
    for item in pinned((root / "envs" / "requirements.txt").read_text()):
        if item.marker is None or item.marker.evaluate():
            assert item.specifier.contains(importlib.metadata.version(item.name)), item


def test_the_restrictions_that_are_easily_lost(root: Path) -> None:
    pins = {item.name: item.specifier for item in pinned((root / "envs" / "requirements.txt").read_text())}
    for name, limit in (("setuptools", 82), ("packaging", 26)):
        assert int(str(pins[name]).removeprefix("==").split(".")[0]) < limit
