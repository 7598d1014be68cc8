"""Write the page of one run, with its figures, tables and contact sheets beside it."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dp2osr import stage, tables
from dp2osr.resume import write_bytes


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; options with NAME=PATH are given once or more for each data set."""
    from dp2osr.report.inputs import ReportJob, named_path

    parser = stage.parser(__doc__)
    stage.config_arg(parser, ReportJob)
    for name in ("pairs", "train-log", "validation"):
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="PARQUET")
    for name, what in (
        ("evaluation", "evaluation of a test data set"),
        ("rewards-policy", "rewards of the policy on a test data set"),
        ("rewards-reference", "rewards of the reference on a test data set"),
        ("scales", "the reference's scale on a test data set"),
        ("images", "images of any data set of the run"),
        ("lr", "LR shards of a test data set"),
        ("candidates-policy", "candidate shards of the policy"),
        ("candidates-reference", "candidate shards of the reference"),
    ):
        parser.add_argument(
            f"--{name}", type=named_path, nargs="+", action="extend", default=[], metavar="NAME=PATH", help=what
        )
    parser.add_argument("--benchmarks", type=Path, nargs="*", default=[], help="benchmark files, or folders of them")
    parser.add_argument(
        "--report", type=Path, required=True, metavar="HTML", help="the page; other files lie beside it"
    )
    return stage.parse_args(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Read everything, render the page, and write it last, when all beside it stands."""
    args = parse_args(argv)
    from dp2osr.report import inputs, page, provenance

    material = inputs.Material(
        job=args.config,
        tests=[inputs.read_test(paths, args.config) for paths in inputs.sort_paths(args)],
        pairs=tables.read(args.pairs, tables.PAIRS),
        log=tables.read(args.train_log, tables.TRAIN_LOG),
        validation=tables.read(args.validation, tables.VALIDATION),
        images={name: tables.read(path, tables.IMAGES) for name, path in args.images},
        timings=provenance.timings(args.benchmarks),
        software=provenance.software() | provenance.metrics(path for _, path in args.evaluation),
    )
    html, files = page.run_page(material)
    for name, data in files.items():
        write_bytes(args.report.parent / name, data)
    write_bytes(args.report, html.encode())


if __name__ == "__main__":
    stage.run(main)
