"""Starts ranks of launcher/train.py in a moment, forked from a process that imported everything.

A start of Python with torch and DeepSpeed takes ten seconds; what is tested here are the ways in
which a run ends, and each takes a start of its own.
"""

import multiprocessing
import os
import runpy
import sys
import time
from pathlib import Path

import plants
from launched import TRAIN
from ranks import ENVIRONMENTS, free_port

HERE = Path(__file__).parent
CONTEXT = multiprocessing.get_context("forkserver")

PATIENCE = 540.0
"""Seconds: in a new environment DeepSpeed first compiles an extension, for a minute or two, and
for ten on a machine that is busy with something else."""


class Job:
    """Ranks that run.

    Args:
        folder: of their logs.
        arguments: of launcher/train.py.
        num_ranks: processes.
        runtime: key of `ENVIRONMENTS`.
        plant: name of a function of `plants`, called on the last rank before it begins.
    """

    def __init__(self, folder, *arguments, num_ranks=2, runtime="replicas", plant=""):
        os.environ["PYTHONPATH"] = str(HERE)
        CONTEXT.set_forkserver_preload(["preloaded"])
        folder.mkdir(parents=True, exist_ok=True)
        port = str(free_port())
        self.logs = [folder / f"rank{r}.log" for r in range(num_ranks)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            environment = {
                **ENVIRONMENTS[runtime], "RANK": str(rank), "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
            own = plant if rank == num_ranks - 1 else ""
            settings = (environment if num_ranks > 1 else {}, log, list(map(str, arguments)), own)
            self.processes.append(CONTEXT.Process(target=_rank, args=settings))
            self.processes[-1].start()

    def codes(self, timeout: float = PATIENCE) -> list[int]:
        """Wait for all ranks and return their exit codes; -9 for those that had to be killed."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        for process in self.processes:
            if process.is_alive():
                process.kill()
                process.join()
        return [process.exitcode for process in self.processes]

    def text(self) -> str:
        """Return what all ranks have printed."""
        return "".join(log.read_text() for log in self.logs if log.exists())

    def wait_for(self, words: str, timeout: float = PATIENCE) -> None:
        """Wait until a rank has printed some words."""
        end = time.monotonic() + timeout
        while words not in self.text():
            assert time.monotonic() < end, f"expected {words!r} in: {self.text()}"
            assert any(p.is_alive() for p in self.processes), self.text()
            time.sleep(0.02)


def _rank(environment: dict[str, str], log: Path, arguments: list[str], plant: str) -> None:
    os.environ.update(environment)
    with log.open("wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # Unlike the process that forked this one, which has left standard input to nobody.
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    sys.argv = [str(TRAIN), *arguments]
    if plant:
        getattr(plants, plant)()
    runpy.run_path(str(TRAIN), run_name="__main__")
