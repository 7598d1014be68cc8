"""SIGTERM, by which a cluster announces that it will kill a job: what is in hand is finished and kept first.

SLURM tells the processes that it started itself, and under Snakemake the stage is none of them: Snakemake hears of it,
and waits for its job. `forward` makes Snakemake tell the stage. A process may so be told twice. Where the job starts a
step with srun (a training on several nodes), SLURM itself tells the step, and srun must not be told: it kills the step.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

TERMINATED = 128 + signal.SIGTERM  # exit code of a process that SIGTERM ended


class StopRequest:
    """Whether SIGTERM came. Outside of `in_hand` it ends the process at once: whatever is written there is atomic."""

    def __init__(self) -> None:
        self.requested = False
        self._in_hand = 0

    def listen(self) -> None:
        """Take SIGTERM over, from now on."""
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._in_hand:
            os.write(2, b"SIGTERM: stopped; the same command goes on from what was kept\n")
            raise SystemExit(TERMINATED)
        if not self.requested:
            os.write(2, b"SIGTERM: stopping as soon as what is in hand is kept\n")
        self.requested = True

    @contextlib.contextmanager
    def in_hand(self) -> Iterator[None]:
        """Work within which SIGTERM only sets `requested`: whoever does it asks, and stops where nothing is lost."""
        self._in_hand += 1
        try:
            yield
        finally:
            self._in_hand -= 1


STOP = StopRequest()  # of this process


def forward() -> None:
    """Let this process, Snakemake inside a cluster job, send each SIGTERM on to all that it started.

    Snakemake sets its own handler later, which lets the running job finish. A wakeup file descriptor hears the signal
    beside any handler.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_forward, args=(reader,), daemon=True, name="forward SIGTERM").start()


def _forward(reader: int) -> None:
    import psutil  # Snakemake brings it; stages do without

    def srun(process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return process.name() == "srun"
        return False

    while numbers := os.read(reader, 64):
        started = psutil.Process().children(recursive=True)
        if signal.SIGTERM in numbers and not any(srun(process) for process in started):
            for process in started:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.terminate()
