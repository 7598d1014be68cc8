"""What a change of the config runs again after a finished run, as Snakemake's dry run lists it."""

from typing import Any

import pytest

import workflow_rig as rig

Changes = dict[str, Any]

AFTER_TRAIN = {"rollout", "score", "reward", "evaluate", "report"}  # for the run's own policy, on the test set
AFTER_PAIRS = {"encode", "train"} | AFTER_TRAIN

NOTHING: dict[str, Changes] = {
    "no change": {},
    "batch sizes": {"rollout": {"batch_size": 3}, "iqa": {"batch_size": 5}},
    "device": {"device": "auto"},
}


def of_the_policy(jobs: list[rig.Job], rule: str) -> bool:
    """Whether all jobs of `rule` are about the trained policy on the test set."""
    return rig.pick(jobs, rule) == rig.pick(jobs, rule, dataset="holdout", policy="default") != []


@pytest.mark.parametrize("change", NOTHING)
def test_nothing_runs_again(finished: rig.Workflow, change: str) -> None:
    assert finished.plan(changes=NOTHING[change]) == []


def test_another_n_selects_pairs_anew(finished: rig.Workflow) -> None:
    jobs = finished.plan(changes={"run_defaults": {"pairs": {"top": 2}}})
    assert rig.rules(jobs) == {"select_pairs"} | AFTER_PAIRS
    assert all(of_the_policy(jobs, rule) for rule in ("rollout", "score", "reward"))


def test_another_beta_trains_anew(finished: rig.Workflow) -> None:
    jobs = finished.plan(changes={"run_defaults": {"train": {"beta": 100.0}}})
    assert rig.rules(jobs) == {"train"} | AFTER_TRAIN
    assert all(of_the_policy(jobs, rule) for rule in ("rollout", "score", "reward"))


def test_a_metric_group_adds_its_scores_alone(finished: rig.Workflow) -> None:
    jobs = finished.plan(changes={"iqa": {"groups": {"more": ["ssim"]}}})
    assert rig.rules(jobs) == {"select_pairs"} | AFTER_PAIRS
    assert of_the_policy(jobs, "rollout")
    old = rig.pick(jobs, "score", metrics="light")
    assert old == rig.pick(jobs, "score", metrics="light", policy="default") != []
    new = {(each["dataset"], each["policy"]) for each in rig.pick(jobs, "score", metrics="more")}
    assert new == {("train", "base"), ("holdout", "base"), ("holdout", "bicubic"), ("holdout", "default")}


def test_a_doubled_m_adds_blocks_of_seeds(finished: rig.Workflow) -> None:
    jobs = finished.plan(changes={"rewards": {"default": {"num_rollouts": 8}}})
    assert rig.rules(jobs) == {"select_pairs"} | AFTER_PAIRS
    for rule in ("rollout", "score"):
        reference = {(each["dataset"], each["block"]) for each in rig.pick(jobs, rule, policy="base")}
        assert reference == {("train", "001"), ("holdout", "001")}
        trained = {(each["dataset"], each["block"]) for each in rig.pick(jobs, rule, policy="default")}
        assert trained == {("holdout", "000"), ("holdout", "001")}
    assert rig.pick(jobs, "score", policy="bicubic") == []


def test_a_report_key_runs_the_report_alone(finished: rig.Workflow) -> None:
    assert finished.plan(changes={"report": {"num_groups": 1}}) == [("report", "run=default")]
