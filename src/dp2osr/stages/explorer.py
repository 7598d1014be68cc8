"""The page of the group explorer, over the data files of all shards."""

from collections.abc import Sequence
from pathlib import Path

from dp2osr import stage, tables
from dp2osr.resume import write_bytes


def main(argv: Sequence[str] | None = None) -> None:
    """Write the index and the page."""
    from dp2osr.report import explorer
    from dp2osr.report.inputs import named_path

    parser = stage.parser(__doc__)
    stage.config_arg(parser, explorer.ExplorerJob)
    parser.add_argument("--data", type=Path, required=True, help="folder of the shards' folders, beside the page")
    parser.add_argument(
        "--pairs", type=named_path, nargs="*", default=[], metavar="RUN=PATH", help="pairs of runs on these candidates"
    )
    parser.add_argument("--page", type=Path, required=True, metavar="HTML", help="the page; index.js lies beside it")
    args = stage.parse_args(parser, argv)
    pairs = {run: tables.read(path, tables.PAIRS) for run, path in args.pairs}
    for name, data in explorer.page_files(args.config, args.data, pairs).items():
        write_bytes(args.page.parent / name, data)


if __name__ == "__main__":
    stage.run(main)
