"""See that the nodes of a job are alike and fit to train; `launcher/job.sbatch` runs it on each.

Every node writes into one folder and waits for the files of the others: that shows the folder to
be shared, and lets each compare itself with the first. Only the standard library is needed to say
what is missing.
"""

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

SHARED_SECONDS = 30.0
"""Time for the other nodes to start a Python, and for a file to be seen on all of them."""
REPORT_SECONDS = 300.0
"""Time for the other nodes to import torch, which takes long from a cold file system."""
VERSIONS = ("torch", "accelerate", "deepspeed", "transformers")


def main() -> int:
    """Check this node among the others and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="new folder that all nodes should share")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs each node should have")
    parser.add_argument("--nodes", nargs="*", help="names of all nodes; default: those of the job")
    arguments = parser.parse_args()
    node, nodes = os.environ["SLURMD_NODENAME"], arguments.nodes or job_nodes()
    errors = check_node(arguments.folder, node, nodes, arguments.gpus)
    for error in errors:
        print(f"error: {node}: {error}", file=sys.stderr)
    return 2 if errors else 0


def job_nodes() -> list[str]:
    """Return the names of the nodes of this job, the first one first."""
    show = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
    return subprocess.run(show, capture_output=True, text=True, check=True).stdout.split()


def check_node(folder: Path, node: str, nodes: Sequence[str], num_gpus: int) -> list[str]:
    """Return what is wrong with this node."""
    try:
        silent = exchange(folder, "here", node, nodes, {}, SHARED_SECONDS)
    except OSError as error:
        return [f"expected to write into {folder}, got: {error}; choose another --output"]
    if silent:
        return [
            f"expected files of {', '.join(silent)} in {folder}, found none within "
            f"{SHARED_SECONDS:.0f} s; choose an --output that all nodes share"
        ]
    errors = missing_packages()
    if not errors:
        errors = missing_gpus(num_gpus)
    silent = exchange(folder, "report", node, nodes, describe_node(), REPORT_SECONDS)
    if silent:
        return [*errors, f"expected a report of {', '.join(silent)}, got none; see its errors"]
    own, first = (
        json.loads(_file(folder, "report", n).read_text("utf-8")) for n in (node, nodes[0])
    )
    return errors + differences(own, first, nodes[0])


def exchange(
    folder: Path, name: str, node: str, nodes: Sequence[str], content: dict, seconds: float
) -> list[str]:
    """Write this node's file, wait for those of the others, and return whose did not appear."""
    end = time.monotonic() + seconds
    while True:
        # Written anew each time: a change of its own makes NFS look at the folder again.
        temporary = folder / f".{node}.{name}"
        temporary.write_text(json.dumps(content), "utf-8")
        os.replace(temporary, _file(folder, name, node))
        silent = [other for other in nodes if not _file(folder, name, other).exists()]
        if not silent or time.monotonic() > end:
            return silent
        time.sleep(0.2)


def _file(folder: Path, name: str, node: str) -> Path:
    return folder / f"{node}.{name}.json"


def missing_packages() -> list[str]:
    """Return what cannot be imported."""
    for name in ("torch", "ispen_dist"):
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken library can raise anything
            return [
                f"expected to import {name} with {sys.executable}, got {type(error).__name__}: "
                f"{error}; install the project into an environment that all nodes share"
            ]
    return []


def missing_gpus(num_gpus: int) -> list[str]:
    """Return whether torch sees fewer GPUs than asked for; torch can be imported."""
    found = importlib.import_module("torch").cuda.device_count() if num_gpus else 0
    if found >= num_gpus:
        return []
    return [
        f"expected {num_gpus} GPUs, torch sees {found}; look at nvidia-smi on the node, or ask for "
        "fewer with --gpus-per-node, or for none with --processes-per-node"
    ]


def describe_node() -> dict[str, str]:
    """Return what has to be the same on all nodes."""
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    package = sys.modules.get("ispen_dist")
    found["ispen_dist"] = str(package.__file__) if package else "none"
    return found


def differences(own: dict[str, str], first: dict[str, str], name: str) -> list[str]:
    """Return where this node differs from the first."""
    return [
        f"expected {key} {first[key]} as on {name}, got {own[key]}; use one environment for all"
        for key in first
        if own[key] != first[key]
    ]


if __name__ == "__main__":
    sys.exit(main())
