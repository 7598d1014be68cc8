"""Pretrain a tiny model with a control branch from HR images, in the style of SD or FLUX.

Writes a model folder in diffusers' layout (vae, unet or transformer, controlnet, text encoders …) and a log.
With `backbone` set, that model stays frozen and only a control branch is trained on it.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
from pydantic import model_validator

from dp2osr import images, remote, resume, stage, tables, versions
from dp2osr.config import DatasetSettings, PolicySettings, PretrainSettings
from dp2osr.strict import Strict

log = logging.getLogger(__name__)


class PretrainJob(Strict):
    """Settings of the job."""

    pretrain: PretrainSettings
    policy: PolicySettings
    dataset: DatasetSettings
    seed: int

    @model_validator(mode="after")
    def _check(self) -> Self:
        size, scale = self.dataset.hr_size, self.dataset.degradation.scale
        for name in ("vae", "denoiser", "finetune"):
            crop = getattr(self.pretrain, name).crop
            if crop > size:
                raise ValueError(f"pretrain.{name}.crop={crop}, wanted at most the dataset's hr_size={size}")
        if 8 % scale:
            raise ValueError(f"dataset.degradation.scale={scale}, wanted 1, 2, 4 or 8 (crops lie on multiples of 8)")
        return self


def job_mark(job: PretrainJob, table: Path) -> str:
    """Return the fingerprint of all that determines the weights: settings, images.parquet, given networks."""
    from dp2osr.models.backend import resolve

    given = {"policy": {"model", "control"}, "pretrain": {"output", "checkpoint_every"}}
    settings = job.model_dump_json(exclude=given)
    taken = [resolve(path) for path in (job.pretrain.backbone, job.pretrain.autoencoder) if path]
    return resume.fingerprint(settings, str(versions.PRETRAIN), table, *taken)


def read_sources(table: pd.DataFrame, *, max_pixels: int, copies: Path) -> list[tuple[np.ndarray, bool]]:
    """Return each used file of images.parquet as (H, W, 3) uint8, and whether it is a photograph.

    copies: the folder with the copies of sources that are addresses (remote.py).
    """
    used = table[table.status == "ok"].drop_duplicates("source").sort_values("source")
    found = []
    with images.Sources(copies) as sources:
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
    from dp2osr.training.checkpoint import atomic_folder

    table, copies = tables.read(args.images, tables.IMAGES), args.images.with_name(remote.FOLDER)
    sources = read_sources(table, max_pixels=job.dataset.max_pixels, copies=copies)
    pairs = pool.draw(sources, job.dataset, job.pretrain, seed=job.seed)
    device = stage.device(args.device)
    checkpoints = args.checkpoints / job_mark(job, args.images)
    trainer = pretrain.Trainer(job.pretrain, job.policy, pairs, checkpoints, seed=job.seed, device=device)
    trainer.run()
    with atomic_folder(args.model) as folder:
        trainer.save(folder)
    tables.write(pd.DataFrame(trainer.rows), args.log_table, tables.PRETRAIN_LOG)


if __name__ == "__main__":
    stage.run(main)
