"""`dp2osr status`: a results folder as text for a terminal, or as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from dp2osr import show
from dp2osr.status import STATES, Progress, Row, State, chosen, total_left
from dp2osr.status_files import Status

LISTED = 8  # jobs or errors of a kind that are shown
HEADS = ["stage", *STATES, "images", "rate", "job-h", "GPU-h", "work left", "time left"]


def duration(seconds: float | None) -> str:
    """Return a time in the unit that suits it."""
    if seconds is None:
        return "-"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.0f} s"


def short(value: float) -> str:
    """Return a number of at least three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def hours(seconds: float | None) -> str:
    """Return seconds in hours, to the hundredth."""
    if seconds is None or seconds == 0:
        return "-" if seconds is None else "0"
    return "<0.01" if seconds < 36 else f"{seconds / 3600:,.0f}" if seconds >= 360000 else f"{seconds / 3600:.2f}"


def rate(row: Row) -> str:
    """Return what one job gets done: images a second, or jobs an hour where images mean nothing."""
    if row.rate is not None:
        return f"{short(row.rate)} images/s"
    return f"{short(3600 / row.job_s)} jobs/h" if row.job_s else "-"


def row_text(row: Row) -> list[str]:
    """Return the cells of a stage."""
    images = "-" if row.images is None else f"{row.images:,.0f}{'' if row.whole else '+'}"
    work = "-" if row.work_s is None else f"{hours(row.work_s)} job-h" if row.work_s else ""
    left = duration(row.left_s) if row.left_s != 0.0 else ""
    counts = [f"{row.counts[name]:,}" if row.counts[name] else "" for name in STATES]
    return [row.stage, *counts, images, rate(row), hours(row.seconds), hours(row.gpu_seconds), work, left]


def progress_text(progress: Progress | None) -> str:
    """Return a progress line in few words."""
    if progress is None:
        return "no progress line yet"
    speed = "" if progress.rate is None else f", {progress.rate:g}/s"
    left = "" if progress.left_s is None else f", {duration(progress.left_s)} left"
    return f"{progress.what} {progress.done:,} of {progress.total:,}{speed}{left}"


def text(found: Status, *, stale_min: float) -> str:
    """Return the whole status for people; `stale_min` is how it was judged."""
    blocks = [title(found)]
    if found.rows:
        blocks.append(show.grid([HEADS, *map(row_text, found.rows)]))
        blocks.append(sums(found))
    else:
        blocks.append("nothing there yet: no job has left a log or an output")
    blocks += filter(None, [running_text(found), failed_text(found), stale_text(found, stale_min)])
    if lines := notes(found):
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def title(found: Status) -> str:
    """Return the first line."""
    planned = f"{found.planned:,} jobs planned by {found.plan}"
    return f"{found.results}: {planned if found.plan else 'no config given, so what is left is not known'}"


def sums(found: Status) -> str:
    """Return the line under the table."""
    counts = {name: sum(row.counts[name] for row in found.rows) for name in STATES}
    said = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count or name == "done")
    gpu = [row.gpu_seconds for row in found.rows if row.gpu_seconds is not None]
    spent = f"{hours(sum(row.seconds for row in found.rows))} job-hours"
    spent += f", {hours(sum(gpu))} GPU-hours as far as the logs name a device" if gpu else ", and no log names a device"
    lines = [f"all: {said}; so far {spent}"]
    if found.plan and counts["done"] < sum(counts.values()):
        seconds, unknown = total_left(found.rows)
        known = f", without {', '.join(unknown)} (no job to go by)" if unknown else ""
        pace = "; no job is running"
        if running := counts["running"]:
            pace = f"; about {duration(seconds / running)} at {running:,} jobs at a time, as now"
        lines.append(f"left: {hours(seconds)} job-hours{known}{pace}")
    return "\n".join(lines)


def _more(count: int, what: str) -> list[str]:
    return [f"  … {count - LISTED:,} more {what}"] if count > LISTED else []


def running_text(found: Status) -> str:
    """Return the running jobs, the one heard of last first."""
    states = chosen(found.states, ("running",))
    lines = []
    for state in states[:LISTED]:
        heard = f"heard of {duration(state.silent_s)} ago"
        lines.append(f"  {state.job.name}: {progress_text(state.progress)}; {_noted(heard, state)}")
    return "\n".join(["running", *lines, *_more(len(states), "jobs")]) if lines else ""


def _noted(said: str, state: State) -> str:
    return f"{said}; {state.note}" if state.note else said


def failed_text(found: Status) -> str:
    """Return each error once, the last first, with the log of the job that had it last."""
    by_error: dict[str, list[State]] = {}
    for state in chosen(found.states, ("failed",)):
        by_error.setdefault(state.error, []).append(state)
    lines = []
    for error, states in list(by_error.items())[:LISTED]:
        others = f", and in {len(states) - 1:,} more logs" if len(states) > 1 else ""
        lines += [f"  {error}", f"    {found.results}/{states[0].job.log}, {duration(states[0].silent_s)} ago{others}"]
    return "\n".join(["failed, last error first", *lines, *_more(len(by_error), "errors")]) if lines else ""


def stale_text(found: Status, stale_min: float) -> str:
    """Return the jobs that went silent without an error."""
    states = chosen(found.states, ("stale",))
    lines = []
    for state in states[:LISTED]:
        silent = _noted(f"stale for {duration(state.silent_s)}", state)
        lines.append(f"  {found.results}/{state.job.log}: {silent}; {progress_text(state.progress)}")
    head = f"stale: no output, no error, and no word for {stale_min:g} minutes or more; killed from outside, or stuck"
    return "\n".join([head, *lines, *_more(len(states), "jobs")]) if lines else ""


def notes(found: Status) -> list[str]:
    """Return what else a reader should know."""
    lines = [f"note: {line}" for line in found.notes]
    if not found.plan:
        lines.append("note: name the --configfile of the run to see what is left, and images of candidates and scores")
    if found.beyond:
        lines.append(f"note: {found.beyond:,} of the finished jobs are of other configs, or of other targets")
    return lines


def as_json(found: Status) -> str:
    """Return the status for programs: stages, jobs that are not done, totals and notes."""
    listed = [_job(state) for state in chosen(found.states, ("running", "failed", "stale"))]
    seconds, unknown = total_left(found.rows)
    whole: dict[str, Any] = {
        "results": found.results,
        "plan": found.plan,
        "planned": found.planned,
        "beyond": found.beyond,
        "stages": [asdict(row) for row in found.rows],
        "jobs": listed,
        "counts": {name: sum(row.counts[name] for row in found.rows) for name in STATES},
        "seconds": sum(row.seconds for row in found.rows),
        "gpu_seconds": _sum([row.gpu_seconds for row in found.rows]),
        "work_s": seconds if found.plan else None,
        "work_unknown": unknown,
        "last_error": next((job for job in listed if job["state"] == "failed"), None),
        "notes": notes(found),
    }
    return json.dumps(whole, indent=1) + "\n"


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _job(state: State) -> dict[str, Any]:
    known = asdict(state)
    job = known.pop("job")
    return {"stage": job["stage"], "name": job["name"], "log": state.job.log, "output": job["output"], **known}
