"""Snakemake that asks SLURM every second what its jobs do; the plugin's own intervals grow from 20 s to 180 s.

For a private SLURM alone: that of a cluster has other work.
"""

import asyncio
import sys

from snakemake.cli import main
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor


async def _sleep(self: RemoteExecutor) -> None:
    await asyncio.sleep(1.0)


if __name__ == "__main__":
    RemoteExecutor.sleep = _sleep
    sys.exit(main())
