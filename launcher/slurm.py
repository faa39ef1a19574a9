"""Train on several nodes of a SLURM cluster.

    python launcher/slurm.py --config configs/bibtex.yaml --nodes 4 --gpus-per-node 8

Checks the settings, snapshots code and settings into the run folder, fills `launcher/job.sbatch`
and submits it. Flags after -- are settings, as for launcher/train.py.
"""

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from ispen_dist.command_line import TrainCommand, dump_config, parse_train
from ispen_dist.recording.snapshot import save_code

ROOT = Path(__file__).resolve().parent.parent
DECIDED = ("--config", "--output", "--resume", "--print-config")
"""Flags of launcher/train.py that the job sets itself."""


class SubmissionError(ValueError):
    """A job that cannot be written or submitted, and what to do."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    arguments = parse_arguments(argv)
    try:
        job = write_job(arguments, parse_settings(arguments))
        if arguments.dry_run:
            print(job.read_text("utf-8"), end="")
            print(f"not submitted; sbatch {shlex.quote(str(job))} does it", file=sys.stderr)
        else:
            number = submit(job)
            print(f"job {number}; log: {job.with_name(f'job-{number}.log')}")
    except SubmissionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the job's own flags; what follows -- is left to `parse_settings`."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="Settings of the training follow after --, for example -- --train.seed=1",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", type=Path, action="append", required=True, metavar="FILE",
        help="YAML file of settings; of several, each wins over those before it")  # fmt: skip
    add("--nodes", type=_positive, required=True, help="number of nodes")
    add("--gpus-per-node", type=_positive, help="GPUs, and processes, of a node")
    add("--processes-per-node", type=_positive, help="processes of a node without GPUs")
    add("--cpus-per-process", type=_positive, help="default: 4 with GPUs, otherwise 1")
    add("--runtime", type=Path, help="file of configs/runtime/; default: ddp, single for 1 process")
    add("--output", type=Path, help="run folder on a shared file system; default: runs/NAME-TIME")
    add("--time", default="04:00:00", help="time limit as sbatch takes it; default 04:00:00")
    add("--partition", help="partition of the cluster")
    add("--account", help="account to charge")
    add("--requeue", action="store_true", help="continue after the time limit or a failed node")
    add("--signal-before", type=_positive, default=180, metavar="SECONDS",
        help="save so long before the time limit; default 180")  # fmt: skip
    add("--max-requeues", type=_positive, default=100, help="with --requeue; default 100")
    add("--dry-run", action="store_true", help="write and print the job, do not submit it")
    add("settings", nargs="*", metavar="-- --SECTION.FIELD=VALUE", help="settings of the training")
    arguments = parser.parse_args(argv)
    if (arguments.gpus_per_node is None) == (arguments.processes_per_node is None):
        parser.error("expected either --gpus-per-node, or --processes-per-node for CPU nodes")
    return arguments


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def parse_settings(arguments: argparse.Namespace) -> TrainCommand:
    """Check the settings as launcher/train.py will; a mistake ends the program with code 2."""
    for flag in arguments.settings:
        if flag.partition("=")[0] in DECIDED:
            raise SubmissionError(
                f"{flag}: expected settings after --, got a flag that the job sets itself: it "
                "resumes its run folder; give --config and --output before --"
            )
    files = [part for path in arguments.config for part in ("--config", str(path))]
    return parse_train([*files, *arguments.settings])


def write_job(arguments: argparse.Namespace, command: TrainCommand) -> Path:
    """Write code, settings and the batch script into the run folder; return the script."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    run = (arguments.output or Path("runs") / f"{command.name}-{stamp}").resolve()
    folder = run / "slurm"
    if folder.exists():
        raise SubmissionError(
            f"--output {run}: expected a folder without a job, found one; continue it with "
            f"sbatch {shlex.quote(str(folder / 'job.sbatch'))}, or choose another folder"
        )
    processes = arguments.gpus_per_node or arguments.processes_per_node
    default = "single" if processes * arguments.nodes == 1 else "ddp"
    runtime = arguments.runtime or ROOT / "configs" / "runtime" / f"{default}.yaml"
    if not runtime.is_file():
        raise SubmissionError(f"--runtime {runtime}: expected a file of configs/runtime/")
    save_code(ROOT, folder / "code")
    shutil.copy(runtime, folder / "runtime.yaml")
    (folder / "config.yaml").write_text(dump_config(command.config), "utf-8")
    job = folder / "job.sbatch"
    template = (ROOT / "launcher" / "job.sbatch").read_text("utf-8")
    options, variables = blocks(arguments, command.name, run, processes)
    job.write_text(fill(template, options, variables), "utf-8")
    return job


Values = Mapping[str, str | int | None]


def blocks(
    arguments: argparse.Namespace, name: str, run: Path, processes: int
) -> tuple[Values, Values]:
    """Return the values of the two blocks that the script begins with."""
    folder, gpus = run / "slurm", arguments.gpus_per_node
    cpus = arguments.cpus_per_process or (4 if gpus else 1)
    options = {
        "job-name": name,
        "nodes": arguments.nodes,
        "cpus-per-task": cpus * processes,
        "gpus-per-node": gpus,
        "time": arguments.time,
        "partition": arguments.partition,
        "account": arguments.account,
        "signal": f"B:USR1@{arguments.signal_before}",
        # sbatch fills %j in; another % is part of the folder's name.
        "output": str(folder).replace("%", "%%") + "/job-%j.log",
    }
    variables = {
        "run": str(run),
        "config": str(folder / "config.yaml"),
        "runtime": str(folder / "runtime.yaml"),
        "launcher": str(folder / "code" / "launcher"),
        "packages": str(folder / "code"),
        "python": sys.executable,
        "processes_per_node": processes,
        "gpus_per_node": gpus or 0,
        "save_seconds": arguments.signal_before,
        "max_requeues": arguments.max_requeues if arguments.requeue else 0,
    }
    return options, variables


def fill(template: str, options: Values, variables: Values) -> str:
    """Return a batch script with other options and variables; an option of None is switched off."""
    for name, value in options.items():
        off = f"##SBATCH --{name}"
        line = off if value is None else f"#SBATCH --{name}={shlex.quote(str(value))}"
        template = _replaced(template, rf"##?SBATCH --{name}\b.*", line)
    for name, value in variables.items():
        template = _replaced(template, rf"{name}=.*", f"{name}={shlex.quote(str(value))}")
    if not variables["max_requeues"]:
        template = _replaced(template, "#SBATCH --requeue", "#SBATCH --no-requeue")
    return template


def _replaced(template: str, pattern: str, line: str) -> str:
    text, count = re.subn(f"^{pattern}$", lambda _: line, template, flags=re.MULTILINE)
    assert count == 1, pattern
    return text


def submit(job: Path) -> str:
    """Hand a batch script to SLURM and return the number of the job."""
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(job)], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise SubmissionError(
            f"expected sbatch on this machine, found none; run sbatch {job} on a login node"
        ) from None
    if done.returncode != 0:
        raise SubmissionError(
            f"SLURM refused {job}: {done.stderr.strip()}; change its #SBATCH lines and run sbatch "
            "on it"
        )
    return done.stdout.strip().partition(";")[0]


if __name__ == "__main__":
    sys.exit(main())
