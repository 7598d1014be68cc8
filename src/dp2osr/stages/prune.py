"""Drop the candidates that no run selects from finished shards, for at full scale they are most of the disk.

A shard is rewritten in place and keeps its modification time, so that the tables made from it stay up to date. What
was dropped comes back only by sampling again: a new metric or a run that selects others needs the shards anew. The
summary says what is there now, for a job that was killed half-way no longer knows what had been.
"""

import json
import logging
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dp2osr import resume, stage, tables

if TYPE_CHECKING:
    from dp2osr.shards import Sample

logger = logging.getLogger(__name__)


def selected(paths: Sequence[Path]) -> set[str]:
    """Return the keys of all candidates that the pairs of any run hold."""
    pairs = tables.read_many(paths, tables.PAIRS)
    sides = (zip(pairs["group_id"], pairs[side], strict=True) for side in ("chosen", "rejected"))
    return {f"{group}-r{rollout:04d}" for side in sides for group, rollout in side}


def prune(path: Path, keep: Collection[str]) -> dict[str, int]:
    """Rewrite a shard with the candidates named in `keep` alone. Returns counts of candidates and bytes."""
    from dp2osr.shards import read_shard, write_shard

    before = path.stat()
    counts = {"kept": 0, "dropped": 0}

    def kept() -> Iterator["Sample"]:
        for key, fields in read_shard(path):
            counts["kept" if key in keep else "dropped"] += 1
            if key in keep:
                yield key, fields

    smaller = path.with_name(f".{path.name}.pruned")
    write_shard(smaller, kept())
    os.utime(smaller, ns=(before.st_atime_ns, before.st_mtime_ns))
    smaller.replace(path)
    size = path.stat().st_size
    return {**counts, "bytes": size, "bytes_freed": before.st_size - size}


def main(argv: Sequence[str] | None = None) -> None:
    """Prune shards of candidates to what the pairs select."""
    parser = stage.parser(__doc__)
    parser.add_argument("--pairs", type=Path, nargs="+", required=True, help="pairs of all runs on these candidates")
    parser.add_argument("--candidates", type=Path, nargs="+", required=True, help="shards, rewritten in place")
    parser.add_argument("--summary", type=Path, required=True, help="output: JSON with the candidates and bytes left")
    args = stage.parse_args(parser, argv)
    keep = selected(args.pairs)
    results = [prune(path, keep) for path in stage.progress(args.candidates, len(args.candidates), "shards", logger)]
    total = {name: sum(result[name] for result in results) for name in results[0]}
    logger.info("kept %(kept)d candidates, dropped %(dropped)d, freed %(bytes_freed)d bytes", total)
    if total["kept"] < len(keep):
        logger.warning("%d selected candidates are not in these shards", len(keep) - total["kept"])
    left = {name: total[name] for name in ("kept", "bytes")}
    resume.write_bytes(args.summary, json.dumps(left, sort_keys=True).encode() + b"\n")


if __name__ == "__main__":
    stage.run(main)
