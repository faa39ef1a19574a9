"""Train an energy network and its inference network.

    accelerate launch launcher/train.py --config configs/twitter_pos.yaml

Ends with a code of `ispen_dist.exits.Exit`; `--help` lists them.
"""

import os
import sys
import traceback
from datetime import datetime
from pathlib import Path
from typing import NoReturn

import torch

from ispen_dist.checkpoint import (
    Checkpoint,
    CheckpointError,
    find_checkpoint,
    load_checkpoint,
)
from ispen_dist.command_line import TrainCommand, dump_config, parse_train, print_error
from ispen_dist.config import ConfigError
from ispen_dist.data.errors import DataError
from ispen_dist.data.loading import Splits, load_splits
from ispen_dist.data.output_file import standard_output
from ispen_dist.distributed import Session
from ispen_dist.distributed.trouble import FailedElsewhere, report, together
from ispen_dist.exits import Exit
from ispen_dist.linalg.stages import StageError
from ispen_dist.not_finite import NotFinite
from ispen_dist.outer import SolveFailed
from ispen_dist.plan import describe
from ispen_dist.recording.console import Console
from ispen_dist.recording.requeue import mark, unmark
from ispen_dist.recording.run_folder import RunFolder, check_folder
from ispen_dist.recording.run_lock import RunLock
from ispen_dist.stopping import Stopped, StopRequest, stop_with_launcher
from ispen_dist.trainer import Trainer
from ispen_dist.watchdog import write_prefixed
from ispen_dist.write_failures import StorageFailed

CANNOT_WORK = (ConfigError, DataError, CheckpointError, StageError)


def main() -> Exit:
    """Run the command line and return the exit code."""
    stop = StopRequest()
    stop.install()
    stop_with_launcher()
    command = parse_train()
    try:
        session = Session(stop, command.config.train.hang_timeout)
    except ConfigError as error:
        print_error(error)
        return Exit.CONFIGURATION
    try:
        run(command, session)
    except Stopped:
        code = Exit.REQUEUE
    except FailedElsewhere:
        leave(Exit.CONFIGURATION)
    except CANNOT_WORK as error:
        report(session, error)
        leave(Exit.CONFIGURATION)
    except (NotFinite, SolveFailed, StorageFailed) as error:
        report(session, error)
        # All ranks are here: they decided together, from reduced values.
        code = Exit.DISK if isinstance(error, StorageFailed) else Exit.NOT_FINITE
    except Exception:
        write_prefixed(traceback.format_exc())
        if not session.watchdog.is_late:
            leave(1)
        session.watchdog.report()
        leave(Exit.HANG)
    else:
        code = Exit.DONE
    session.close()
    return code


def leave(code: int) -> NoReturn:
    """End this process at once: to leave the process group could wait for ranks that are stuck."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(command: TrainCommand, session: Session) -> None:
    """Train as the command says."""
    config = command.config
    if config.train.num_threads:
        torch.set_num_threads(config.train.num_threads)
    splits = together(session, lambda: load_splits(config), CANNOT_WORK)
    if command.print_config:
        if session.is_main:
            with standard_output():
                print(dump_config(config), end="")
                print(describe(config, splits, session.num_ranks, session.runtime))
        return
    output = command.output or default_output(command, session)
    session.flight_record.folder = output / "flight_record"
    path = together(
        session, lambda: find_start(command, output, is_main=session.is_main), CANNOT_WORK
    )
    with Console(is_main=session.is_main) as console:
        folder = RunFolder(output, config, console, is_main=session.is_main)
        trainer = Trainer(config, splits, session, folder)
        if path is not None:
            read = together(session, lambda: read_checkpoint(path, splits), CANNOT_WORK)
            trainer.restore(read)
            console.message(f"resumed from {path} at round {trainer.round}")
        console.message(describe(config, splits, session.num_ranks, session.runtime))
        if session.is_main:
            unmark(output)
        try:
            trainer.run()
        except (Stopped, NotFinite, SolveFailed) as error:
            folder.close()
            if isinstance(error, Stopped):
                console.message(str(error))
                if session.is_main:
                    mark(output, error)
                session.barrier()  # The first rank to end may have the others ended.
            raise


def find_start(command: TrainCommand, output: Path, *, is_main: bool) -> Path | None:
    """Take the run folder, check it, and return the checkpoint to continue from, if any."""
    if is_main:
        RunLock(output).take()
    check_folder(output, command.config, may_continue=command.resume != "none")
    return choose_checkpoint(command, output)


def default_output(command: TrainCommand, session: Session) -> Path:
    """Return runs/NAME-DATE-TIME, the same on every rank."""
    now = session.agree(int(datetime.now().timestamp()))
    stamp = datetime.fromtimestamp(now).strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{command.name}-{stamp}"


def choose_checkpoint(command: TrainCommand, output: Path) -> Path | None:
    """Return the checkpoint to continue from, or None for a fresh start."""
    if command.resume == "none":
        return None
    if command.resume != "auto":
        return Path(command.resume)
    return find_checkpoint(output / "checkpoints")


def read_checkpoint(path: Path, splits: Splits) -> Checkpoint:
    """Read a checkpoint of a run on the same data."""
    checkpoint = load_checkpoint(path)
    # Runs before 2026-11-30 kept nothing of their data.
    if checkpoint.state.get("data", splits.digest) != splits.digest:
        raise CheckpointError(
            f"{path}: expected the labels, features and numbers of examples that the run was begun "
            "with, found others; restore the data, or start in another folder"
        )
    return checkpoint


if __name__ == "__main__":
    sys.exit(main())
