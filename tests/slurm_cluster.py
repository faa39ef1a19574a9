"""A SLURM cluster on this machine alone: munged, slurmctld, and a slurmd per node, on loopback.

Nodes are named by loopback addresses, which need no name server. Every process of the cluster,
jobs included, has its SLURM_CONF in the environment; so they are found, paused and ended.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from launched import processes_with, send
from ranks import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
# Jobs derive a port from their number, and another test process may have a cluster of its own.
FirstJobId={port}
AuthType=auth/munge
# A requeued job waits until its credential expires, 120 s unless told.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2
ReturnToService=2
SlurmdTimeout=10
KillWait=5
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE
"""


def why_not() -> str:
    """Say why no cluster can be started here, and what to do; nothing if one can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if missing:
        install = "apt-get install -y slurmctld slurmd slurm-client munge"
        return f"no {', '.join(missing)}; {install}"
    return "" if os.geteuid() == 0 else "slurmd starts jobs as root only; run as root"


GOING = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED")
"""States of a job that is not over."""


class Cluster:
    """A running cluster; use it as a context.

    Attributes:
        nodes: their names.
        environment: for programs that talk to it.
    """

    def __init__(self, num_nodes: int) -> None:
        # A short path: sockets lie below it, and their names are limited to 108 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.nodes = [f"127.0.0.{i + 2}" for i in range(num_nodes)]
        self.environment = os.environ | {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": PATH,
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }
        self._daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "Cluster":
        host = socket.gethostname().partition(".")[0]
        text = CONFIGURATION.format(folder=self.folder, host=host, port=free_port())
        for node in self.nodes:
            text += (
                f"NodeName={node} NodeAddr={node} NodeHostname={host} Port={free_port()} CPUs=2\n"
            )
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        names = ("socket", "pid-file", "log-file", "seed-file")
        files = [f"--{n}={self.folder}/munge.{n.removesuffix('-file')}" for n in names]
        try:
            self._start("munged", "--foreground", "--force", f"--key-file={key}", *files)
            self.wait_for(lambda: (self.folder / "munge.socket").exists(), 10)
            self._start("slurmctld", "-D")
            for node in self.nodes:
                self.start_node(node)
            self.wait_for(lambda: self.states() == ["idle"] * len(self.nodes), 30)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End every process of the cluster, jobs first, and remove its folder."""
        self.run("scancel", "--user=root")
        self.wait_for(lambda: not self.run("squeue", "--noheader"), 20, may_fail=True)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        self.wait_for(lambda: not self._end_processes(), 20)
        shutil.rmtree(self.folder)

    def _end_processes(self) -> list[psutil.Process]:
        for daemon in self._daemons.values():
            daemon.poll()
        alive = self.processes()
        for process in alive:
            send(signal.SIGKILL, process)
        return alive

    def _start(self, program: str, *arguments: str, name: str = "") -> None:
        with (self.folder / f"{name or program}.log").open("ab") as log:
            self._daemons[name or program] = subprocess.Popen(
                [program, *arguments], env=self.environment, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL, cwd=self.folder,
            )  # fmt: skip

    def start_node(self, node: str) -> None:
        """Start the daemon of a node."""
        self._start("slurmd", "-D", "-N", node, name=node)

    def kill_node(self, node: str) -> None:
        """End all that runs on a node without a word, as when it loses power."""
        tasks = self.processes(SLURMD_NODENAME=node)
        steps = {parent_of(task) for task in tasks}
        steps = {step for step in steps if step and command_of(step).startswith("slurmstepd")}
        self._daemons[node].kill()
        for process in [*steps, *tasks]:
            send(signal.SIGKILL, process)
        self._daemons[node].wait()

    def processes(self, **variables: str) -> list[psutil.Process]:
        """Return the processes of the cluster that have variables of these values."""
        return processes_with(SLURM_CONF=self.environment["SLURM_CONF"], **variables)

    def states(self) -> list[str]:
        """Return the state of every node."""
        return self.run("sinfo", "--noheader", "--Node", "--format=%T").split()

    def run(self, *command: str) -> str:
        """Run a program of SLURM and return what it printed."""
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        ).stdout

    def job(self, number: str) -> dict[str, str]:
        """Return what SLURM knows of a job."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def is_over(self, number: str) -> bool:
        """Return whether a job is over, requeues included."""
        return self.job(number)["JobState"] not in GOING

    def wait_for_job(self, number: str, seconds: float) -> str:
        """Wait until a job is over, requeues included, and return its last state."""
        self.wait_for(lambda: self.is_over(number), seconds)
        return self.job(number)["JobState"]

    def wait_for(
        self, is_true: Callable[[], bool], seconds: float, *, may_fail: bool = False
    ) -> None:
        """Wait until something is true."""
        end = time.monotonic() + seconds
        while not is_true():
            if time.monotonic() > end:
                if may_fail:
                    return
                raise TimeoutError(f"not within {seconds} s\n{self.logs()}")
            time.sleep(0.1)

    def logs(self) -> str:
        """Return the ends of all logs of the daemons."""
        ends = [f"{p.name}:\n{p.read_text()[-2000:]}" for p in sorted(self.folder.glob("*.log"))]
        return "\n".join([self.run("squeue"), *ends])


def command_of(process: psutil.Process) -> str:
    """Return the command line of a process, nothing if it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def parent_of(process: psutil.Process) -> psutil.Process | None:
    """Return the parent of a process, None if it has ended."""
    try:
        return process.parent()
    except psutil.Error:
        return None
