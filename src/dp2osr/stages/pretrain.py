"""Pretrain a tiny SD-style model with a control branch from HR images.

Writes a model folder in diffusers' layout (vae, unet, controlnet, text_encoder, tokenizer, scheduler) and a log.
With `backbone` set, that model stays frozen and only a control branch is trained on it.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from dp2osr import images, stage, tables
from dp2osr.config import DatasetSettings, PretrainSettings
from dp2osr.strict import Strict

log = logging.getLogger(__name__)


class PretrainJob(Strict):
    """Settings of the job."""

    pretrain: PretrainSettings
    dataset: DatasetSettings
    seed: int


def read_sources(table: pd.DataFrame, *, max_pixels: int) -> list[tuple[np.ndarray, bool]]:
    """Return each used file of images.parquet as (H, W, 3) uint8, and whether it is a photograph."""
    used = table[table.status == "ok"].drop_duplicates("source").sort_values("source")
    found = []
    with images.Sources() as sources:
        for source, sha256 in zip(used.source.astype(str), used.sha256.astype(str), strict=True):
            array = images.decode(sources.read(source, sha256), max_pixels=max_pixels)
            found.append((array, not source.startswith("builtin:dead-leaves/")))
    log.info("%d sources", len(found))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Read the dataset's images, build the pool, train, save."""
    parser = stage.parser(__doc__)
    stage.config_arg(parser, PretrainJob)
    parser.add_argument("--images", type=Path, required=True, help="images.parquet of the dataset")
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder that survives a killed job")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--model", type=Path, required=True, help="model folder to write")
    parser.add_argument("--log-table", type=Path, required=True, help="pretrain_log.parquet to write")
    args = stage.parse_args(parser, argv)
    job: PretrainJob = args.config

    from dp2osr.training import pool, pretrain

    sources = read_sources(tables.read(args.images, tables.IMAGES), max_pixels=job.dataset.max_pixels)
    pairs = pool.draw(sources, job.dataset, job.pretrain, seed=job.seed)
    device = stage.device(args.device)
    trainer = pretrain.Trainer(job.pretrain, pairs, args.checkpoints, seed=job.seed, device=device)
    trainer.run()
    trainer.save(args.model)
    tables.write(pd.DataFrame(trainer.rows), args.log_table, tables.PRETRAIN_LOG)


if __name__ == "__main__":
    stage.run(main)
