"""Say in plain sentences what a run's evaluation found, under the config files that the workflow was given."""

import argparse
import logging
import sys
from pathlib import Path

from dp2osr import config, tables
from dp2osr.report.text import verdict


def main() -> None:
    """Print the sentences of each test set of a run; of Snakemake's arguments only --configfile counts."""
    logging.basicConfig(level=logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--configfile", "--configfiles", nargs="+", default=[], metavar="FILE")
    args, _ = parser.parse_known_args()
    settings = config.read("config/config.yaml", *args.configfile)
    run = settings.runs[args.run]
    for dataset in run.tests:
        path = Path(settings.results) / "runs" / args.run / "evaluation" / f"{dataset}.parquet"
        evaluation = tables.read(path, tables.EVALUATION)
        confidence = settings.evaluate.confidence
        said = verdict(evaluation, dataset=dataset, policy=args.run, reference=run.reference, confidence=confidence)
        sys.stdout.write("".join(f"  {sentence}\n" for sentence in said))


if __name__ == "__main__":
    main()
