"""Score the candidates of one block with one group of metrics; every raw value becomes a row.

Candidates are read in chunks; each finished chunk is kept beside the output, so that a killed job goes on from there.
A thread reads and decodes the next chunk while the metrics work on this one.
"""

import argparse
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from dp2osr import resume, stage, tables, versions
from dp2osr.ahead import Ahead
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


@dataclass(frozen=True)
class Batch:
    """Decoded candidates of one size: keys (group_id, rollout), images (B, 3, H, W) and the B HR images beside them."""

    keys: list[tuple[str, int]]
    images: "torch.Tensor"
    hr: "list[torch.Tensor] | None"


def read_candidates(path: Path) -> Iterator[Candidate]:
    """Yield group, rollout and encoded image of each candidate of a tar, in its order."""
    from dp2osr.shards import read_shard

    for key, fields in read_shard(path):
        image = fields.get("png", fields.get("webp"))
        if image is None or "json" not in fields:
            raise UserError(f"candidates {path}: {key}: found fields {sorted(fields)}, wanted json and png or webp")
        try:
            notes = json.loads(fields["json"])
            yield str(notes["group_id"]), int(notes["rollout"]), image
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"candidates {path}: {key}.json: wanted group_id and rollout ({error!r})") from None


class HrImages:
    """The HR images of an LR shard, by group; the last one stays decoded, since a group's candidates stand together."""

    def __init__(self, path: Path) -> None:
        from dp2osr.shards import read_shard

        self.path = path
        self._encoded = {key: fields["hr.png"] for key, fields in read_shard(path) if "hr.png" in fields}
        self._last: tuple[str, torch.Tensor] | None = None

    def decode(self, group: str) -> "torch.Tensor":
        """Return a group's HR image (3, H, W), the same tensor for calls in a row."""
        if self._last is None or self._last[0] != group:
            if group not in self._encoded:
                raise UserError(f"scores: group {group} has candidates but no HR image in the LR shard {self.path}")
            self._last = group, _decode(self._encoded[group], f"LR shard {self.path}: {group}.hr.png")
        return self._last[1]


def _decode(data: bytes, what: str) -> "torch.Tensor":
    from dp2osr.shards import decode_image

    try:
        return decode_image(data)
    except Exception as error:  # of a damaged image, Pillow raises errors of many kinds
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{what}: no readable PNG or WebP image ({reason}); delete the file and run again") from None


def decode_chunk(chunk: Sequence[Candidate], source: Path, hr: HrImages | None, *, pin: bool = False) -> list[Batch]:
    """Decode candidates of the tar `source`, a batch for each run of one size.

    pin: into memory from which CUDA copies while the host goes on.
    """
    import torch

    images = [_decode(data, f"candidates {source}: group {group}, rollout {m}") for group, m, data in chunk]
    batches = []
    for _, run in groupby(range(len(chunk)), key=lambda index: images[index].shape):
        picked = list(run)
        keys = [chunk[index][:2] for index in picked]
        stacked = torch.stack([images[index] for index in picked])
        beside = None if hr is None else [_reference(group, hr, stacked) for group, _ in keys]
        batches.append(Batch(keys, stacked.pin_memory() if pin else stacked, beside))
    return batches


def _reference(group: str, hr: HrImages, images: "torch.Tensor") -> "torch.Tensor":
    image = hr.decode(group)
    if image.shape != images.shape[1:]:
        raise UserError(f"scores: group {group}: HR is {tuple(image.shape[1:])}, candidates {tuple(images.shape[2:])}")
    return image


def score_batch(batch: Batch, scorer: "Scorer") -> list[Row]:
    """Return one row of tables.SCORES a candidate and metric."""
    from dp2osr.iqa.metric import ScoringError, statuses

    try:
        scores = scorer.score(batch.images, batch.hr)
    except ScoringError as error:
        group, rollout = batch.keys[error.index]
        raise UserError(f"metric '{error.metric}': group {group}, rollout {rollout}: {error.reason}") from error
    height, width = batch.images.shape[-2:]
    rows: list[Row] = []
    for name, values in scores.items():
        found = statuses(values, too_small=scorer.too_small(name, height, width))
        status = [METRICS[name].named(each, height, width) for each in found]
        rows += [
            (*key, name, float(value), state) for key, value, state in zip(batch.keys, values, status, strict=True)
        ]
    return rows


def prepare(
    candidates: Iterable[Candidate], source: Path, hr: HrImages | None, parts: resume.Parts, *, pin: bool = False
) -> Iterator[tuple[str, "bytes | list[Batch]"]]:
    """Yield each chunk's name in `parts`, and its rows where they are finished, else its images."""
    rest = iter(candidates)
    for number, chunk in enumerate(iter(lambda: list(islice(rest, CHUNK)), [])):
        name = f"{number:06d}.json"
        data = parts.get(name)
        yield name, decode_chunk(chunk, source, hr, pin=pin) if data is None else data


def score_all(
    chunks: Iterable[tuple[str, "bytes | list[Batch]"]], scorer: "Scorer", parts: resume.Parts, *, num_candidates: int
) -> pd.DataFrame:
    """Score the chunks of `prepare`, keeping each in `parts`. Returns rows of tables.SCORES."""
    rows: list[list[Any]] = []
    total = -(-num_candidates // CHUNK)
    for name, chunk in stage.progress(chunks, total, f"chunks of {CHUNK} candidates", LOG, kept=len(parts.names())):
        data = chunk
        if isinstance(data, list):
            data = json.dumps([row for batch in data for row in score_batch(batch, scorer)]).encode()
            parts.put(name, data)
        rows += json.loads(data)
    return pd.DataFrame(rows, columns=tables.SCORES.names)


def log_summary(frame: pd.DataFrame, scorer: "Scorer", *, waited_s: float) -> None:
    """Log images per second of each metric, how long it waited for images, and how many scores are no number."""
    for name, seconds in scorer.seconds.items():
        if count := scorer.counts[name]:
            rate = count / max(seconds, 1e-9)
            LOG.info("%s: %.1f images/s (%s), %d images in %.1f s", name, rate, scorer.device, count, seconds)
    LOG.info("reading and decoding: the metrics waited %.1f s", waited_s)
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
    hr = HrImages(args.lr) if scorer.needs_hr else None
    chunks = prepare(read_candidates(args.candidates), args.candidates, hr, parts, pin=device.type == "cuda")
    with Ahead(chunks) as ahead:
        frame = score_all(ahead, scorer, parts, num_candidates=count)
    made_by = origins(job.metrics, niqe=args.niqe, vqr1=job.vqr1)
    tables.write(frame, args.scores, tables.SCORES, origins=made_by)
    parts.clear()
    log_summary(frame, scorer, waited_s=ahead.waited_s)


if __name__ == "__main__":
    stage.run(main)
