"""reward: score tables -> rewards (raw, normalised, reward, rank) and the scale of each image and metric.

Reads SCORES/{group}/shard-{shard}.block-{block}.parquet for every metric group, shard and block of the config.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from dp2osr import stage, tables
from dp2osr.config import RewardSettings
from dp2osr.preference import reward
from dp2osr.preference.columns import read_columns
from dp2osr.strict import Count, Strict

LOG = logging.getLogger("reward")


class RewardJob(Strict):
    """The definition, and which score tables there are."""

    reward: RewardSettings
    num_candidates: Count  # that the policy has an image: M, or 1 for a control without seeds
    groups: list[str]
    shards: list[str]
    blocks: list[str]


def score_paths(folder: Path, job: RewardJob) -> list[Path]:
    """Return the score tables of a job; names and not one argument a file, since a run may have thousands."""
    names = [f"shard-{shard}.block-{block}.parquet" for shard in job.shards for block in job.blocks]
    return [folder / group / name for group in job.groups for name in names]


def read_scores(paths: Iterable[Path], origins: dict[str, str]) -> Iterator[pa.Table]:
    """Yield the tables one at a time, checked, without their statuses: a score that is not finite says it too.

    `origins` gains what made each metric's numbers; tables that differ in it are an error.
    """
    for path in paths:
        columns = ["group_id", "rollout", "metric", "score"]
        table = read_columns(path, columns, schema=tables.SCORES, encoded=["group_id", "metric"])
        tables.merge_origins(origins, tables.origins(table.schema), path)
        yield table


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    parser = stage.parser(__doc__)
    stage.config_arg(parser, RewardJob)
    parser.add_argument("--scores", type=Path, required=True, help="folder of the score tables")
    parser.add_argument("--rewards", type=Path, required=True, help="rewards table to write")
    parser.add_argument("--scales", type=Path, required=True, help="scale table to write")
    args = stage.parse_args(parser, argv)
    job: RewardJob = args.config
    if not job.reward.fr:
        LOG.info("no full-reference metric in the definition: the reward is its no-reference part alone")
    paths = score_paths(args.scores, job)
    origins: dict[str, str] = {}
    scores = read_scores(stage.progress(paths, len(paths), "score tables", LOG), origins)
    cube = reward.make_cube(scores, num_rollouts=min(job.num_candidates, job.reward.num_rollouts))
    rewards, scales = reward.rewards_of(cube, job.reward)
    tables.write(scales, args.scales, tables.SCALES, sort=False, origins=origins)
    tables.write(rewards, args.rewards, tables.rewards_schema(cube.metrics), sort=False, origins=origins)


if __name__ == "__main__":
    stage.run(main)
