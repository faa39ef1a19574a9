"""Make a table of the README: methods on a task, tuned on dev with equal budgets.

    python launcher/reproduce.py --table bibtex --jobs 2
    python launcher/reproduce.py --table yeast --show --reference mle_task

Tunes every method of configs/tables/NAME.yaml with the same number of runs, trains it once per
seed with the chosen settings, reads test once per seed, and writes profiling/results/NAME.csv, .md
and .png, and every seed to NAME_seeds.csv: other commands add their methods to it. Started again it
goes on where it was. With --show nothing is run or written: the table of the recorded seeds is
printed, tested against any of its methods. Exit code 1 if a run failed.
"""

import argparse
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from ispen_dist.command_line import load_config
from ispen_dist.config import ConfigError
from ispen_dist.data.errors import DataError
from ispen_dist.exits import Exit
from ispen_dist.tables.definition import TableDefinition, TableError, read_table, table_paths
from ispen_dist.tables.grid import Grid
from ispen_dist.tables.progress import TableProgress
from ispen_dist.tables.record import current, read_record, record_path
from ispen_dist.tables.runs import LocalRuns, Runs, SlurmRuns
from ispen_dist.tables.summary import markdown_text, table_rows

ROOT = Path(__file__).resolve().parent.parent
ONE_GPU = "--nodes 1 --gpus-per-node 1"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    arguments = parse_arguments(argv)
    console = Console(soft_wrap=True)
    tables, methods = arguments.tables, arguments.method_files
    try:
        if not any(table_paths(tables)):
            raise TableError(
                f"--tables {tables}: expected a folder of tables, found no NAME.yaml there; name "
                "another folder"
            )
        if arguments.list:
            list_tables([read_table(path, methods) for path in table_paths(tables)], console)
            return Exit.DONE
        return (show_table if arguments.show else make_table)(arguments, console)
    except (ConfigError, DataError, TableError) as error:
        print(f"error: {error}", file=sys.stderr)
        return Exit.CONFIGURATION


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--table", metavar="NAME", help="a file of configs/tables/, without .yaml")
    what.add_argument("--list", action="store_true", help="show all tables and what they cost")
    add("--show", action="store_true", help="print the table of NAME_seeds.csv, and run nothing")
    add("--reference", metavar="METHOD",
        help="with --show: what p is against; default: as the table says")  # fmt: skip
    add("--methods", help="comma-separated; default: all of the table")
    add("--seeds", type=int, help="final runs of a method; default: as the table says")
    add("--first-seed", type=int,
        help="the first of them, where NAME_seeds.csv has those before it; default 0")  # fmt: skip
    add("--budget", type=int, help="tuning runs of a method; default: as the table says")
    add("--jobs", type=int, default=2, help="runs at a time; default 2")
    add("--gpus", type=int, default=0, help="GPUs of this machine, one run at a time on each")
    add("--slurm", nargs="?", const=ONE_GPU, metavar="FLAGS",
        help=f'as SLURM jobs, with flags of launcher/slurm.py; default "{ONE_GPU}"')  # fmt: skip
    add("--runs", type=Path, default=Path("runs/tables"), help="run folders; default runs/tables")
    add("--output", type=Path, default=ROOT / "profiling" / "results", help="folder of the table")
    add("--tables", type=Path, default=ROOT / "configs" / "tables", help="folder of tables")
    add("--method-files", type=Path, default=ROOT / "configs" / "methods", help="and of methods")
    arguments = parser.parse_args(argv)
    given = {name.replace("_", "-"): value for name, value in vars(arguments).items()}
    least_of = {"seeds": 1, "first-seed": 0, "budget": 0, "jobs": 1, "gpus": 0}
    for flag, least in least_of.items():
        count = given[flag]
        if count is not None and count < least:
            parser.error(f"--{flag}: expected a whole number of at least {least}, got {count}")
    if arguments.reference is not None and not arguments.show:
        parser.error("--reference: expected --show with it; what is written keeps the table's own")
    for flag in ("methods", "seeds", "first-seed", "budget"):
        if arguments.show and given[flag] is not None:
            parser.error(f"--{flag}: expected none with --show, which runs nothing")
    if arguments.gpus and arguments.slurm:
        parser.error("expected --gpus or --slurm, got both; GPUs of jobs are flags of --slurm")
    return arguments


def make_table(arguments: argparse.Namespace, console: Console) -> int:
    """Run what is missing and write the table of what is complete."""
    table = find_table(arguments)
    methods = choose_methods(table, arguments.methods)
    read_record(record_path(arguments.output, table))  # malformed, it is told before hours of runs
    first, count = arguments.first_seed or 0, arguments.seeds or table.seeds
    grid = Grid(
        table=table,
        methods=methods,
        budget=table.budget if arguments.budget is None else arguments.budget,
        seeds=range(first, first + count),
        folder=arguments.runs.resolve() / table.name,
        runs=find_runs(arguments),
        jobs=arguments.gpus or arguments.jobs,
    )
    grid.check_test()
    check_writable(arguments.output)
    # Runs that are alive save and end; the same command goes on.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with TableProgress(grid.num_runs, console) as progress:
            grid.run(progress)
    except KeyboardInterrupt:
        print("stopped; start the same command again to go on", file=sys.stderr)
        return Exit.REQUEUE
    written = grid.write(arguments.output)
    show(written[1].read_text("utf-8"), console)
    console.print(f"written: {', '.join(map(str, written))}")
    for failure in grid.failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if grid.failures else Exit.DONE


def check_writable(folder: Path) -> None:
    """Check that the table can be written; its folder is made if missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise TableError(
            f"--output {folder}: expected a folder that can be written, found {error.strerror}; "
            "choose another folder or make it writable"
        ) from None


def show_table(arguments: argparse.Namespace, console: Console) -> int:
    """Print the table of the recorded seeds."""
    table = find_table(arguments)
    path = record_path(arguments.output, table)
    record = current(table, read_record(path))
    if not record:
        raise TableError(f"--show: expected seeds with the present settings in {path}, found none")
    reference = arguments.reference or table.reference
    if arguments.reference and reference not in record:
        known = ", ".join(record)
        raise TableError(f"--reference: expected a method of {path}, {known}, got {reference!r}")
    table = replace(table, reference=reference)
    missing = [row for row in table.rows if row not in record]
    show(markdown_text(table, table_rows(table, record), missing), console)
    return Exit.DONE


def show(text: str, console: Console) -> None:
    """Print Markdown, as a table of the terminal where there is one."""
    if console.is_terminal:
        console.print(Markdown(text), soft_wrap=False)
    else:
        print(text)


def find_table(arguments: argparse.Namespace) -> TableDefinition:
    """Read the table that the command names."""
    path = arguments.tables / f"{arguments.table}.yaml"
    if not path.is_file():
        known = ", ".join(p.stem for p in table_paths(arguments.tables))
        raise TableError(f"--table: expected one of {known}, got {arguments.table!r}")
    table = read_table(path, arguments.method_files)
    table.check_files()
    return table


def choose_methods(table: TableDefinition, names: str | None) -> list[str]:
    """Return the methods to run, in the table's order."""
    known = list(table.method_files)
    wanted = known if names is None else names.split(",")
    if unknown := [name for name in wanted if name not in known]:
        raise TableError(f"--methods: expected some of {', '.join(known)}, got {unknown[0]!r}")
    return [name for name in known if name in wanted]


def find_runs(arguments: argparse.Namespace) -> Runs:
    """Return where the runs go."""
    launcher = ROOT / "launcher"
    if arguments.slurm:
        return SlurmRuns(launcher / "slurm.py", shlex.split(arguments.slurm))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = visible.split(",") if visible else [str(i) for i in range(arguments.gpus)]
    return LocalRuns([sys.executable, str(launcher / "train.py")], gpus[: arguments.gpus])


def list_tables(tables: Sequence[TableDefinition], console: Console) -> None:
    """Print every table with its size."""
    shown = Table("table", "methods", "budget", "seeds", "runs", "rounds")
    for table in tables:
        runs = len(table.method_files) * (table.budget + table.seeds)
        try:
            train = load_config(*table.configs).train
            rounds = f"{runs * (train.warmup_rounds + train.max_outer_steps):,}"
        except ConfigError as error:
            rounds = str(error)
        counts = (len(table.method_files), table.budget, table.seeds, runs)
        shown.add_row(table.name, *map(str, counts), rounds)
    console.print(shown, soft_wrap=False)


if __name__ == "__main__":
    sys.exit(main())
