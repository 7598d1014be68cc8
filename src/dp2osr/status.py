"""What a results folder says of a run: the state of each job, and sums by stage. Nothing here touches a file or clock.

A job whose output stands is done. Of the others the log tells: it ends in an error (failed), was written not long ago
(running) or is silent (stale: killed without a word, or stuck). What has left no trace and is planned is left.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from dp2osr.status_jobs import PATTERNS, Job

STATES = ("done", "running", "failed", "stale", "left")
STALE_MIN = 15.0  # loading a large model, a slow validation or a metric's first batch is silent for less

_STAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ")
_ERROR = re.compile(r"(?:\S+: )?error: .+")
_TRACEBACK = "Traceback (most recent call last)"
_STOPPED = "SIGTERM: saving a checkpoint and stopping"
_PROGRESS = re.compile(
    r"(?:\S+: )?(?P<what>.+?):? (?P<done>\d+)(?: of |/)(?P<total>\d+)\b.*, "
    r"(?P<rate>\d+(?:\.\d+)?(?:e[+-]?\d+)?)(?: steps)?/s, (?P<left>\d+) s left"
)
_STEP = re.compile(r"(?:\S+: )?(?P<what>step) (?P<done>\d+) of (?P<total>\d+): .*(?P<rate>)(?P<left>)")
_DEVICE = re.compile(rf"^{_STAMP.pattern}.*: device (cpu|cuda)\b", re.MULTILINE)
_SCORED = re.compile(rf"^{_STAMP.pattern}.* images/s \((cpu|cuda)\b", re.MULTILINE)


@dataclass(frozen=True)
class Log:
    """The two ends of a log. silent_s: seconds since its last line or finished part; unread: why it has no text."""

    head: str
    tail: str
    silent_s: float
    unread: str = ""


@dataclass(frozen=True)
class Progress:
    """A progress line: `done` of `total` things; rate: of them a second; left_s: seconds; both None in old logs."""

    what: str
    done: int
    total: int
    rate: float | None
    left_s: float | None

    @property
    def share(self) -> float:
        """Return the finished share, in [0, 1]."""
        return min(self.done / self.total, 1.0) if self.total else 0.0


@dataclass(frozen=True)
class State:
    """The state of a job. seconds: that it took, or has taken so far; gpus: that it held, None where unknown."""

    job: Job
    state: str
    seconds: float | None = None
    gpus: int | None = None
    progress: Progress | None = None
    error: str = ""
    silent_s: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A stage. images: finished ones, of the jobs where that is known (all of them: `whole`); seconds of all jobs so
    far, and those on GPUs; rate: images a second of one job, of those with a timing; job_s: mean seconds of a job;
    work_s: what is left, in seconds of a job; left_s: at the present number of jobs."""

    stage: str
    counts: Mapping[str, int]
    images: float | None
    whole: bool
    seconds: float
    gpu_seconds: float | None
    rate: float | None
    job_s: float | None
    work_s: float | None
    left_s: float | None


def find_progress(text: str) -> Progress | None:
    """Return the last progress line of a log, or None."""
    for line in reversed(text.splitlines()):
        stamp = _STAMP.match(line)
        text = line[stamp.end() :] if stamp else ""
        if found := _PROGRESS.fullmatch(text) or _STEP.fullmatch(text):
            rate, left = (float(found[name]) if found[name] else None for name in ("rate", "left"))
            return Progress(found["what"], int(found["done"]), int(found["total"]), rate, left)
    return None


def find_error(text: str) -> str:
    """Return the error that a log ends with, in one line; "" where its last words are none.

    Of several processes one's traceback may come last, though a line `error: …` of another says more.
    """
    lines = text.splitlines()
    last = max((at for at, line in enumerate(lines) if _STAMP.match(line)), default=-1)
    ended = [line for line in lines[last + 1 :] if _ERROR.fullmatch(line) or _TRACEBACK in line]
    if not ended:
        return ""
    if told := [line for line in lines if _ERROR.fullmatch(line)]:
        return told[-1].partition("error: ")[2].strip()
    start = max(at for at, line in enumerate(lines) if _TRACEBACK in line)
    return next((line.strip() for line in lines[start + 1 :] if line[:1].strip()), "a traceback cut short")


def num_gpus(text: str) -> int | None:
    """Return how many GPUs the processes of a job hold: one for each line that names a CUDA device, 0 on the CPU."""
    if ": device " in text and (own := _DEVICE.findall(text)):
        return int(own.count("cuda"))
    if " images/s (" in text and (told := _SCORED.findall(text)):
        return int("cuda" in told)
    return None


def elapsed(log: Log) -> float | None:
    """Return the seconds between the first and the last time in a log, None where it names none."""
    stamps = [found[0] for text in (log.head, log.tail) for found in _STAMP.finditer(text)]
    try:
        first, last = (datetime.strptime(stamps[at].strip(), "%Y-%m-%d %H:%M:%S,%f") for at in (0, -1))
    except (IndexError, ValueError):
        return None
    return max((last - first).total_seconds(), 0.0)


def judge(job: Job, log: Log, *, stale_s: float) -> State:
    """Return the state of a job that has begun and has no output."""
    progress, error = find_progress(log.tail), find_error(log.tail)
    known = State(job, "failed", elapsed(log), num_gpus(log.head), progress, error, log.silent_s)
    if error:
        return known
    note = f"log not readable ({log.unread})" if log.unread else ""
    if _STOPPED in log.tail:
        return replace(known, state="stale", note="stopped by SIGTERM, checkpoint saved")
    return replace(known, state="stale" if log.silent_s >= stale_s else "running", note=note)


def rows(states: Sequence[State], images: Mapping[str, int | None]) -> list[Row]:
    """Return one row for each stage that has jobs. images: of each job, by its name."""
    by_stage: dict[str, list[State]] = {}
    for state in states:
        by_stage.setdefault(state.job.stage, []).append(state)
    return [_row(stage, by_stage[stage], images) for stage in PATTERNS if stage in by_stage]


def _row(stage: str, states: Sequence[State], images: Mapping[str, int | None]) -> Row:
    counts = {name: sum(state.state == name for state in states) for name in STATES}
    timed = [state for state in states if state.seconds is not None]
    on_gpu = [state.seconds * state.gpus for state in timed if state.gpus is not None and state.seconds is not None]
    begun = [(_share(state), images[state.job.name]) for state in states if state.state in ("done", "running")]
    known = [share * amount for share, amount in begun if amount is not None]
    each, work = _job_seconds(states), None
    if counts["done"] == len(states):
        work = 0.0
    elif each is not None:
        work = sum(_work(state, each) for state in states)
    return Row(
        stage,
        counts,
        sum(known) if known else None,
        len(known) == len(begun),
        sum(state.seconds or 0.0 for state in timed),
        sum(on_gpu) if on_gpu else None,
        _rate(states, images),
        each,
        work,
        _wait(states, work),
    )


def _share(state: State) -> float:
    """Return the finished share of a job that is done or running; of a dead one it may be lost."""
    if state.state == "done":
        return 1.0
    return state.progress.share if state.state == "running" and state.progress else 0.0


def _job_seconds(states: Iterable[State]) -> float | None:
    """Return the mean seconds of a job: of the finished ones, else as the progress of the running ones promises."""
    states = list(states)
    known = [state.seconds for state in states if state.state == "done" and state.seconds is not None]
    if not known:
        known = [
            state.seconds / state.progress.share
            for state in states
            if state.state == "running" and state.seconds and state.progress and state.progress.share
        ]
    return sum(known) / len(known) if known else None


def _work(state: State, each: float) -> float:
    """Return the seconds that a job still takes: a log's own word where it runs, else the mean of its stage."""
    if state.state == "done":
        return 0.0
    if state.state == "running":
        if state.progress is not None and state.progress.left_s is not None:
            return max(state.progress.left_s - (state.silent_s or 0.0), 0.0)
        return max(each - (state.seconds or 0.0), 0.0)
    return each


def _wait(states: Sequence[State], work: float | None) -> float | None:
    """Return when a stage is ready, if as many jobs run at a time as now; None where none runs."""
    running = [state for state in states if state.state == "running"]
    if work == 0.0:
        return 0.0
    return work / len(running) if running and work is not None else None


def _rate(states: Iterable[State], images: Mapping[str, int | None]) -> float | None:
    """Return images a second of one job: over those that left a timing, else over those that run."""
    states = list(states)
    for name in ("done", "running"):
        timed = [state for state in states if state.state == name and state.seconds and images[state.job.name]]
        count = sum((images[state.job.name] or 0) * _share(state) for state in timed)
        seconds = sum(state.seconds or 0.0 for state in timed)
        if count and seconds:
            return count / seconds
    return None


def total_left(found: Iterable[Row]) -> tuple[float, list[str]]:
    """Return the seconds of a job that all stages still take, as far as known, and the stages where it is not."""
    found = list(found)
    unknown = [row.stage for row in found if row.work_s is None]
    return sum(row.work_s or 0.0 for row in found), unknown


def chosen(states: Iterable[State], names: Collection[str]) -> list[State]:
    """Return the jobs in these states, the one heard of last first."""
    found = [state for state in states if state.state in names]
    return sorted(found, key=lambda state: state.silent_s if state.silent_s is not None else float("inf"))
