"""Where a data set's LR images come from, and what follows from it for metrics, rewards and runs."""

from typing import TYPE_CHECKING, Any, Literal

from dp2osr.errors import UserError
from dp2osr.metrics import METRICS
from dp2osr.strict import Strict

if TYPE_CHECKING:
    from dp2osr.config import Config, DatasetSettings, RewardSettings


class LrSettings(Strict):
    """`degraded`: made from HR here. `given`: files beside the HR files, paired by name. `alone`: there is no HR.

    images: the given LR files, entries as of the data set's `images`. endings: what the stem of a file's name may end
    with beside the name that both files of a pair have.
    """

    source: Literal["degraded", "given", "alone"]
    images: list[str]
    endings: list[str]


class PublishedSettings(Strict):
    """Which of our data sets and policies the published figures are of: our name -> the name there."""

    datasets: dict[str, str]
    policies: dict[str, str]


def check_dataset(dataset: "DatasetSettings") -> None:
    """Check what the keys of one data set say of each other; raises ValueError."""
    lr, scale = dataset.lr, dataset.degradation.scale
    if dataset.hr_size % scale:
        raise ValueError(f"hr_size={dataset.hr_size} is no multiple of degradation.scale={scale}")
    if (lr.source == "given") != bool(lr.images):
        wanted = "the LR files" if lr.source == "given" else f"none with lr.source '{lr.source}'"
        raise ValueError(f"lr.images: found {lr.images}, wanted {wanted}")
    if lr.source != "degraded" and dataset.downscale != 1:
        raise ValueError(f"downscale={dataset.downscale}, wanted 1: LR images that are given are taken as they are")
    if lr.source == "degraded" and dataset.crop == "full":
        raise ValueError("crop 'full' needs lr.source given or alone; degradation takes crops of one size")


def check_config(config: "Config") -> None:
    """Check that data sets without HR images, or with images of many sizes, stand only where that is possible."""
    for key, name in (("iqa.niqe.dataset", config.iqa.niqe.dataset), ("pretrain.dataset", config.pretrain.dataset)):
        _wants_hr(config, key, name)
    for run, settings in config.runs.items():
        _wants_crops(config, f"runs.{run}.dataset", settings.dataset)
        reward_on(config, settings.reward, settings.dataset)
        if settings.train.guard.every:
            guard = f"runs.{run}.train.guard.dataset"
            _wants_hr(config, guard, settings.train.guard.dataset)
            _wants_crops(config, guard, settings.train.guard.dataset)
        for test in settings.tests:
            reward_on(config, config.judge(run), test)


def _wants_hr(config: "Config", key: str, name: str) -> None:
    if without_hr(config, name):
        raise UserError(f"config: {key}: '{name}' has no HR images (lr.source alone), wanted a data set that has")


def _wants_crops(config: "Config", key: str, name: str) -> None:
    if config.datasets[name].crop == "full":
        raise UserError(f"config: {key}: '{name}' has images of any size (crop full), wanted crops of one size")


def ingest_keys(dataset: "DatasetSettings") -> dict[str, Any]:
    """Return the keys that decide a data set's images; those of its LR files where it has some."""
    found = dataset.model_dump(exclude={"degradation", "prompt", "lr"})
    if dataset.lr.source == "degraded":
        return found
    return found | {"lr": dataset.lr.model_dump(), "scale": dataset.degradation.scale}


def without_hr(config: "Config", dataset: str) -> bool:
    """Return whether a data set is LR alone, so that only no-reference metrics can judge it."""
    return config.datasets[dataset].lr.source == "alone"


def metric_groups(config: "Config", dataset: str) -> dict[str, list[str]]:
    """Return the metric groups that score a data set, those of `iqa.test_only` where a run tests on it alone.

    Without HR images, each holds its no-reference metrics.
    """
    tested = any(dataset in run.tests for run in config.runs.values())
    groups = {name: used for name, used in config.iqa.groups.items() if tested or name not in config.iqa.test_only}
    if not without_hr(config, dataset):
        return groups
    groups = {name: [each for each in used if METRICS[each].kind == "nr"] for name, used in groups.items()}
    return {name: used for name, used in groups.items() if used}


def reward_on(config: "Config", reward: str, dataset: str) -> "RewardSettings":
    """Return a reward as it is on a data set: without HR images, its no-reference part alone."""
    settings = config.rewards[reward]
    if not without_hr(config, dataset):
        return settings
    if not settings.nr:
        raise UserError(
            f"config: rewards.{reward}.nr: found none, wanted a no-reference metric: "
            f"data set '{dataset}' has no HR images (lr.source alone)"
        )
    return without_fr(settings)


def without_fr(settings: "RewardSettings") -> "RewardSettings":
    """Return the no-reference part of a reward, which then carries all the weight."""
    return settings.model_copy(update={"fr": []})
