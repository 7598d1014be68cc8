"""A private SLURM on the loopback: munge, slurmctld, two nodes with stand-in GPUs, all of them our own child processes.

Nothing of a SLURM that the machine may have is touched: own configuration, own key, own socket, free ports.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

PROGRAMS = ("slurmctld", "slurmd", "squeue", "munged")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
NODES = ("sim1", "sim2")
GPUS, CPUS, MEM_MB = 2, 4, 64000  # that each node claims to have
SEARCH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"

CONF = """\
ClusterName=sim
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
GresTypes=gpu
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MinJobAge=3600
ReturnToService=2
SlurmdTimeout=300
KillWait=5
JobRequeue=0
DefMemPerCPU=500
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=60 State=UP PreemptMode=CANCEL GraceTime=60
PartitionName=harsh Nodes=ALL MaxTime=INFINITE DefaultTime=60 State=UP PreemptMode=CANCEL GraceTime=0
PartitionName=again Nodes=ALL MaxTime=INFINITE DefaultTime=60 State=UP PreemptMode=REQUEUE GraceTime=0
PartitionName=urgent Nodes=ALL MaxTime=INFINITE DefaultTime=60 State=UP PriorityTier=9 PreemptMode=OFF
"""

# The plugin takes every SLURM_* variable from its inner srun, the one that names this SLURM's configuration, too.
SRUN = """\
#!/bin/sh
SLURM_CONF={root}/slurm.conf exec {srun} "$@"
"""

# There is no accounting, but while slurmctld is away the plugin asks sacct, and forgets its jobs where that fails at
# once: this one waits for slurmctld and answers from its memory.
SACCT = """\
#!/bin/sh
name= job= nodes=
while [ $# -gt 0 ]; do case $1 in
  --name) name=$2; shift;; -j) job=$2; shift;; nodelist*) nodes=1;;
esac; shift; done
[ -z "$nodes" ] || exec squeue --noheader --states=all -j "$job" -o %N
[ -n "$name" ] || exit 0
for _ in $(seq 30); do
  squeue --noheader --states=all --format='%i|%T' --name "$name" && exit 0
  sleep 1
done
exit 1
"""


def install() -> str:
    """Install what is missing, from the system's own packages; return why this cannot be, or nothing."""
    if os.geteuid() != 0:
        return "SLURM's daemons are started as root, this is another user"
    if all(shutil.which(program, path=SEARCH) for program in PROGRAMS):
        return ""
    if not shutil.which("apt-get"):
        return f"{', '.join(PROGRAMS)} are not all there, nor apt-get to install them"
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        try:
            subprocess.run(
                ["apt-get", "-qq", *command], env=environment, check=True, timeout=300, capture_output=True, text=True
            )
        except (subprocess.SubprocessError, OSError) as error:
            return f"apt-get {command[0]}: {error} {(getattr(error, 'stderr', '') or '')[-300:]}"
    return ""


def wait_for(condition: Callable[[], object], what: str, timeout: float) -> None:
    """Ask ten times a second until the condition holds."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {timeout:.0f} s: {what}")
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Return port numbers that nobody listens to."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@dataclass
class Slurm:
    """The daemons, by name, and how to ask them."""

    root: Path
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """What a client of this SLURM has in its environment."""
        found = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        return found | {"SLURM_CONF": str(self.root / "slurm.conf"), "PATH": f"{self.root}/bin:{SEARCH}"}

    def client(self, *command: str, timeout: float = 30) -> str:
        """Run a client program and return what it prints."""
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout, check=True
        ).stdout

    def configure(self) -> None:
        """Write all files."""
        ports = free_ports(1 + len(NODES))
        host = socket.gethostname().partition(".")[0]
        for folder in ("state", "bin", *(f"spool/{node}" for node in NODES)):
            (self.root / folder).mkdir(parents=True)
        lines = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} RealMemory={MEM_MB}"
            f" Gres=gpu:{GPUS}"
            for node, port in zip(NODES, ports[1:], strict=True)
        ]
        for number in range(GPUS):
            (self.root / f"gpu{number}").symlink_to("/dev/null")
        devices = [f"NodeName={node} Name=gpu File={self.root}/gpu[0-{GPUS - 1}]\n" for node in NODES]
        (self.root / "gres.conf").write_text("".join(devices))
        (self.root / "slurm.conf").write_text(
            CONF.format(root=self.root, host=host, ports=ports, nodes="\n".join(lines))
        )
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        srun = shutil.which("srun", path=SEARCH)
        for name, text in (("srun", SRUN.format(root=self.root, srun=srun)), ("sacct", SACCT)):
            (self.root / "bin" / name).write_text(text)
            (self.root / "bin" / name).chmod(0o755)

    def start(self, *names: str) -> None:
        """Start some daemons, and wait until every node is ready."""
        commands = {
            "munged": f"munged --foreground --force --socket={self.root}/munge.sock --key-file={self.root}/munge.key"
            f" --pid-file={self.root}/munged.pid --log-file={self.root}/munged.log --seed-file={self.root}/munge.seed",
            "slurmctld": "slurmctld -D",
        } | {node: f"slurmd -D -N {node}" for node in NODES}
        for name in names:
            with (self.root / f"{name}.out").open("ab") as out:
                command = ["setpriv", "--pdeathsig", "TERM", *commands[name].split()]  # ends with the tests, however
                self.daemons[name] = subprocess.Popen(command, env=self.environment, stdout=out, stderr=out)
            if name == "munged":
                wait_for((self.root / "munge.sock").exists, "munged's socket", 20)
        wait_for(self._ready, f"nodes ready; see {self.root}/*.log", 40)

    def _ready(self) -> bool:
        with contextlib.suppress(subprocess.SubprocessError):
            states = self.client("sinfo", "-h", "-p", "gpu", "-N", "-o", "%T", timeout=10).split()
            return len(states) == len(NODES) and set(states) <= {"idle", "mixed", "allocated", "completing"}
        return False

    def kill(self, name: str) -> None:
        """SIGKILL a daemon; the jobs of a node run on."""
        self.daemons[name].kill()
        self.daemons.pop(name).wait(timeout=20)

    def jobs(self) -> list[str]:
        """Return the numbers of the jobs that wait or run."""
        return self.client("squeue", "-h", "-o", "%A").split()

    def state(self, job: str) -> str:
        """Return the state of a job, ended ones included."""
        return self.client("squeue", "-h", "--states=all", "-j", job, "-o", "%T").strip()

    def stop(self) -> None:
        """Cancel what runs, end the daemons, and what their jobs left."""
        with contextlib.suppress(subprocess.SubprocessError, TimeoutError):
            if jobs := self.jobs():
                self.client("scancel", *jobs)
                wait_for(lambda: not self.jobs(), "jobs cancelled", 20)
        for process in reversed(self.daemons.values()):
            process.terminate()
        for process in self.daemons.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)
            process.kill()
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def processes(self) -> Iterator[psutil.Process]:
        """Yield the processes that have this SLURM in their environment: daemons, job steps, payloads."""
        mine, known = psutil.Process(), str(self.root / "slurm.conf")
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process != mine and process.environ().get("SLURM_CONF") == known:
                    yield process
