"""What Snakemake itself costs at full scale: 30,000 images with 64 seeds each, about 4,000 jobs.

The workflow is real, its stages are hollow (tests/hollow.py). Measures the dry run, the time until the first job is
submitted, a whole run of jobs that do nothing on the local executor, and a rerun with nothing to do: medians, in
seconds of wall clock and of CPU (with the children's), and the largest process. Counts the files that the run leaves.

    python tests/benchmarks/driver.py --shards 300 --repeats 3
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from hollow import Hollow  # noqa: E402
from workflow_rig import CONFIG, FULL_SCALE, parse_jobs  # noqa: E402


@dataclass(frozen=True)
class Cost:
    """Seconds of wall clock and CPU, and the peak of the largest process in MiB."""

    wall: float
    cpu: float
    peak: float


class Driver:
    """Runs Snakemake on the workflow in a folder and measures it."""

    def __init__(self, folder: Path, shards: int, cores: int) -> None:
        (folder / "data" / "photographs").mkdir(parents=True)
        self.workflow = Hollow(folder, [CONFIG])
        train = FULL_SCALE["datasets"]["train"] | {"num_shards": shards}
        self.changes = FULL_SCALE | {"datasets": {"train": train}}
        self.cores = str(cores)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start Snakemake; its output comes from a pipe."""
        command, environment = self.workflow.command(*arguments, changes=self.changes)
        return subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str) -> tuple[Cost, str]:
        """Run Snakemake to its end; returns what it took and what it said."""
        start = time.perf_counter()
        child = self.start(*arguments)
        assert child.stdout is not None
        text = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - start
        if status:
            raise SystemExit(text[-3000:])
        return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024), text

    def dry_run(self) -> tuple[Cost, str]:
        """List all jobs."""
        return self.run("--dry-run")

    def start_up(self) -> Cost:
        """Run until the first job is submitted, then stop and leave the folder as it was."""
        start = time.perf_counter()
        child = self.start("--cores", self.cores)
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith(("rule ", "localrule ")):
                break
        else:
            raise SystemExit("no job was submitted")
        wall, process = time.perf_counter() - start, psutil.Process(child.pid)
        cpu = sum(process.cpu_times()[:4])  # the children's too
        peak = int(Path(f"/proc/{child.pid}/status").read_text().split("VmHWM:")[1].split()[0])
        os.killpg(child.pid, 9)
        child.communicate()
        for name in ("results", ".snakemake"):
            shutil.rmtree(self.workflow.directory / name, ignore_errors=True)
        return Cost(wall, cpu, peak / 1024)

    def everything(self) -> Cost:
        """Run all jobs."""
        return self.run("--cores", self.cores, "--quiet", "rules")[0]

    def nothing(self) -> Cost:
        """Run again when all is done."""
        cost, text = self.run("--cores", self.cores)
        assert "Nothing to be done" in text, text[-3000:]
        return cost


def files(folder: Path) -> Counter[str]:
    """Count the files of a finished run by what they are."""
    found: Counter[str] = Counter()
    for path in (path for path in folder.rglob("*") if path.is_file()):
        top, *rest = path.relative_to(folder).parts
        if top == "results":
            found[rest[0] if rest[0] in ("logs", "benchmarks") else "artefacts"] += 1
        elif top == ".snakemake":
            found[f"{top}/{rest[0]}"] += 1
    return found


def show(name: str, costs: list[Cost]) -> None:
    """Print the medians of a measurement."""
    wall, cpu, peak = (statistics.median(getattr(cost, key) for cost in costs) for key in ("wall", "cpu", "peak"))
    print(f"{name:32} {wall:8.1f} s  {cpu:8.1f} s of CPU  {peak:6.0f} MiB  ({len(costs)} times)", flush=True)


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=300, help="of 100 images")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cores", type=int, default=4, help="trivial jobs at a time")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        driver = Driver(Path(temporary), args.shards, args.cores)
        dry = [driver.dry_run() for _ in range(args.repeats)]
        jobs = len(parse_jobs(dry[0][1]))
        print(f"{jobs} jobs, load {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores", flush=True)
        show("dry run", [cost for cost, _ in dry])
        starts = [driver.start_up() for _ in range(args.repeats)]
        show("start-up to the first job", starts)
        whole = driver.everything()
        show(f"all jobs, {args.cores} at a time", [whole])
        start = statistics.median(cost.cpu for cost in starts), statistics.median(cost.wall for cost in starts)
        each = 1000 * (whole.cpu - start[0]) / jobs, 1000 * (whole.wall - start[1]) / jobs
        print(f"{'':32} {each[1]:8.0f} ms a job, {each[0]:.0f} ms of CPU, the trivial job's own among it")
        show("nothing to be done", [driver.nothing() for _ in range(args.repeats)])
        for kind, count in sorted(files(Path(temporary)).items()):
            print(f"{kind:32} {count:8,} files")


if __name__ == "__main__":
    main()
