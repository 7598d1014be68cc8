"""Data files of the group explorer for one shard: scores and small pictures of every candidate."""

from collections.abc import Sequence
from pathlib import Path

from dp2osr import stage
from dp2osr.config import ExplorerSettings


def main(argv: Sequence[str] | None = None) -> None:
    """Write the folder of a shard at once."""
    parser = stage.parser(__doc__)
    stage.config_arg(parser, ExplorerSettings)
    parser.add_argument("--rewards", type=Path, required=True, help="rewards table")
    parser.add_argument("--images", type=Path, required=True, help="images table of the data set")
    parser.add_argument("--lr", type=Path, required=True, help="LR shard")
    parser.add_argument("--candidates", type=Path, nargs="+", required=True, help="candidate shards, one a block")
    parser.add_argument("--folder", type=Path, required=True, help="folder to write, named shard-NNNN")
    args = stage.parse_args(parser, argv)
    from dp2osr.report import explorer
    from dp2osr.training.checkpoint import atomic_folder

    groups = explorer.read_groups(args.rewards, args.images, args.lr, args.candidates, args.config)
    shard = args.folder.name.removeprefix("shard-")
    with atomic_folder(args.folder) as temporary:
        for name, data in explorer.shard_files(groups, shard, args.config):
            (temporary / name).write_bytes(data)


if __name__ == "__main__":
    stage.run(main)
