"""What made a result: versions, the commit, and how long the jobs took."""

import os
import platform
import re
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pandas as pd

from dp2osr import tables, versions

PACKAGES = ("dp2o-sr", "torch", "diffusers", "transformers", "accelerate", "pyiqa", "snakemake", "numpy", "pandas")


def commit() -> str | None:
    """Return the git commit of the working directory, marked where files differ from it; None outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def software() -> dict[str, str]:
    """Return name -> version of what computed the result."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    found["CPU cores"] = str(os.cpu_count())
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["git commit"] = commit() or "none"
    stages = {name.lower(): value for name, value in vars(versions).items() if name.isupper()}
    found["stage versions"] = ", ".join(f"{name} {value}" for name, value in stages.items())
    return found


def metrics(evaluations: Iterable[Path]) -> dict[str, str]:
    """Return `metric NAME` -> what made its numbers in evaluation tables, of several makings one a line."""
    found: dict[str, list[str]] = {}
    for path in evaluations:
        for name, origin in tables.read_origins(path).items():
            lines = found.setdefault(f"metric {name}", [])
            lines += [origin] if origin not in lines else []
    return {name: "\n".join(lines) for name, lines in sorted(found.items())}


def timings(paths: Iterable[Path]) -> pd.DataFrame:
    """Sum Snakemake's benchmark files by kind of job: job, jobs, seconds, max_rss (MB).

    A path is a file, a folder (all below it) or a pattern such as `folder/*.tsv`; those that do not exist are passed
    over, as are empty files. Numbers of shards and blocks in a file's name are folded: a stage's jobs are one row.
    """
    rows = []
    for path in paths:
        files = sorted(path.rglob("*.tsv")) if path.is_dir() else sorted(path.parent.glob(path.name))
        for file in files:
            named = file.relative_to(path.parent.parent)
            job = re.sub(r"\d{3,}", "*", named.with_suffix("").as_posix())
            if not file.stat().st_size:  # Snakemake makes it before it writes it: of a killed job it stays empty
                continue
            table = pd.read_csv(file, sep="\t", na_values="-")
            rows.append({"job": job, "seconds": float(table["s"].sum()), "max_rss": float(table["max_rss"].max())})
    frame = pd.DataFrame(rows, columns=["job", "seconds", "max_rss"])
    summed = frame.groupby("job").agg(jobs=("job", "size"), seconds=("seconds", "sum"), max_rss=("max_rss", "max"))
    return summed.reset_index().sort_values("seconds", ascending=False, kind="stable")
