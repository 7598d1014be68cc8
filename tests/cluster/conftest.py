"""The private SLURM, one for all tests of this folder."""

from collections.abc import Iterator

import pytest

import slurm_rig


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm_rig.Slurm]:
    """Start SLURM; in the end, end it and all its jobs. Skips where the machine does not allow it."""
    if reason := slurm_rig.install():
        pytest.skip(f"no private SLURM: {reason}")
    cluster = slurm_rig.Slurm(tmp_path_factory.mktemp("slurm"))
    cluster.configure()
    try:
        cluster.start("munged", "slurmctld", *slurm_rig.NODES)
        yield cluster
    finally:
        cluster.stop()
