"""The executor plugin for SLURM waits for a preempted job for ever, unless it is told that it has ended."""

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import snakemake_executor_plugin_slurm as plugin

from dp2osr import preempted

STATES = {"7": "PREEMPTED", "8": "RUNNING"}


@pytest.fixture
def workflow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Yield what stands for Snakemake's workflow; the plugin is its own again afterwards."""

    async def query_job_status(command: str, logger: Any) -> tuple[dict[str, str], float]:
        return dict(STATES), 0.1

    monkeypatch.setattr(plugin, "query_job_status", query_job_status)
    monkeypatch.setattr(plugin, "get_min_job_age", lambda: 300)
    monkeypatch.setattr(plugin, "is_query_tool_available", lambda name: name == "squeue")
    settings = {"no_requeue": True, "requeue": False, "status_command": "squeue", "status_attempts": 1}
    yield SimpleNamespace(executor_settings=SimpleNamespace(**settings, init_seconds_before_status_checks=20))


def ask(workflow: Any) -> tuple[list[str], list[str]]:
    """Ask the plugin twice for the jobs of STATES; return those that it reports as failed, and those it waits for."""
    failed: list[str] = []
    executor = object.__new__(plugin.Executor)  # without its threads
    executor.workflow, executor.logger, executor.run_uuid = workflow, logging.getLogger("plugin"), "run"
    executor.status_rate_limiter = contextlib.nullcontext()
    executor._preemption_warning, executor._status_query_cycle_rows = False, []
    executor.next_seconds_between_status_checks = 20
    for name in ("calls", "failures", "total_seconds", "min_seconds", "max_seconds"):
        setattr(executor, f"_status_query_{name}", 0)
    executor.report_job_error = lambda job, **told: failed.append(job.external_jobid)

    async def waiting(jobs: list[Any]) -> list[Any]:
        return [job async for job in executor.check_active_jobs(jobs)]

    jobs = [SimpleNamespace(external_jobid=number, aux={}) for number in STATES]
    for _ in range(2):
        jobs = asyncio.run(waiting(jobs))
    return failed, [job.external_jobid for job in jobs]


def test_the_plugin_itself_waits_for_ever(workflow: Any) -> None:
    """Where this fails, a newer plugin may do without dp2osr.preempted."""
    assert ask(workflow) == ([], ["7", "8"])


def test_a_preempted_job_has_ended(workflow: Any) -> None:
    preempted.count_as_cancelled(workflow)
    assert ask(workflow) == (["7"], ["8"])


def test_what_slurm_requeues_is_waited_for(workflow: Any) -> None:
    preempted.count_as_cancelled(workflow)
    workflow.executor_settings.no_requeue = False
    assert ask(workflow) == ([], ["7", "8"])


def test_nothing_happens_without_the_plugin(workflow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = plugin.query_job_status
    monkeypatch.delitem(preempted.sys.modules, preempted.PLUGIN)
    preempted.count_as_cancelled(workflow)
    assert plugin.query_job_status is before
