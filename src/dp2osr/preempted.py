"""Jobs that SLURM preempts for good: Snakemake's executor plugin would wait for ever for what has ended.

Its version 2.8 takes the state PREEMPTED for that of a job which SLURM itself will start again, whatever its settings.
That holds for jobs that SLURM may requeue; the profile's may not (`slurm-no-requeue`), and are submitted again.
"""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from snakemake.workflow import Workflow

PLUGIN = "snakemake_executor_plugin_slurm"
States = dict[str, str]


def count_as_cancelled(workflow: "Workflow") -> None:
    """Let the plugin count preempted jobs as cancelled, where SLURM must not requeue; nothing without the plugin."""
    plugin = sys.modules.get(PLUGIN)
    ask = getattr(plugin, "query_job_status", None)
    if ask is None:
        return

    async def query_job_status(command: str, logger: Any) -> tuple[States | None, float | None]:
        states, seconds = await ask(command, logger)
        final = getattr(workflow.executor_settings, "no_requeue", False)
        return (without_preempted(states) if states and final else states), seconds

    plugin.query_job_status = query_job_status  # type: ignore[union-attr]


def without_preempted(states: States) -> States:
    """Return states by job, as squeue names them, with CANCELLED in place of PREEMPTED."""
    return {job: "CANCELLED" if state == "PREEMPTED" else state for job, state in states.items()}
