"""The jobs of `dp2osr plan` are those of a dry run in an empty folder."""

from collections import Counter
from pathlib import Path

import pytest

from dp2osr import config
from dp2osr.plan import Facts, Planner
from workflow_rig import CONFIG, ROOT, Workflow, count


@pytest.mark.parametrize("overlays", [(), ("study.yaml",)], ids=["default", "study"])
def test_same_jobs_as_a_dry_run(overlays: tuple[str, ...], tmp_path: Path) -> None:
    files = [CONFIG, *(ROOT / "config" / name for name in overlays)]
    planned: Counter[str] = Counter()
    for row in Planner(config.read(*files), Facts(), {}).rows():
        planned[row.stage] += row.jobs
    assert planned == count(Workflow(tmp_path, files).plan())
