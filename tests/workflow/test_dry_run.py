"""What Snakemake says before it runs anything: every config file, full scale, and wrong settings."""

import json
import re
import resource
from pathlib import Path
from typing import Any

import pytest
import yaml

from dp2osr import config
from dp2osr.config_checks import prompt_files
from workflow_rig import CONFIG, FULL_SCALE, ROOT, Workflow, count, declared, parse_jobs, pick

BASES = {"study-flow.yaml": ["tiny-flow.yaml"]}  # overlays of an overlay
OVERLAYS = sorted(path.name for path in (ROOT / "config").glob("*.yaml") if path != CONFIG)
HEAVY = {"torch", "torchvision", "diffusers", "transformers", "accelerate", "pyiqa", "matplotlib"}


def test_defaults_import_nothing_heavy(tmp_path: Path) -> None:
    """The job list of config.yaml, from a Snakemake that imports neither torch nor what needs it."""
    done = Workflow(tmp_path).snakemake("--dry-run", python=("-X", "importtime"))
    assert done.returncode == 0, done.stdout[-3000:]
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stdout.splitlines() if "| " in line}
    assert {"snakemake", "dp2osr"} <= imported
    assert not imported & HEAVY
    assert "rule report:" in done.stdout and "rule pretrain:" not in done.stdout


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_config_file(name: str, tmp_path: Path) -> None:
    files = [CONFIG, *(CONFIG.parent / each for each in (*BASES.get(name, []), name))]
    known = config.read(*files)
    runs = known.runs
    # weights that a user has downloaded
    wanted = {path for dataset in known.datasets.values() for path in prompt_files(dataset.prompt).values()}
    for policy in known.policies.values():
        wanted |= {policy.control, f"{policy.model}/scheduler/scheduler_config.json"}
    for path in wanted:
        if not path.startswith("builtin:"):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).touch()
    few = {"datasets": {"train": {"num_shards": min(known.datasets["train"].num_shards, 2)}}}
    jobs = Workflow(tmp_path, files).plan(changes=few)
    assert len(pick(jobs, "train")) == len(pick(jobs, "report")) == len(runs)
    base = [job for job in pick(jobs, "rollout", dataset="train") if job["policy"] == "base"]
    blocks = -(-known.num_rollouts("train") // known.rollout.rollouts_per_block)
    assert len(base) == blocks * few["datasets"]["train"]["num_shards"]  # all runs share them


def test_pretrain_is_asked_for_by_name(tmp_path: Path) -> None:
    jobs = Workflow(tmp_path, [CONFIG, CONFIG.parent / "pretrain.yaml"]).plan("pretrain")
    assert count(jobs) == {"ingest": 1, "pretrain": 1}


def test_explorer_is_asked_for_by_name(tmp_path: Path) -> None:
    """A page for the training candidates with the pairs of both runs, and one for each policy on the test set."""
    shared = {"runs": {"again": {"seed": 1}}, "datasets": {"train": {"num_shards": 3}}}
    done = Workflow(tmp_path).snakemake("--dry-run", "--printshellcmds", "explorer", changes=shared)
    assert done.returncode == 0, done.stdout[-3000:]
    jobs = parse_jobs(done.stdout)
    pages = pick(jobs, "explorer_page")
    assert sorted((page["dataset"], page["policy"]) for page in pages) == [
        ("holdout", "again"),
        ("holdout", "base"),
        ("holdout", "default"),
        ("train", "base"),
    ]
    assert len(pick(jobs, "explorer_shard", dataset="train")) == 3
    pairs = "--pairs default=results/runs/default/pairs.parquet again=results/runs/again/pairs.parquet"
    assert done.stdout.count(pairs) == 1


def test_full_scale(tmp_path: Path) -> None:
    """Seconds of CPU, the number of jobs, and of files: four a job, whatever the number of images."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = Workflow(tmp_path).snakemake("--dry-run", changes=FULL_SCALE)
    assert done.returncode == 0, done.stdout[-3000:]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 60  # about 15 s; CPU time, since other tests may share the machine
    jobs = parse_jobs(done.stdout)
    found = count(jobs)
    assert len(jobs) == 3644
    assert found["rollout"] == 4 * (300 + 3)  # 4 blocks; base on train, val and holdout, the run on holdout
    assert found["embed"] == 302 and found["encode"] == 300
    assert found["degrade"] == 303  # the images of NIQE's model, too
    files = {kind: len(set(paths)) for kind, paths in declared(done.stdout).items()}
    # one output a job, but: 2 of each of 4 rewards, 3 of the training, 2 of the report
    assert files == {"output": 3644 + 4 + 2 + 1, "log": 3644, "benchmark": 3644}
    assert not re.search(r"^ *checkpoint \w+:", done.stdout, re.MULTILINE)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "misspelt key": ({"run_defaults": {"train": {"betta": 1.0}}}, "runs.default.train.betta: unknown key"),
    "N > M/2": ({"run_defaults": {"pairs": {"top": 9}}}, "runs.default.pairs.top: found 9, wanted at most 8"),
    "misspelt metric": (
        {"rewards": {"default": {"fr": ["lpisp"]}}},
        "rewards.default.fr: found 'lpisp', wanted one of",
    ),
    "metric that no group scores": (
        {"rewards": {"default": {"nr": ["musiq"]}}},
        "(metrics in iqa.groups): found 'musiq'",
    ),
    "misspelt reference": ({"run_defaults": {"reference": "bsae"}}, "runs.default.reference: found 'bsae', wanted one"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_setting_is_one_line(name: str, tmp_path: Path) -> None:
    changes, message = WRONG[name]
    done = Workflow(tmp_path).snakemake("--dry-run", changes=changes)
    assert done.returncode != 0 and "Traceback" not in done.stdout
    lines = [line for line in done.stdout.splitlines() if "config:" in line]
    assert len(lines) == 1 and message in lines[0], done.stdout[-2000:]


def test_overlay_of_tests_names_known_keys_only() -> None:
    """tests/data/smallest.yaml merges into a valid configuration, and changes what it says."""
    path = ROOT / "tests" / "data" / "smallest.yaml"
    merged = config.read(CONFIG, path)
    assert (
        merged.rewards["default"].num_rollouts == yaml.safe_load(path.read_text())["rewards"]["default"]["num_rollouts"]
    )
    assert json.loads(merged.model_dump_json())["iqa"]["groups"] == {"light": ["gmsd", "niqe", "psnr"]}
