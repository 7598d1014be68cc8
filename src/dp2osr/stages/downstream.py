"""Predictions on HR, LR, the reference's and the policy's restorations -> the figures of a downstream benchmark.

The table is written as parquet, and as CSV beside it.
"""

import argparse
import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dp2osr import resume, stage, tables
from dp2osr.config_downstream import SOURCES
from dp2osr.errors import UserError
from dp2osr.strict import Count, Strict

if TYPE_CHECKING:
    import pandas as pd

LOG = logging.getLogger("downstream")


class DownstreamJob(Strict):
    """The kind of benchmark, the bootstrap, and which of the sources is the reference."""

    kind: str
    reference: str
    bootstrap: Count
    confidence: float
    seed: int


def read(named: Sequence[tuple[str, Path]], reference: str) -> "dict[str, pd.DataFrame]":
    """Read the shards of each source's predictions."""
    paths = defaultdict(list)
    for name, path in named:
        paths[name].append(path)
    if lacking := {*SOURCES, reference} - set(paths):
        raise UserError(f"--predictions: no '{sorted(lacking)[0]}', found {', '.join(paths)}")
    return {name: tables.read_many(each, tables.PREDICTIONS) for name, each in paths.items()}


def log_figures(table: "pd.DataFrame") -> None:
    """Log each figure in a line."""
    for row in table.to_dict("records"):
        LOG.info("{source}: {statistic} {value:.4f}, difference {difference:+.4f}".format_map(row))


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: tables of predictions in, the table of figures out."""
    args = parse_args(argv)
    from dp2osr.downstream import summary

    job: DownstreamJob = args.config
    bootstrap = summary.Bootstrap(job.bootstrap, job.confidence, job.seed)
    options = {"kind": job.kind, "annotations": args.annotations, "reference": job.reference}
    table = summary.summarise(read(args.predictions, job.reference), bootstrap=bootstrap, **options)
    log_figures(table)
    csv = table.sort_values(tables.keys(tables.DOWNSTREAM))[tables.DOWNSTREAM.names].to_csv(index=False)
    resume.write_bytes(args.table.with_suffix(".csv"), csv.encode())
    tables.write(table, args.table, tables.DOWNSTREAM)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    from dp2osr.report.inputs import named_path

    parser = stage.parser(__doc__)
    parser.add_argument(
        "--predictions", type=named_path, nargs="+", required=True, metavar="SOURCE=PATH", help="tables, by source"
    )
    parser.add_argument("--annotations", type=Path, required=True, help="the benchmark's JSON, or folder")
    parser.add_argument("--table", type=Path, required=True, help="table to write (parquet); a CSV lies beside it")
    stage.config_arg(parser, DownstreamJob)
    return stage.parse_args(parser, argv)


if __name__ == "__main__":
    stage.run(main)
