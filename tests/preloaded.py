"""Everything that takes long to import, for a process that forks ranks; see `forks.py`."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import accelerate  # noqa: F401
import deepspeed  # noqa: F401

import ispen_dist.distributed.trouble
import ispen_dist.trainer  # noqa: F401
