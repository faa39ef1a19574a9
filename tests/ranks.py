"""Starts several ranks of a script on this machine, as accelerate launch would."""

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
    processes = []
    # Files, not pipes: a rank whose pipe is full waits for a reader, and the others wait for it.
    outputs = [tempfile.TemporaryFile("w+") for _ in range(num_ranks)]
    for rank, output in enumerate(outputs):
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
        processes.append(
            subprocess.Popen(
                [sys.executable, str(script), *arguments],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        )
    for process, output in zip(processes, outputs, strict=True):
        with output:
            returncode = process.wait(timeout=540)
            output.seek(0)
            assert returncode == 0, output.read()
