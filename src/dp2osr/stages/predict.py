"""What the model of a downstream benchmark sees in one source's images: HR, enlarged LR, or restorations, one shard.

Finished chunks are kept beside the output until it stands, so that a killed job goes on where it was.
"""

import argparse
import json
import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from dp2osr import images, resume, stage, tables, versions
from dp2osr.errors import UserError
from dp2osr.strict import Count, Strict

if TYPE_CHECKING:
    from dp2osr.downstream.seers import Pixels, Seer

LOG = logging.getLogger("predict")
CHUNK = 16  # images in a part

Row = tuple[str, int, str, str, str]  # tables.PREDICTIONS
Sample = tuple[dict[str, Any], dict[str, bytes]]  # facts, fields of a shard


class PredictJob(Strict):
    """What determines the predictions; `scale` is what HR is cut and LR enlarged by."""

    kind: str
    architecture: str
    scale: Count
    max_pixels: Count


def read(path: Path) -> Iterator[Sample]:
    """Yield facts and fields of each sample of a shard of LR images or restorations."""
    from dp2osr.shards import read_shard

    for _, fields in read_shard(path):
        yield json.loads(fields["json"]), fields


def pixels(sample: Sample, args: argparse.Namespace) -> "Pixels":
    """Return the image (H, W, 3) uint8 RGB that the model sees; all sources have the same size."""
    import numpy as np

    from dp2osr import sampling, shards

    facts, fields = sample
    scale = args.config.scale
    if "png" in fields:
        return shards.to_uint8(shards.decode_image(fields["png"]))
    if args.images is None:
        return shards.to_uint8(sampling.images_control(shards.decode_image(fields["lr.png"])[None], scale)[0])
    with images.Sources() as sources:
        data = sources.read((args.images / facts["file"]).as_posix(), facts["sha256"])
    array = images.decode(data, max_pixels=args.config.max_pixels)
    rows, columns = (side // scale * scale for side in array.shape[:2])
    return np.ascontiguousarray(array[:rows, :columns])


def annotation_of(facts: dict[str, Any], args: argparse.Namespace) -> Path | None:
    """Return the file of labels of a photograph, where each has its own that the prediction is counted against."""
    return args.annotations / f"{facts['name']}.png" if args.config.kind == "segmentation" else None


def see(sample: Sample, seer: "Seer", args: argparse.Namespace) -> Row:
    """Return the row of an image."""
    facts, _ = sample
    found = seer.see(pixels(sample, args), annotation_of(facts, args)) if facts["status"] == "ok" else ""
    return facts["name"], facts.get("rollout", 0), facts["status"], facts["reason"], found


def predict(source: Iterator[Sample], seer: "Seer", args: argparse.Namespace, parts: resume.Parts) -> pd.DataFrame:
    """Predict chunk by chunk, taking finished ones from `parts`. Returns rows of tables.PREDICTIONS."""
    from dp2osr.shards import count_samples

    total = -(-count_samples(args.source) // CHUNK)
    chunks = iter(lambda: list(islice(source, CHUNK)), [])
    named = stage.progress(chunks, total, f"chunks of {CHUNK} images", LOG, kept=len(parts.names()))
    rows: list[list[Any]] = []
    for number, chunk in enumerate(named):
        name = f"{number:06d}.json"
        if (data := parts.get(name)) is None:
            data = json.dumps([see(sample, seer, args) for sample in chunk]).encode()
            parts.put(name, data)
        rows += json.loads(data)
    return pd.DataFrame(rows, columns=tables.PREDICTIONS.names).astype({"rollout": "int32"})


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: a shard of images and a model in, the table of its predictions out."""
    args = parse_args(argv)
    from dp2osr.downstream import seers

    job: PredictJob = args.config
    if not args.model.exists():
        raise UserError(f"{job.kind} model {args.model}: not found")
    device = stage.device(args.device)
    settings = f"{versions.PREDICT} {job.model_dump_json()} {device.type} {args.images}"
    parts = resume.Parts(args.predictions, resume.fingerprint(settings, args.source, args.model, args.annotations))
    options = {"architecture": job.architecture, "annotations": args.annotations, "device": device}
    seer = seers.load(job.kind, args.model, **options)
    tables.write(predict(read(args.source), seer, args, parts), args.predictions, tables.PREDICTIONS)
    parts.clear()


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = stage.parser(__doc__)
    parser.add_argument(
        "--source", type=Path, required=True, help="shard of restorations, or of LR images: seen enlarged by bicubic"
    )
    parser.add_argument("--images", type=Path, help="folder of photographs: with a shard of LR images, HR is seen")
    parser.add_argument("--annotations", type=Path, required=True, help="the benchmark's JSON, or folder")
    parser.add_argument("--model", type=Path, required=True, help="folder in transformers' layout, or weights")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--predictions", type=Path, required=True, help="table to write (parquet)")
    stage.config_arg(parser, PredictJob)
    return stage.parse_args(parser, argv)


if __name__ == "__main__":
    stage.run(main)
