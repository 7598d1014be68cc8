"""Write the page that compares runs, and its table as CSV."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dp2osr import stage, tables
from dp2osr.errors import UserError
from dp2osr.resume import write_bytes


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; `--evaluation` takes RUN/DATASET=PATH."""
    from dp2osr.report.comparison import CompareJob
    from dp2osr.report.inputs import named_path

    parser = stage.parser(__doc__)
    stage.config_arg(parser, CompareJob)
    for name, form in (("evaluation", "RUN/DATASET=PATH"), ("train-log", "RUN=PATH"), ("validation", "RUN=PATH")):
        parser.add_argument(f"--{name}", type=named_path, nargs="+", action="extend", required=True, metavar=form)
    parser.add_argument(
        "--report", type=Path, required=True, metavar="HTML", help="the page; compare.csv lies beside it"
    )
    return stage.parse_args(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the runs' tables, render the page, and write it last."""
    args = parse_args(argv)
    from dp2osr.report import comparison

    evaluations = {}
    for name, path in args.evaluation:
        run, _, dataset = name.partition("/")
        evaluations[run, dataset] = tables.read(path, tables.EVALUATION)
    logs = {run: tables.read(path, tables.TRAIN_LOG) for run, path in args.train_log}
    validations = {run: tables.read(path, tables.VALIDATION) for run, path in args.validation}
    if lacking := {run for run, _ in evaluations} - (set(logs) & set(validations) & set(args.config.runs)):
        raise UserError(f"run '{sorted(lacking)[0]}': wanted its --train-log, its --validation and its settings")
    table = comparison.compare_table(args.config, evaluations, logs, validations)
    html, files = comparison.compare_page(args.config, table, evaluations)
    for file, data in files.items():
        write_bytes(args.report.parent / file, data)
    write_bytes(args.report, html.encode())


if __name__ == "__main__":
    stage.run(main)
