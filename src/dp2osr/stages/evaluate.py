"""evaluate: rewards of policy, reference and controls -> statistics with paired intervals over photographs."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dp2osr import evaluation, stage, tables
from dp2osr.config import EvaluateSettings, RewardSettings
from dp2osr.errors import UserError
from dp2osr.strict import Name, Strict


class EvaluateJob(Strict):
    """The reward, the bootstrap, and which of the policies is the reference."""

    reward: RewardSettings
    evaluate: EvaluateSettings
    seed: int
    reference: Name


def named_path(text: str) -> tuple[str, Path]:
    """Parse NAME=PATH."""
    name, sign, path = text.partition("=")
    if not (name and sign and path):
        raise argparse.ArgumentTypeError(f"found '{text}', wanted NAME=PATH")
    return name, Path(path)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage."""
    parser = stage.parser(__doc__)
    stage.config_arg(parser, EvaluateJob)
    parser.add_argument(
        "--policy", type=named_path, nargs="+", required=True, metavar="NAME=PATH", help="rewards tables, by policy"
    )
    parser.add_argument("--scales", type=Path, required=True, help="scale table of the reference")
    parser.add_argument("--images", type=Path, required=True, help="images table of the dataset")
    parser.add_argument("--evaluation", type=Path, required=True, help="evaluation table to write")
    args = stage.parse_args(parser, argv)
    job: EvaluateJob = args.config
    if len(policies := dict(args.policy)) < len(args.policy):
        raise UserError(f"--policy: a name twice, found {', '.join(name for name, _ in args.policy)}")
    table = evaluation.evaluate(
        {name: tables.read_rewards(path) for name, path in policies.items()},
        scales=tables.read(args.scales, tables.SCALES),
        images=tables.read(args.images, tables.IMAGES),
        **{name: getattr(job, name) for name in ("reference", "reward", "seed")},
        settings=job.evaluate,
    )
    judges = tables.common_origins([*policies.values(), args.scales])  # one and the same for all policies
    tables.write(table, args.evaluation, tables.EVALUATION, origins=judges)


if __name__ == "__main__":
    stage.run(main)
