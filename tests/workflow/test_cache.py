"""Candidates and scores from Snakemake's cache between workflows: the same work is found, other work is not."""

from pathlib import Path
from typing import Any

import pytest

from hollow import Hollow
from workflow_rig import CONFIG, SMALLEST, Workflow

TARGETS = [f"results/{name}/rewards/default.parquet" for name in ("train/base", "train/bicubic", "holdout/base")]
CHANGES: dict[str, Any] = {
    "datasets": {
        "train": {"images": ["photos", "more/*.png"], "num_shards": 2},
        "holdout": {"images": ["other"], "num_shards": 1},
    },
    "policy_defaults": {"control": "weights"},
    "rollout": {"rollouts_per_block": 2},
}


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs a workflow in a new folder with raw files of its own, beside the same cache."""
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("SNAKEMAKE_OUTPUT_CACHE", str(tmp_path / "cache"))

    def run(name: str, *, image: str = "a", **changes: Any) -> Hollow:
        workflow = Hollow(tmp_path / name, [CONFIG, SMALLEST])
        for path, text in {"photos/1.png": "1", "more/2.png": image, "other/3.png": "3", "weights/w": "w"}.items():
            (workflow.directory / path).parent.mkdir(parents=True, exist_ok=True)
            (workflow.directory / path).write_text(text)
        done = workflow.snakemake("--cores", "4", "--cache", "--", *TARGETS, changes=CHANGES | changes)
        assert done.returncode == 0, done.stdout[-4000:]
        return workflow

    return run


def stages(workflow: Hollow, stage: str) -> list[str]:
    """Return the outputs that the jobs of a stage have made, below the results."""
    ran = [line.split() for line in workflow.ran() if f"dp2osr.stages.{stage} " in line]
    return sorted(word.removeprefix("results/") for words in ran for word in words[-1:])


def cached(workflow: Workflow, pattern: str) -> list[str]:
    """Return the files of a pattern below the results that are links into the cache."""
    results = workflow.directory / "results"
    return sorted(str(path.relative_to(results)) for path in results.glob(pattern) if path.is_symlink())


def test_a_second_workflow_runs_no_rollout_and_no_score(make: Any) -> None:
    first = make("first")
    blocks = [f"shard-000{shard}.block-00{block}" for shard in (0, 1) for block in (0, 1)]
    candidates = [f"holdout/base/candidates/{block}.tar" for block in blocks[:2]]
    candidates += [f"train/base/candidates/{block}.tar" for block in blocks]
    assert stages(first, "rollout") == candidates and len(stages(first, "score")) == 8
    second = make("second")
    assert stages(second, "rollout") == stages(second, "score") == []
    assert len(stages(second, "degrade")) == 3
    assert cached(second, "*/base/candidates/*") == candidates
    for name in [*candidates, *stages(first, "score")]:  # its own, not another shard's or block's
        text = (second.directory / "results" / name).read_text()
        assert text == (first.directory / "results" / name).read_text() and f"results/{name}" in text
    # another byte of an image, another metric: other candidates of its data set alone, other scores of all
    third = make("third", image="b", iqa={"groups": {"light": ["gmsd", "niqe", "ssim"]}})
    assert stages(third, "rollout") == candidates[2:]
    assert len(stages(third, "score")) == 8
