"""Say in plain sentences what a run's evaluation found. Usage: python .ci/headline.py RUN"""

import logging
import sys
from pathlib import Path

from dp2osr import config, tables
from dp2osr.report.text import verdict


def main() -> None:
    """Print the sentences of each test set of the run in config/config.yaml."""
    logging.basicConfig(level=logging.WARNING)
    name = sys.argv[1]
    settings = config.read("config/config.yaml")
    run = settings.runs[name]
    for dataset in run.tests:
        path = Path(settings.results) / "runs" / name / "evaluation" / f"{dataset}.parquet"
        evaluation = tables.read(path, tables.EVALUATION)
        confidence = settings.evaluate.confidence
        said = verdict(evaluation, dataset=dataset, policy=name, reference=run.reference, confidence=confidence)
        sys.stdout.write("".join(f"  {sentence}\n" for sentence in said))


if __name__ == "__main__":
    main()
