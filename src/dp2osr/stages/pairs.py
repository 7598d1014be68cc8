"""pairs: rewards -> chosen and rejected candidates of each image, with gaps and HPO weights."""

from collections.abc import Sequence
from pathlib import Path

from dp2osr import stage, tables
from dp2osr.config import PairSettings
from dp2osr.preference.columns import read_columns
from dp2osr.preference.pairs import select_pairs
from dp2osr.strict import Strict


class PairsJob(Strict):
    """How pairs are selected; the seed serves random selection and subsets alone."""

    pairs: PairSettings
    seed: int


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    parser = stage.parser(__doc__)
    stage.config_arg(parser, PairsJob)
    parser.add_argument("--rewards", type=Path, required=True, help="rewards table")
    parser.add_argument("--pairs", type=Path, required=True, help="pairs table to write")
    args = stage.parse_args(parser, argv)
    job: PairsJob = args.config
    rewards = read_columns(args.rewards, ["group_id", "rollout", "reward"]).to_pandas()
    pairs = select_pairs(rewards, job.pairs, seed=job.seed)
    tables.write(pairs, args.pairs, tables.PAIRS, sort=False)


if __name__ == "__main__":
    stage.run(main)
