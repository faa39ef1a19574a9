"""Starts several ranks of a script on this machine, as accelerate launch would."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

RUNTIMES = {
    "replicas": {},
    "zero1": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
}
BF16 = {"ACCELERATE_MIXED_PRECISION": "bf16"}
ENVIRONMENTS = RUNTIMES | {f"{name}_bf16": values | BF16 for name, values in RUNTIMES.items()}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_ranks(script: Path, num_ranks: int, *arguments: str, runtime: str = "replicas") -> None:
    """Run a script as ranks 0 to n-1 on this machine and fail with the output of one that fails."""
    port = str(free_port())
    with contextlib.ExitStack() as stack:
        ranks = []
        for rank in range(num_ranks):
            environment = {
                **os.environ,
                **ENVIRONMENTS[runtime],
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(num_ranks),
                "LOCAL_WORLD_SIZE": str(num_ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
            }
            # No pipe: a rank waits for the reader of a full one, and the other ranks wait for it.
            output = stack.enter_context(tempfile.TemporaryFile("w+"))
            command = [sys.executable, str(script), *arguments]
            process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
            stack.callback(process.kill)
            ranks.append((process, output))
        for process, output in ranks:
            returncode = process.wait(timeout=540)
            output.seek(0)
            assert returncode == 0, output.read()
