"""Fit NIQE's pristine model on the HR images of a data set."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dp2osr import stage
from dp2osr.config_metrics import NiqeSettings
from dp2osr.errors import UserError

if TYPE_CHECKING:
    import torch

LOG = logging.getLogger("niqe")


def hr_images(shards: Iterable[Path]) -> Iterator["torch.Tensor"]:
    """Yield the HR images (3, H, W) float32 RGB in [0, 1] of LR shards, in the order of shard and key."""
    from dp2osr.shards import decode_image, read_shard

    for shard in shards:
        for key, fields in read_shard(shard):
            if "hr.png" not in fields:
                raise UserError(f"shard {shard}: {key} has no hr.png; NIQE is fitted on HR images")
            yield decode_image(fields["hr.png"])


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: LR shards in, niqe.mat out."""
    parser = stage.parser(__doc__)
    parser.add_argument("--lr", type=Path, nargs="+", required=True, help="LR shards of the data set (tar)")
    parser.add_argument("--niqe", type=Path, required=True, help="model to write (.mat)")
    stage.config_arg(parser, NiqeSettings)
    args = stage.parse_args(parser, argv)
    from dp2osr.iqa import niqe

    settings = args.config
    images = hr_images(stage.progress(args.lr, len(args.lr), "shards", LOG))
    mean, covariance = niqe.fit(images, block_size=settings.block_size, sharpness=settings.sharpness)
    niqe.save(args.niqe, mean, covariance, block_size=settings.block_size)


if __name__ == "__main__":
    stage.run(main)
