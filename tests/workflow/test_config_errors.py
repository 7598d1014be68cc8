"""What is wrong with a config stops Snakemake in one line that names the key; every file in config/ plans its jobs."""

from pathlib import Path
from typing import Any

import pytest
import yaml

import workflow_rig as rig

MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "misspelt key": (
        {"rollout": {"num_rolouts": 8}},
        "config: rollout.num_rolouts: unknown key",
    ),
    "N over M/2": (
        {"run_defaults": {"pairs": {"top": 9}}},
        "config: runs.default.pairs.top: found 9, wanted at most 8",
    ),
    "misspelt metric": (
        {"iqa": {"groups": {"light": ["fsim", "gmsd", "nlpd", "niqee"]}}},
        "config: iqa.groups.light: found 'niqee', wanted one of",
    ),
    "metric that no group scores": (
        {"rewards": {"default": {"nr": ["musiq"]}}},
        "config: rewards.default.nr (metrics in iqa.groups): found 'musiq', wanted one of",
    ),
    "misspelt reference": (
        {"runs": {"default": {"reference": "bse"}}},
        "config: runs.default.reference: found 'bse', wanted one of",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_names_the_key(tmp_path: Path, mistake: str) -> None:
    changes, wanted = MISTAKES[mistake]
    done = rig.Workflow(tmp_path).snakemake("--dry-run", changes=changes)
    assert done.returncode != 0
    assert [line for line in done.stdout.splitlines() if line.startswith("config: ")] != []
    assert sum(wanted in line for line in done.stdout.splitlines()) == 1, done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.parametrize("path", sorted(rig.CONFIG.parent.glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_file_plans(tmp_path: Path, path: Path) -> None:
    files = list(dict.fromkeys([rig.CONFIG, path]))
    runs = set((yaml.safe_load(path.read_text()) or {}).get("runs") or {}) | {"default"}
    jobs = rig.Workflow(tmp_path, files).plan()
    for rule in ("select_pairs", "train", "report"):
        assert {each["run"] for each in rig.pick(jobs, rule)} == runs
    assert rig.count(jobs)["ingest"] == 3  # train, val, holdout; `base` made the model and is no part of a run
    assert "pretrain" not in rig.rules(jobs)


def test_pretrain_is_planned_when_asked_for(tmp_path: Path) -> None:
    jobs = rig.Workflow(tmp_path, [rig.CONFIG, rig.CONFIG.with_name("pretrain.yaml")]).plan("pretrain")
    assert rig.rules(jobs) == {"ingest", "pretrain"}


def test_the_snakefile_loads_no_torch(tmp_path: Path) -> None:
    done = rig.Workflow(tmp_path).snakemake("--dry-run", "--quiet", python=("-X", "importtime"))
    assert done.returncode == 0, done.stdout[-2000:]
    loaded = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stdout.splitlines() if "|" in line}
    assert "dp2osr" in loaded
    assert loaded.isdisjoint({"torch", "pyiqa", "diffusers", "transformers"})
