"""What `dp2osr status` reads of a results folder. It writes nothing, locks nothing, and files may come and go."""

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from dp2osr import status, status_jobs, tables
from dp2osr.config import Config
from dp2osr.errors import UserError
from dp2osr.status import Log, Row, State
from dp2osr.status_jobs import Job

HEAD, TAIL = 4096, 16384  # bytes read of a log's ends
READERS, BATCH = 8, 128  # threads and jobs a turn: on a cluster's file system each file takes about a millisecond
Groups = dict[str, dict[str, int]]  # data set -> shard -> images
CLOSED = frozenset({"checkpoints", "figures", "tracker"})  # folders with nothing that counts


@dataclass
class Scan:
    """Files and folders by path below the results; `failed` are folders that could not be listed."""

    entries: set[str] = field(default_factory=set)
    failed: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Status:
    """All that is shown. plan: of which config files, "" without; planned: the number of its jobs; beyond: finished
    jobs that are not among them."""

    results: str
    plan: str
    planned: int
    states: list[State]
    rows: list[Row]
    beyond: int
    notes: list[str]


def look(results: Path, config: Config | None, *, plan_of: str, now: float, stale_s: float) -> Status:
    """Return the status of a results folder at the time `now`; with a config, named `plan_of`, also what is left."""
    found = scan(results)
    plan = status_jobs.planned(config) if config is not None else {}
    jobs = begun(found.entries, plan)
    states = read_states(results, jobs.values(), found.entries, plan, now=now, stale_s=stale_s)
    groups, notes = read_groups(results, {job.wildcards.get("dataset", "") for job in jobs.values()}, found.entries)
    images = {name: status_jobs.images_of(job, groups=groups, config=config) for name, job in jobs.items()}
    if not results.is_dir():
        notes.append(f"{results}: no such folder yet")
    notes = [*(f"{path}: folder not readable" for path in found.failed), *notes]
    beyond = sum(state.state == "done" and state.job.name not in plan for state in states) if plan else 0
    named = plan_of if config is not None else ""
    return Status(str(results), named, len(plan), states, status.rows(states, images), beyond, notes)


def scan(results: Path) -> Scan:
    """List everything below the results, but what lies in checkpoints, parts, policies and other results folders."""
    found = Scan()
    waiting = [("", str(results))]
    while waiting:
        prefix, folder = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                listed = [(entry.name, entry.path, entry.is_dir()) for entry in entries]
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            found.failed.append(prefix.rstrip("/") or folder)
            continue
        if prefix.count("/") == 1 and any(name == "logs" for name, _, _ in listed):
            continue  # another results folder inside this one
        for name, path, is_folder in listed:
            if name.startswith("."):
                continue
            found.entries.add(prefix + name)
            if is_folder and not name.endswith(".parts") and name not in CLOSED and not _is_policy(prefix + name):
                waiting.append((f"{prefix}{name}/", path))
    return found


def _is_policy(path: str) -> bool:
    parts = path.split("/")
    return len(parts) == 3 and parts[0] == "runs" and parts[2] == "policy"


def begun(entries: Iterable[str], plan: Mapping[str, Job]) -> dict[str, Job]:
    """Return by name the planned jobs, then those of other configs that left a log or an output."""
    jobs, known = dict(plan), {path for job in plan.values() for path in (job.log, job.output, job.benchmark)}
    rest = sorted(path for path in entries if path not in known)
    for path in rest:
        if job := status_jobs.from_log(path):
            jobs.setdefault(job.name, job)
    made = {job.output for job in jobs.values()}
    for path in rest:
        if path not in made and (job := status_jobs.from_output(path)):
            jobs.setdefault(job.name, job)
    return jobs


def read_states(
    results: Path, jobs: Iterable[Job], entries: set[str], plan: Mapping[str, Job], *, now: float, stale_s: float
) -> list[State]:
    """Return the state of each job."""

    def read(job: Job) -> State | None:
        if job.output in entries:
            timing = read_timing(f"{results}/{job.benchmark}") if job.benchmark in entries else None
            log = Log("", "", 0.0)
            if job.log in entries:
                log = read_log(results, job, now=now, whole=timing is None)
            seconds = timing if timing is not None else status.elapsed(log)  # Snakemake may die before its job
            return State(job, "done", seconds=seconds, gpus=status.num_gpus(log.head))
        if job.log in entries or f"{job.output}.parts" in entries:
            log = read_log(results, job, now=now)
            return status.judge(job, log, stale_s=stale_s)
        return State(job, "left") if job.name in plan else None

    waiting = list(jobs)
    batches = [waiting[start : start + BATCH] for start in range(0, len(waiting), BATCH)]
    with ThreadPoolExecutor(READERS) as pool:
        read_all = pool.map(lambda batch: [read(job) for job in batch], batches)
        return [state for states in read_all for state in states if state is not None]


def read_log(results: Path, job: Job, *, now: float, whole: bool = True) -> Log:
    """Return the ends of a job's log, or its beginning alone, and for how long the job has been silent."""
    head = tail = unread = ""
    try:
        with open(f"{results}/{job.log}", "rb", buffering=0) as handle:  # noqa: PTH123 - thousands of paths
            head = _text(handle.read(HEAD))
            if whole:
                handle.seek(max(os.fstat(handle.fileno()).st_size - TAIL, 0))
                tail = _text(handle.read(TAIL))
    except FileNotFoundError:
        unread = "not there" if whole else ""
    except OSError as error:
        unread = str(error.strerror)
    return Log(head, tail, silent(results, job, now=now) if whole else 0.0, unread)


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")


def silent(results: Path, job: Job, *, now: float) -> float:
    """Return the seconds since a job wrote its log, a part of its output or a checkpoint."""
    places = [results / job.log, *_inside(results / f"{job.output}.parts")]
    if job.stage in ("train", "pretrain"):
        places += _inside((results / job.output).parent / "checkpoints")
    times = [time for place in places if (time := _modified(place)) is not None]
    return max(now - max(times), 0.0) if times else 0.0


def _inside(folder: Path) -> list[Path]:
    """Return a folder and the folders in it: their times change with each file that appears in them."""
    try:
        return [folder, *(Path(entry.path) for entry in os.scandir(folder))]
    except OSError:
        return []


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def read_timing(path: str) -> float | None:
    """Return the wall-clock seconds of Snakemake's benchmark file, None where there are none (yet)."""
    try:
        with open(path, "rb", buffering=0) as handle:  # noqa: PTH123
            return float(handle.read(HEAD).splitlines()[1].split(b"\t")[0])
    except (OSError, IndexError, ValueError):
        return None


def read_groups(results: Path, datasets: Iterable[str], entries: set[str]) -> tuple[Groups, list[str]]:
    """Return the images of each shard by data set, of those that were ingested; and notes on tables that are broken."""
    found: Groups = {}
    notes = []
    for name in sorted(filter(None, datasets)):
        path = f"{name}/images.parquet"
        if path not in entries:
            continue
        try:
            table = tables.read(results / path, tables.IMAGES)
        except (UserError, OSError) as error:
            notes.append(str(error))
            continue
        counts = table.loc[table["status"] == "ok", "shard"].value_counts()
        found[name] = {f"{shard:04d}": int(count) for shard, count in counts.items()}
    return found, notes
