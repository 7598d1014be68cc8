"""After a finished run: a change of the config reruns the stage that it is about and what follows, nothing else."""

from typing import Any

import pytest

from workflow_rig import Job, Workflow, pick, rules

LATER = {"rollout", "score", "reward", "evaluate", "report"}  # of the tuned policy, once it is trained anew


@pytest.fixture
def plan(smallest: Workflow) -> Any:
    """Return the jobs that Snakemake would run after a change of the smallest workflow's config."""

    def jobs(**changes: Any) -> list[Job]:
        return smallest.plan(changes=changes)

    return jobs


def test_nothing_to_do(plan: Any) -> None:
    assert plan() == []


def test_top_reruns_pairs_and_later(plan: Any) -> None:
    jobs = plan(run_defaults={"pairs": {"top": 2}})
    assert rules(jobs) == {"select_pairs", "encode", "train", *LATER}
    assert of_tuned_policy(jobs)


def test_beta_reruns_training_and_later(plan: Any) -> None:
    jobs = plan(run_defaults={"train": {"beta": 1000.0}})
    assert rules(jobs) == {"train", *LATER}
    assert of_tuned_policy(jobs)


def test_new_metric_group_scores_what_there_is(plan: Any) -> None:
    jobs = plan(iqa={"groups": {"extra": ["ssim"]}})
    assert rules(jobs) == {"select_pairs", "encode", "train", *LATER}
    assert of_tuned_policy([job for job in jobs if job[0] == "rollout"])
    scored = pick(jobs, "score")
    given = sorted((job["dataset"], job["policy"], job["metrics"]) for job in scored if job["policy"] != "default")
    assert given == [("holdout", "base", "extra"), ("holdout", "bicubic", "extra"), ("train", "base", "extra")]
    assert {job["metrics"] for job in scored if job["policy"] == "default"} == {"extra", "light"}


def test_more_rollouts_are_new_blocks_only(plan: Any) -> None:
    jobs = plan(rewards={"default": {"num_rollouts": 8}})
    assert rules(jobs) == {"select_pairs", "encode", "train", *LATER}
    for rule in ("rollout", "score"):
        given = [job for job in pick(jobs, rule) if job["policy"] != "default"]
        assert sorted(job["dataset"] for job in given) == ["holdout", "train"]
        assert {job["block"] for job in given} == {"001"} and {job["policy"] for job in given} == {"base"}
        assert sorted(job["block"] for job in pick(jobs, rule, policy="default")) == ["000", "001"]


def test_report_setting_reruns_the_report(plan: Any) -> None:
    assert rules(plan(report={"zoom": 3})) == {"report"}


def test_how_jobs_are_run_reruns_nothing(plan: Any) -> None:
    limits = {"train": 9.0, "train_gpus": 4, "train_nodes": 2}
    assert plan(device="auto", rollout={"batch_size": 3}, iqa={"batch_size": 5}, limits=limits) == []


def of_tuned_policy(jobs: list[Job]) -> bool:
    """Say whether all rollouts and scores among the jobs are those of the run's own policy."""
    return all(job["policy"] == "default" for rule in ("rollout", "score") for job in pick(jobs, rule))
