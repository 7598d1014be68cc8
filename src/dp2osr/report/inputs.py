"""What a report is made of, read from the run's tables and shards."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from dp2osr import tables
from dp2osr.config import EvaluateSettings, ReportSettings, RewardSettings, RunSettings
from dp2osr.config_datasets import without_fr
from dp2osr.errors import UserError
from dp2osr.preference.reward import apply_scale
from dp2osr.report import families, sheets
from dp2osr.strict import Strict


class ReportJob(Strict):
    """Settings of one run's report; `name` is the run's, `reward` judges it, and it was tuned on `tuned_on`.

    without_hr: test sets that have no HR images.
    """

    name: str
    run: RunSettings
    reward: RewardSettings
    tuned_on: RewardSettings
    evaluate: EvaluateSettings
    report: ReportSettings
    without_hr: tuple[str, ...] = ()

    def reward_on(self, dataset: str) -> RewardSettings:
        """Return the reward as it is on a test set."""
        return without_fr(self.reward) if dataset in self.without_hr else self.reward


@dataclass(frozen=True)
class TestSet:
    """One test data set: its evaluation, the rewards of both on the reference's scale, and the images shown.

    evaluation: rows of tables.EVALUATION, in_reward by the reward that the run was tuned on.
    reference, policy: group_id, rollout, reward.
    """

    __test__ = False  # no test case, whatever pytest makes of the name

    name: str
    evaluation: pd.DataFrame
    reference: pd.DataFrame
    policy: pd.DataFrame
    blocks: list[sheets.Block]


@dataclass(frozen=True)
class Material:
    """Everything that a run's page shows."""

    job: ReportJob
    tests: list[TestSet]
    pairs: pd.DataFrame
    log: pd.DataFrame
    validation: pd.DataFrame
    images: Mapping[str, pd.DataFrame]
    timings: pd.DataFrame
    software: Mapping[str, str]


@dataclass(frozen=True)
class TestPaths:
    """The files of one test data set."""

    __test__ = False

    name: str
    evaluation: Path
    rewards_reference: Path
    rewards_policy: Path
    scales: Path
    images: Path
    lr: Sequence[Path]
    candidates_reference: Sequence[Path]
    candidates_policy: Sequence[Path]


def named_path(text: str) -> tuple[str, Path]:
    """Parse `NAME=PATH` of a command line."""
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"found {text!r}, wanted NAME=PATH")
    return name, Path(path)


def on_scale(path: Path, scales: pd.DataFrame, settings: RewardSettings) -> pd.DataFrame:
    """Read a rewards table and return group_id, rollout, reward on the reference's per-image scale."""
    wide = tables.read_rewards(path)
    return apply_scale(wide, scales, settings)[["group_id", "rollout", "reward"]]


def read_test(paths: TestPaths, job: ReportJob) -> TestSet:
    """Read one test data set and the few images that its contact sheet shows."""
    scales = tables.read(paths.scales, tables.SCALES)
    reward = job.reward_on(paths.name)
    reference = on_scale(paths.rewards_reference, scales, reward)
    policy = on_scale(paths.rewards_policy, scales, reward)
    images = tables.read(paths.images, tables.IMAGES).set_index("image_id")
    groups = sheets.choose_groups(
        reference, policy, dict(zip(images.index, images["photo_id"], strict=True)), job.report.num_groups
    )
    picks = {
        group: sheets.pick(reference[reference["group_id"] == group], policy[policy["group_id"] == group])
        for group in groups
    }
    wanted = {
        side: {
            (group, found.rollout) for group in groups for row in picks[group] for found in row if found.side == side
        }
        for side in ("reference", "policy")
    }
    samples = sheets.read_samples(paths.lr, groups)
    from_reference = sheets.read_candidates(paths.candidates_reference, wanted["reference"])
    from_policy = sheets.read_candidates(paths.candidates_policy, wanted["policy"])
    blocks = [
        sheets.block(
            group,
            str(images.loc[group, "source"]),
            picks[group],
            sample=samples[group],
            reference=from_reference,
            policy=from_policy,
        )
        for group in groups
        if group in samples
    ]
    evaluation = families.mark_trained(tables.read(paths.evaluation, tables.EVALUATION), job.tuned_on)
    return TestSet(paths.name, evaluation, reference, policy, blocks)


def sort_paths(args: argparse.Namespace) -> list[TestPaths]:
    """Sort the NAME=PATH options of the command line by test data set, in the order of `--evaluation`."""
    single = ("evaluation", "rewards_reference", "rewards_policy", "scales", "images")
    several = ("lr", "candidates_reference", "candidates_policy")
    found = []
    for name, _ in args.evaluation:
        files = {option: [path for at, path in getattr(args, option) if at == name] for option in single + several}
        for option in single:
            if len(files[option]) != 1:
                flag = option.replace("_", "-")
                raise UserError(f"--{flag}: found {len(files[option])} files for data set '{name}', wanted one")
        found.append(
            TestPaths(
                name=name,
                evaluation=files["evaluation"][0],
                rewards_reference=files["rewards_reference"][0],
                rewards_policy=files["rewards_policy"][0],
                scales=files["scales"][0],
                images=files["images"][0],
                lr=files["lr"],
                candidates_reference=files["candidates_reference"],
                candidates_policy=files["candidates_policy"],
            )
        )
    return found
