"""What the README shows works as it stands there: the overlay, the commands, the two queries."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import duckdb
import pytest

from dp2osr import config
from workflow_rig import CONFIG, ROOT, Workflow

README = (ROOT / "README.md").read_text()
COMMANDS = [line for line in README.splitlines() if line.startswith(".venv/bin/snakemake")]


def blocks(language: str) -> list[str]:
    """Return the README's code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    """Return a folder with the README's mine.yaml and the repository's config."""
    (text,) = blocks("yaml")
    (tmp_path / "my-controlnet").mkdir()  # control weights and model are inputs of the rollouts
    (tmp_path / "my-sd" / "scheduler").mkdir(parents=True)
    (tmp_path / "my-sd" / "scheduler" / "scheduler_config.json").touch()
    (tmp_path / "mine.yaml").write_text(text.replace("/models/", f"{tmp_path}/"))
    (tmp_path / "config").symlink_to(ROOT / "config")
    return tmp_path


def test_the_overlay_is_valid(overlay: Path) -> None:
    loaded = config.read(CONFIG, overlay / "config" / "resshift.yaml", overlay / "mine.yaml")
    assert loaded.datasets["train"].degradation.first.blur.size == (3, 19)
    assert loaded.runs["default"].train.precision == "bf16"


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_plan_jobs(overlay: Path, line: str) -> None:
    (files,) = re.findall(r'^files="(.*)"', README, re.MULTILINE)
    words = shlex.split(line.replace("$files", files), comments=True)[1:]
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), *words, "--dry-run"]
    done = subprocess.run(command, cwd=overlay, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "rule rollout:" in done.stdout
    assert ("rule train:" in done.stdout) == ("rollouts" not in words)


def test_the_queries(smallest: Workflow) -> None:
    (code,), (query,) = blocks("python"), blocks("sql")
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=smallest.directory, capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stderr
    rows = duckdb.sql(query.replace("'results/", f"'{smallest.directory}/results/")).df()
    assert list(rows.columns) == ["group_id", "rollout", "fr", "nr", "reward"] and len(rows)
