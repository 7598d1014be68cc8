"""Where LR images come from: what the config refuses, and which metrics and rewards are left where there is no HR."""

from typing import Any

import pytest

from dp2osr import config
from dp2osr.config_datasets import ingest_keys, metric_groups, reward_on, without_hr
from dp2osr.errors import UserError
from dp2osr.plan import Facts, Planner
from dp2osr.status_jobs import planned

GIVEN = {"source": "given", "images": ["data/LR"]}
ALONE = {"source": "alone"}


def with_test(raw: dict[str, Any], lr: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Add a test set `wild` with these keys to a config."""
    raw["datasets"]["wild"] = {"images": ["data"], "lr": lr, "downscale": 1} | changes
    raw["run_defaults"]["tests"] = ["holdout", "wild"]
    return raw


@pytest.mark.parametrize(
    ("lr", "changes", "message"),
    [
        ({"source": "given"}, {}, "datasets.wild: Value error, lr.images: found [], wanted the LR files"),
        ({"source": "alone", "images": ["x"]}, {}, "lr.images: found ['x'], wanted none with lr.source 'alone'"),
        ({"images": ["x"]}, {}, "wanted none with lr.source 'degraded'"),
        (GIVEN, {"downscale": 2}, "downscale=2, wanted 1"),
        ({}, {"crop": "full"}, "crop 'full' needs lr.source given or alone"),
        ({"source": "synthetic"}, {}, "datasets.wild.lr.source: Input should be 'degraded', 'given' or 'alone'"),
        ({"sources": []}, {}, "datasets.wild.lr.sources: unknown key"),
        (GIVEN, {"hr_size": 98}, "hr_size=98 is no multiple of degradation.scale=4"),
    ],
)
def test_what_does_not_fit_is_named(
    config_dict: dict[str, Any], lr: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as found:
        config.load(with_test(config_dict, lr, **changes))
    assert message in str(found.value)


def test_places_that_need_hr_or_crops(config_dict: dict[str, Any]) -> None:
    def refused(message: str, **sections: Any) -> None:
        with pytest.raises(UserError) as found:
            config.load(raw | sections)
        assert message in str(found.value)

    raw = with_test(config_dict, ALONE, crop="full")
    config.load(raw)
    run = raw["run_defaults"]
    refused("iqa.niqe.dataset: 'wild' has no HR", iqa=raw["iqa"] | {"niqe": raw["iqa"]["niqe"] | {"dataset": "wild"}})
    refused("pretrain.dataset: 'wild' has no HR", pretrain=raw["pretrain"] | {"dataset": "wild"})
    refused("runs.default.dataset: 'wild' has images of any size", run_defaults=run | {"dataset": "wild"})
    train = run["train"] | {"guard": run["train"]["guard"] | {"dataset": "wild"}}
    refused("runs.default.train.guard.dataset: 'wild' has no HR images", run_defaults=run | {"train": train})
    rewards = {"default": raw["rewards"]["default"] | {"nr": []}}
    refused("rewards.default.nr: found none, wanted a no-reference metric: data set 'wild'", rewards=rewards)


def test_published_names_are_known(config_dict: dict[str, Any]) -> None:
    for kind, ours, there, message in (
        ("datasets", "holdout", "RealSr", "report.published.datasets.holdout: found 'RealSr', wanted one of"),
        ("datasets", "holdin", "RealSR", "report.published.datasets: found 'holdin'"),
        ("policies", "base", "C-SD3", "report.published.policies.base: found 'C-SD3'"),
        ("policies", "default", "DP2O (SD2)", ""),  # a run
    ):
        config_dict["report"]["published"] = {"datasets": {}, "policies": {}} | {kind: {ours: there}}
        if not message:
            config.load(config_dict)
            continue
        with pytest.raises(UserError) as found:
            config.load(config_dict)
        assert message in str(found.value)


def test_without_hr_only_no_reference_metrics_are_left(config_dict: dict[str, Any]) -> None:
    config_dict["iqa"]["groups"] = {"mixed": ["fsim", "gmsd", "nlpd", "niqe"], "fr": ["psnr"], "nr": ["piqe"]}
    loaded = config.load(with_test(config_dict, ALONE))
    assert without_hr(loaded, "wild") and not without_hr(loaded, "holdout")
    assert metric_groups(loaded, "wild") == {"mixed": ["niqe"], "nr": ["piqe"]}
    assert metric_groups(loaded, "holdout") == loaded.iqa.groups
    reward = reward_on(loaded, "default", "wild")
    assert (reward.fr, reward.nr) == ([], ["niqe"])
    assert reward_on(loaded, "default", "holdout") == loaded.rewards["default"]
    # the plan and the status count the same score jobs: two policies on `wild`, two groups
    rows = [
        row for row in Planner(loaded, Facts(), {}).rows() if row.stage == "score" and row.subject.startswith("wild")
    ]
    jobs = [job for job in planned(loaded).values() if job.stage == "score" and job.wildcards["dataset"] == "wild"]
    assert sum(row.jobs for row in rows) == len(jobs) == 4


def test_degraded_sets_are_ingested_by_the_same_keys_as_before(config_dict: dict[str, Any]) -> None:
    """Their jobs' parameters hold nothing of given LR images, so that no finished job runs again."""
    loaded = config.load(with_test(config_dict, GIVEN))
    assert not {"lr", "scale", "degradation", "prompt"} & set(ingest_keys(loaded.datasets["holdout"]))
    keys = ingest_keys(loaded.datasets["wild"])
    assert keys["scale"] == 4 and keys["lr"]["images"] == ["data/LR"] and "_HR" in keys["lr"]["endings"]
