"""What a run leaves on the disk: the files that its rules declare, so that their number follows from the jobs."""

import re

from workflow_rig import Workflow, declared

UNDECLARED = re.compile(r"results/runs/\w+/(policy|checkpoints|report)/")  # a few files a run


def test_no_file_an_image(smallest: Workflow) -> None:
    """Images lie in shards: below a data set there is nothing but a file for each output, log and benchmark."""
    done = smallest.snakemake("--dry-run", "--forceall")
    found = declared(done.stdout)
    known = {path for paths in found.values() for path in paths}
    files = {path.relative_to(smallest.directory).as_posix() for path in smallest.directory.glob("results/**/*.*")}
    assert {path for path in files - known if not UNDECLARED.match(path)} == set()
    assert {*found["output"], *found["log"]} - files == {"results/runs/default/policy"}
