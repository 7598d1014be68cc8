"""Prompts of one shard: the prompt table of every LR image in it."""

from collections.abc import Sequence
from pathlib import Path

from dp2osr import prompts, stage, tables
from dp2osr.config import PromptSettings


def main(argv: Sequence[str] | None = None) -> None:
    """Read images.parquet, write the prompts of one shard."""
    parser = stage.parser(__doc__)
    parser.add_argument("--images", type=Path, required=True, help="images.parquet")
    parser.add_argument("--shard", type=int, required=True, help="number of the shard")
    parser.add_argument("--prompts", type=Path, required=True, help="output: prompts of the shard")
    stage.config_arg(parser, PromptSettings)
    args = stage.parse_args(parser, argv)
    images = tables.read(args.images, tables.IMAGES)
    used = images[(images["status"] == "ok") & (images["shard"] == args.shard)]
    tables.write(prompts.assign(used, args.config), args.prompts, tables.PROMPTS)


if __name__ == "__main__":
    stage.run(main)
