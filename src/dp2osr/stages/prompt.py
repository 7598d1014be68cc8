"""Prompts of one shard: the prompt table of every LR image in it."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from dp2osr import prompts, stage, tables
from dp2osr.errors import UserError

if TYPE_CHECKING:
    import torch


def read_lr(path: Path) -> Iterator[tuple[str, "torch.Tensor"]]:
    """Yield group id and LR image (3, H, W) float32 RGB in [0, 1] of each sample of a shard."""
    from dp2osr.shards import decode_image, read_shard

    for group, fields in read_shard(path):
        yield group, decode_image(fields["lr.png"])


def described(images: pd.DataFrame, args: argparse.Namespace) -> pd.DataFrame:
    """Return the prompts that a model makes of the LR images of a shard."""
    if args.lr is None:
        raise UserError(f"--lr: missing; prompts of source '{args.config.source}' are made from the LR images")
    if images.empty:  # more shards than images: no model is loaded for none
        return pd.DataFrame({name: pd.Series(dtype=str) for name in tables.PROMPTS.names})
    return prompts.describe(images, read_lr(args.lr), prompts.load_describer(args.config, stage.device(args.device)))


def main(argv: Sequence[str] | None = None) -> None:
    """Read images.parquet, and the LR images where prompts come from them; write the prompts of one shard."""
    parser = stage.parser(__doc__)
    parser.add_argument("--images", type=Path, required=True, help="images.parquet")
    parser.add_argument("--shard", type=int, required=True, help="number of the shard")
    parser.add_argument("--lr", type=Path, help="shard of LR images, for sources tags and caption")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="for the same")
    parser.add_argument("--prompts", type=Path, required=True, help="output: prompts of the shard")
    stage.config_arg(parser, prompts.PromptJob)
    args = stage.parse_args(parser, argv)
    images = tables.read(args.images, tables.IMAGES)
    used = images[(images["status"] == "ok") & (images["shard"] == args.shard)]
    from_images = args.config.source in ("tags", "caption")
    found = described(used, args) if from_images else prompts.assign(used, args.config)
    tables.write(found, args.prompts, tables.PROMPTS)


if __name__ == "__main__":
    stage.run(main)
