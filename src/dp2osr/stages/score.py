"""Score the candidates of one block with one group of metrics; every raw value becomes a row.

Candidates are read in chunks; each finished chunk is kept beside the output, so that a killed job goes on from there.
"""

import argparse
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from dp2osr import resume, stage, tables, versions
from dp2osr.config_metrics import Vqr1Settings
from dp2osr.errors import UserError
from dp2osr.metrics import METRICS
from dp2osr.strict import Count, Strict

if TYPE_CHECKING:
    import torch

    from dp2osr.iqa.metric import Scorer

LOG = logging.getLogger("score")
CHUNK = 64  # candidates in a part; no value depends on it beyond float32 rounding

Row = tuple[str, int, str, float, str]  # tables.SCORES
Candidate = tuple[str, int, bytes]  # group_id, rollout, PNG or WebP


class ScoreJob(Strict):
    """What determines the scores: the metrics, and NIQE's block size in pixels (ignored without niqe).

    vqr1: how VisualQuality-R1 is run, where it is among the metrics.
    """

    metrics: list[str]
    niqe_block: Count
    vqr1: Vqr1Settings | None = None


def read_candidates(path: Path) -> Iterator[Candidate]:
    """Yield group, rollout and encoded image of each candidate of a tar, in its order."""
    from dp2osr.shards import read_shard

    for key, fields in read_shard(path):
        image = fields.get("png", fields.get("webp"))
        if image is None or "json" not in fields:
            raise UserError(f"candidates {path}: {key}: found fields {sorted(fields)}, wanted json and png or webp")
        notes = json.loads(fields["json"])
        yield notes["group_id"], notes["rollout"], image


def read_hr(path: Path) -> dict[str, bytes]:
    """Return group -> encoded HR image of an LR shard."""
    from dp2osr.shards import read_shard

    return {key: fields["hr.png"] for key, fields in read_shard(path) if "hr.png" in fields}


def score_chunk(chunk: Sequence[Candidate], hr: Mapping[str, bytes], scorer: "Scorer") -> list[Row]:
    """Score candidates; each image is decoded once for all metrics, each HR image once a run of its group.

    Returns one row of tables.SCORES a candidate and metric.
    """
    import torch

    from dp2osr.shards import decode_image

    images = [decode_image(data) for _, _, data in chunk]
    rows: list[Row] = []
    for _, run in groupby(range(len(chunk)), key=lambda index: images[index].shape):
        picked = list(run)
        keys = [chunk[index][:2] for index in picked]
        batch = torch.stack([images[index] for index in picked])
        references = _references([group for group, _ in keys], hr, batch) if scorer.needs_hr else None
        rows += score_rows(keys, batch, references, scorer)
    return rows


def score_rows(
    keys: Sequence[tuple[str, int]], images: "torch.Tensor", hr: "torch.Tensor | None", scorer: "Scorer"
) -> list[Row]:
    """Score images (B, 3, H, W) against hr of the same shape; keys are their groups and rollouts."""
    from dp2osr.iqa.metric import statuses

    height, width = images.shape[-2:]
    rows: list[Row] = []
    for name, values in scorer.score(images, hr).items():
        found = statuses(values, too_small=scorer.too_small(name, height, width))
        status = [METRICS[name].named(each, height, width) for each in found]
        rows += [(*key, name, float(value), state) for key, value, state in zip(keys, values, status, strict=True)]
    return rows


def _references(groups: Sequence[str], hr: Mapping[str, bytes], images: "torch.Tensor") -> "torch.Tensor":
    import torch

    from dp2osr.shards import decode_image

    found: list[torch.Tensor] = []
    for group, run in groupby(groups):
        if group not in hr:
            raise UserError(f"scores: group {group} has candidates but no HR image in the LR shard")
        image = decode_image(hr[group])
        if image.shape != images.shape[1:]:
            raise UserError(
                f"scores: group {group}: HR is {tuple(image.shape[1:])}, candidates {tuple(images.shape[2:])}"
            )
        found += [image] * len(list(run))
    return torch.stack(found)


def score_all(
    candidates: Iterable[Candidate],
    hr: Mapping[str, bytes],
    scorer: "Scorer",
    parts: resume.Parts,
    *,
    num_candidates: int,
) -> pd.DataFrame:
    """Score chunk by chunk, taking finished chunks from `parts`. Returns rows of tables.SCORES."""
    rows: list[list[Any]] = []
    source, total = iter(candidates), -(-num_candidates // CHUNK)
    chunks = iter(lambda: list(islice(source, CHUNK)), [])
    named = stage.progress(chunks, total, f"chunks of {CHUNK} candidates", LOG, kept=len(parts.names()))
    for number, chunk in enumerate(named):
        name = f"{number:06d}.json"
        if (data := parts.get(name)) is None:
            data = json.dumps(score_chunk(chunk, hr, scorer)).encode()
            parts.put(name, data)
        rows += json.loads(data)
    return pd.DataFrame(rows, columns=tables.SCORES.names)


def log_summary(frame: pd.DataFrame, scorer: "Scorer") -> None:
    """Log images per second of each metric, and how many scores are no number."""
    for name, seconds in scorer.seconds.items():
        if scorer.num_scored and seconds:
            LOG.info("%s: %.1f images/s (%s)", name, scorer.num_scored / seconds, scorer.device)
    bad = frame[frame["status"] != "ok"]
    for (metric, status), count in sorted(Counter(zip(bad["metric"], bad["status"], strict=True)).items()):
        LOG.warning("%s: %d of %d scores are %s", metric, count, (frame["metric"] == metric).sum(), status)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = stage.parser(__doc__)
    parser.add_argument("--candidates", type=Path, required=True, help="candidates of one block (tar)")
    parser.add_argument("--lr", type=Path, required=True, help="LR shard that holds the HR images (tar)")
    parser.add_argument("--niqe", type=Path, help="model that the niqe stage fitted, where niqe is among the metrics")
    parser.add_argument("--batch-size", type=int, default=32, help="most images that a metric takes at once")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--scores", type=Path, required=True, help="table to write (parquet)")
    stage.config_arg(parser, ScoreJob)
    return stage.parse_args(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: candidates, HR and NIQE's model in, the block's score table out."""
    args = parse_args(argv)
    from dp2osr import shards
    from dp2osr.iqa.metric import Scorer
    from dp2osr.iqa.origin import origins

    job: ScoreJob = args.config
    settings = (job.model_dump_json(), f"{versions.SCORE} {version('pyiqa')}", f"{args.batch_size} {args.device}")
    files = [path for path in (args.candidates, args.lr, args.niqe) if path is not None]
    parts = resume.Parts(args.scores, resume.fingerprint(*settings, *files))
    device = stage.device(args.device)
    how = {"niqe": args.niqe, "niqe_block": job.niqe_block, "vqr1": job.vqr1}
    scorer = Scorer(job.metrics, device=device, batch_size=args.batch_size, **how)
    count = shards.count_samples(args.candidates)
    frame = score_all(read_candidates(args.candidates), read_hr(args.lr), scorer, parts, num_candidates=count)
    made_by = origins(job.metrics, niqe=args.niqe, vqr1=job.vqr1)
    tables.write(frame, args.scores, tables.SCORES, origins=made_by)
    parts.clear()
    log_summary(frame, scorer)


if __name__ == "__main__":
    stage.run(main)
