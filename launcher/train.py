"""Train an energy network and its inference network.

    accelerate launch launcher/train.py --config configs/twitter_pos.yaml

Exit codes: 0 done, 2 configuration, data or network, 3 not finite or the solver was told to stop,
5 not everything could be written.
"""

import sys
from datetime import datetime
from pathlib import Path

import torch

from ispen_dist.checkpoint import CheckpointError, find_checkpoint, load_checkpoint
from ispen_dist.command_line import TrainCommand, dump_config, parse_train
from ispen_dist.config import ConfigError
from ispen_dist.data.errors import DataError
from ispen_dist.data.loading import load_splits
from ispen_dist.distributed import Session
from ispen_dist.linalg.stages import StageError
from ispen_dist.outer import SolveFailed
from ispen_dist.plan import describe
from ispen_dist.recording.console import Console
from ispen_dist.recording.run_folder import RunFolder, check_folder
from ispen_dist.recording.run_lock import RunLock
from ispen_dist.trainer import NotFinite, Trainer
from ispen_dist.write_failures import StorageFailed


def main() -> int:
    """Run the command line and return the exit code."""
    command = parse_train()
    try:
        session = Session()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        return run(command, session)
    except (ConfigError, DataError, CheckpointError, StageError) as error:
        return failed(session, error, 2)
    except (NotFinite, SolveFailed) as error:
        return failed(session, error, 3)
    except StorageFailed as error:
        return failed(session, error, 5)
    finally:
        session.close()


def failed(session: Session, error: Exception, code: int) -> int:
    """Print an error once and return the exit code."""
    if session.is_main:
        print(f"error: {error}", file=sys.stderr)
    return code


def run(command: TrainCommand, session: Session) -> int:
    """Train as the command says."""
    config = command.config
    if config.train.num_threads:
        torch.set_num_threads(config.train.num_threads)
    splits = load_splits(config)
    if command.print_config:
        if session.is_main:
            print(dump_config(config), end="")
            print(describe(config, splits, session.num_ranks, session.runtime))
        return 0
    output = command.output or default_output(command, session)
    hold(RunLock(output), session)
    check_folder(output, config, may_continue=command.resume != "none")
    path = choose_checkpoint(command, output)
    session.barrier()
    with Console(is_main=session.is_main) as console:
        folder = RunFolder(output, config, console, is_main=session.is_main)
        trainer = Trainer(config, splits, session, folder)
        if path is not None:
            trainer.restore(load_checkpoint(path))
            console.message(f"resumed from {path} at round {trainer.round}")
        console.message(describe(config, splits, session.num_ranks, session.runtime))
        trainer.run()
    return 0


def default_output(command: TrainCommand, session: Session) -> Path:
    """Return runs/NAME-DATE-TIME, the same on every rank."""
    now = session.agree(int(datetime.now().timestamp()))
    stamp = datetime.fromtimestamp(now).strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{command.name}-{stamp}"


def hold(lock: RunLock, session: Session) -> None:
    """Take the lock on the main process, which has it until it ends; refuse on all ranks alike."""
    refusal = lock.take() if session.is_main else ""
    if session.agree(len(refusal)):
        raise ConfigError(refusal or "--output: refused on rank 0")


def choose_checkpoint(command: TrainCommand, output: Path) -> Path | None:
    """Return the checkpoint to continue from, or None for a fresh start."""
    if command.resume == "none":
        return None
    if command.resume != "auto":
        return Path(command.resume)
    return find_checkpoint(output / "checkpoints")


if __name__ == "__main__":
    sys.exit(main())
