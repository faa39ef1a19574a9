"""Traces of a few rounds for TensorBoard, Perfetto and profiling/report.py."""

import gzip
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch.profiler import ProfilerAction, profile, record_function, schedule

from ispen_dist import ranges
from ispen_dist.config import Config, ConfigError, ProfileConfig
from ispen_dist.data.output_file import replacing
from ispen_dist.distributed import Session
from ispen_dist.recording.run_folder import RunFolder
from ispen_dist.schedule import Schedule

METADATA = "ispen_dist"
"""Key under which a trace says of which rounds it is."""

COMPRESSION = 1
"""Level of gzip. On one core of an AMD EPYC, a million events of a BiLSTM's round (412 MB) take 2 s
and become 34 MB; at PyTorch's level 9, line by line, they take 48 s and become 21 MB."""

MAX_ALLOCATIONS = 100_000
"""Entries of a memory snapshot: about 200 bytes each, with their stacks a few times that."""


def first_profiled(config: Config) -> int:
    """Return the round at which the schedule of the profiler begins.

    Raises:
        ConfigError: if the run ends before the first recording does.
    """
    settings, train = config.profile, config.train
    learns = train.method != "mle" and train.max_outer_steps > 0
    first = settings.first_round
    if first < 0:
        first = train.warmup_rounds + 1 if learns else 0
    needed = first + settings.wait + settings.warmup + settings.steps
    num_rounds = Schedule(config).num_rounds
    if needed > num_rounds:
        raise ConfigError(
            f"profile.steps: expected the first recording to end within the run's {num_rounds} "
            f"rounds, got one that ends after {needed} (first round {first}, wait {settings.wait}, "
            f"warmup {settings.warmup}, steps {settings.steps}); lower profile.first_round or "
            "profile.steps, or raise train.max_outer_steps"
        )
    return first


class RoundProfiler:
    """Records whole rounds on a schedule; a context manager around the loop over rounds.

    Ranges exist while it records and at no other time, so all other rounds run as if it were off.

    Args:
        config: all settings.
        session: this process.
        folder: of the run; every rank writes its traces there.

    Raises:
        ConfigError: for a schedule that does not fit the run, or for what needs a GPU without one.
    """

    def __init__(self, config: Config, session: Session, folder: RunFolder) -> None:
        self._settings, self._session = config.profile, session
        self._folder, self._failures = folder.path / "profile", folder.failures
        self._first = first_profiled(config) if self._settings.enabled else 0
        self._recorder: profile | None = None
        self._seconds: list[float] = []
        self._round, self._begin = 0, 0.0
        for name in ("nsys", "memory_snapshot"):
            if getattr(self._settings, name) and session.device.type != "cuda":
                raise ConfigError(
                    f"profile.{name}: expected a run on a GPU, got one on {session.device.type}; "
                    "leave it out"
                )

    def begin(self, first_round: int) -> Self:
        """Take up the schedule at the round where a run starts or is resumed."""
        if self._settings.enabled:
            self._round, self._first = first_round, max(self._first, first_round)
            if not self._settings.nsys:
                self._recorder = self._build(self._first - first_round)
                self._recorder.start()
            self._turn(self._action, before=ProfilerAction.NONE)
        return self

    def _build(self, num_skipped: int) -> profile:
        settings = self._settings
        return profile(
            schedule=_schedule(settings, num_skipped),
            on_trace_ready=self._write,
            record_shapes=settings.shapes,
            profile_memory=settings.memory,
            with_stack=settings.stacks,
        )

    @property
    def _action(self) -> ProfilerAction:
        if self._recorder is not None:
            return self._recorder.current_action
        after_first = self._round - self._first
        return (
            _schedule(self._settings, 0)(after_first) if after_first >= 0 else ProfilerAction.NONE
        )

    def end_round(self) -> None:
        """Say that a round is over; the recorder moves on and writes a trace when it is due."""
        if not self._settings.enabled:
            return
        before = self._action
        if before in _RECORDING:
            self._seconds.append(time.perf_counter() - self._begin)
        self._round += 1
        if self._recorder is not None:
            if before is ProfilerAction.RECORD_AND_SAVE:
                self._session.watchdog.beat("profile")
                self._describe(self._recorder)
            self._recorder.step()
        self._turn(self._action, before)

    def _turn(self, action: ProfilerAction, before: ProfilerAction) -> None:
        """Switch ranges, and what else is recorded beside the trace."""
        ranges.use(None if action is ProfilerAction.NONE else self._range)
        if before is ProfilerAction.RECORD_AND_SAVE:
            self._end_beside()
        if action in _RECORDING and before is not ProfilerAction.RECORD:
            self._seconds = []
            if self._settings.memory_snapshot:
                torch.cuda.memory._record_memory_history(max_entries=MAX_ALLOCATIONS)
            if self._settings.nsys:
                torch.cuda.profiler.start()
        self._begin = time.perf_counter()

    def _end_beside(self) -> None:
        if self._settings.nsys:
            torch.cuda.profiler.stop()
        if self._settings.memory_snapshot:
            self._write_snapshot()

    def _range(self, name: str) -> AbstractContextManager[Any]:
        return torch.cuda.nvtx.range(name) if self._settings.nsys else record_function(name)

    def _describe(self, recorder: profile) -> None:
        """Say in the trace, which must still be recording, of what it is."""
        about = {"rank": self._session.rank, "last_round": self._round, "seconds": self._seconds}
        recorder.add_metadata_json(METADATA, json.dumps(about))

    def _write(self, recorder: profile) -> None:
        """Write a trace under a name that TensorBoard's plugin reads: worker, number, suffix."""
        with (
            self._failures.watching("profile"),
            replacing(self._path("pt.trace.json.gz")) as path,
            # The recorder itself compresses line by line and at the highest level.
            tempfile.NamedTemporaryFile(suffix=".json") as plain,
        ):
            recorder.export_chrome_trace(plain.name)
            with open(plain.name, "rb") as text, gzip.open(path, "wb", COMPRESSION) as packed:
                shutil.copyfileobj(text, packed, 2**20)

    def _write_snapshot(self) -> None:
        with self._failures.watching("profile"), replacing(self._path("memory.pickle")) as path:
            torch.cuda.memory._dump_snapshot(str(path))
        torch.cuda.memory._record_memory_history(enabled=None)

    def _path(self, suffix: str) -> Path:
        return self._folder / f"rank_{self._session.rank}.{self._round}.{suffix}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._settings.enabled:
            return
        ranges.use(None)
        is_recording = self._action in _RECORDING
        if is_recording:
            self._end_beside()
        if self._recorder is not None:
            if is_recording:
                self._describe(self._recorder)
            self._recorder.stop()
            self._recorder = None


_RECORDING = (ProfilerAction.RECORD, ProfilerAction.RECORD_AND_SAVE)


def _schedule(settings: ProfileConfig, num_skipped: int) -> Callable[[int], ProfilerAction]:
    return schedule(
        skip_first=num_skipped,
        wait=settings.wait,
        warmup=settings.warmup,
        active=settings.steps,
        repeat=settings.repeat,
    )
