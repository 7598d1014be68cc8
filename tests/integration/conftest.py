"""One finished run of the smallest pipeline, shared by all tests of a session."""

import pytest

import workflow_rig as rig


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> rig.Workflow:
    """Return tests/data/smallest.yaml with the embedded model, run from images to report. Tests must not change it."""
    workflow = rig.Workflow(tmp_path_factory.mktemp("pipeline"), [rig.CONFIG, rig.SMALLEST])
    workflow.run()
    return workflow
