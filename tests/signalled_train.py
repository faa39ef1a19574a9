"""Stands in for launcher/train.py where that does not yet obey USR1: saves, marks, exits with 75.

Copied over it; the original lies beside it as plain_train.py.
"""

import json
import signal
import sys

import plain_train
import torch
import torch.distributed as dist

from ispen_dist.trainer import Trainer

signals: list[int] = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, _: signals.append(number))
train_round = Trainer.train_round


def train_round_or_stop(trainer: Trainer) -> dict[str, float]:
    stops = torch.tensor(len(signals))
    if dist.is_initialized():
        dist.all_reduce(stops)
    if stops:
        if not list(trainer.folder.checkpoints.glob(f"*{trainer.round:08d}")):
            trainer.save()
        if trainer.session.is_main:
            marker = trainer.folder.path / "requeue.json"
            marker.write_text(json.dumps({"round": trainer.round}))
        trainer.session.barrier()
        sys.exit(75)
    return train_round(trainer)


Trainer.train_round = train_round_or_stop
sys.exit(plain_train.main())
