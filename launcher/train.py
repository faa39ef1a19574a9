"""Train an energy network and its inference network.

    accelerate launch launcher/train.py --config configs/twitter_pos.yaml

Exit codes: 0 done, 2 configuration or data, 3 not finite or the solver was told to stop.
"""

import sys
from datetime import datetime
from pathlib import Path

import torch

from ispen_dist.checkpoint import Checkpoint, CheckpointError, find_checkpoint, load_checkpoint
from ispen_dist.command_line import TrainCommand, dump_config, parse_train
from ispen_dist.config import Config, ConfigError
from ispen_dist.data.errors import DataError
from ispen_dist.data.loading import Splits, load_splits
from ispen_dist.distributed import Session
from ispen_dist.outer import SolveFailed
from ispen_dist.plan import describe
from ispen_dist.recording.console import Console
from ispen_dist.recording.run_folder import RunFolder, check_same_run
from ispen_dist.trainer import NotFinite, Trainer


def main() -> int:
    """Run the command line and return the exit code."""
    command = parse_train()
    session = Session()
    try:
        return run(command, session)
    except (ConfigError, DataError, CheckpointError) as error:
        return failed(session, error, 2)
    except (NotFinite, SolveFailed) as error:
        return failed(session, error, 3)
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
            print(describe(config, splits, session.num_ranks))
        return 0
    output = command.output or default_output(command, session)
    checkpoint = choose_checkpoint(command, output)
    train(config, splits, session, output, checkpoint)
    return 0


def train(
    config: Config, splits: Splits, session: Session, output: Path, checkpoint: Checkpoint | None
) -> dict:
    """Train from the start or from a checkpoint, and return the summary."""
    with Console(is_main=session.is_main) as console:
        folder = RunFolder(output, config, console, is_main=session.is_main)
        trainer = Trainer(config, splits, session, folder)
        if checkpoint is not None:
            trainer.restore(checkpoint)
            console.message(f"resumed from {checkpoint.path} at round {trainer.round}")
        console.message(describe(config, splits, session.num_ranks))
        return trainer.run()


def default_output(command: TrainCommand, session: Session) -> Path:
    """Return runs/NAME-DATE-TIME, the same on every rank."""
    now = session.agree(int(datetime.now().timestamp()))
    stamp = datetime.fromtimestamp(now).strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{command.name}-{stamp}"


def choose_checkpoint(command: TrainCommand, output: Path) -> Checkpoint | None:
    """Return the checkpoint to continue from, verified, or None for a fresh start."""
    if command.resume == "none":
        return None
    if command.resume == "auto":
        path = find_checkpoint(output / "checkpoints")
        if path is None:
            return None
        check_same_run(output, command.config)
    else:
        path = Path(command.resume)
    return load_checkpoint(path)


if __name__ == "__main__":
    sys.exit(main())
