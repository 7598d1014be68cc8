"""The container's definition names files that are there, the Python of the pins, and installs by them."""

import re
import tomllib
from pathlib import Path

import pytest

PLACE = "/opt/dp2osr/"
Sections = dict[str, list[str]]


@pytest.fixture
def sections(root: Path) -> Sections:
    """Return the lines of each section of envs/apptainer.def, without comments; the header's under ''."""
    found: Sections = {"": []}
    name = ""
    for line in (root / "envs" / "apptainer.def").read_text().splitlines():
        if match := re.fullmatch(r"%(\w+)", line):
            name = match[1]
            assert name not in found, f"%{name} twice"
            found[name] = []
        elif line.strip() and not line.strip().startswith("#"):
            found[name].append(line.strip())
    return found


def copied(sections: Sections) -> dict[str, str]:
    """Return target by source of what is copied into the container."""
    pairs = [line.split() for line in sections["files"]]
    assert all(len(pair) == 2 for pair in pairs)
    return {source: target for source, target in pairs}


def test_sections_and_base(sections: Sections, root: Path) -> None:
    assert set(sections) == {"", "files", "post", "environment", "runscript", "test"}
    header = dict(line.split(": ", 1) for line in sections[""])
    python = re.search(r"^PYTHON = \"(3\.\d+)\"$", (root / "envs" / "make_conda.py").read_text(), re.MULTILINE)
    assert python and header == {"Bootstrap": "docker", "From": f"python:{python[1]}-slim-bookworm"}
    assert f"PYTHON=python{python[1]} " in sections["post"][0]


def test_files_are_those_that_the_workflow_needs(sections: Sections, root: Path) -> None:
    files = copied(sections)
    assert files == {name: PLACE + name for name in files} and all((root / name).exists() for name in files)
    project = tomllib.loads((root / "pyproject.toml").read_text())
    wanted = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    wanted |= {folder for folder in project["tool"]["setuptools"]["packages"]["find"]["where"]}
    named = re.findall(r"^include: \"(\w+)/", (root / "Snakefile").read_text(), re.MULTILINE)
    assert set(files) == wanted | {"Snakefile", "config", "envs"} | set(named)


def test_it_installs_by_the_pins(sections: Sections, root: Path) -> None:
    """By the script that `make env` runs, which is given all that it reads."""
    (line,) = sections["post"]
    script = line.split()[1].removeprefix(PLACE)
    assert (root / script).stat().st_mode & 0o111
    read = re.findall(r"-r (\S+)", (root / script).read_text())
    assert read == ["envs/bootstrap.txt", "envs/requirements.txt"]
    assert {path.split("/")[0] for path in (script, *read)} <= set(copied(sections))
    assert f"export PATH={PLACE}.venv/bin:$PATH" in sections["environment"]
    assert f"--snakefile {PLACE}Snakefile" in sections["runscript"][0]


def test_its_overlays_are_there(root: Path) -> None:
    named = re.findall(rf"{PLACE}(config/[\w.-]+)", (root / "envs" / "apptainer.def").read_text())
    assert named and all((root / name).is_file() for name in named)
