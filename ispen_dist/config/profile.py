"""What a run records about its own time and memory."""

from dataclasses import dataclass

from ispen_dist.config.checks import ANY, check, check_ranges


@dataclass(frozen=True)
class ProfileConfig:
    """Traces of a few rounds, one per rank under RUN/profile; see profiling/report.py."""

    enabled: bool = False
    """Record traces. Off, no profiler is called at all."""
    first_round: int = -1
    """Rounds before the schedule begins; -1 begins it after the first outer step, which is unlike
    all others, or at 0 where the run has none."""
    wait: int = 0
    """Rounds that are left out before every recording."""
    warmup: int = 1
    """Rounds recorded and thrown away, since the first one carries the cost of starting."""
    steps: int = 1
    """Rounds that are recorded in a row, into one trace."""
    repeat: int = 1
    """Recordings; 0 goes on to the end of the run."""
    shapes: bool = True
    """Record the shapes of operators' inputs, from which the report counts arithmetic."""
    memory: bool = True
    """Record allocations, from which the report knows the peak of every phase."""
    stacks: bool = False
    """Record Python stacks; makes traces large."""
    memory_snapshot: bool = False
    """Also write a history of all GPU allocations, for pytorch.org/memory_viz."""
    nsys: bool = False
    """Leave recording to Nsight Systems: NVTX ranges in place of traces, and the recorded rounds
    between cudaProfilerStart and Stop, for nsys profile --capture-range=cudaProfilerApi."""

    def __post_init__(self) -> None:
        check_ranges(
            "profile",
            self,
            first_round=(-1, ANY),
            wait=(0, ANY),
            warmup=(1, ANY),
            steps=(1, ANY),
            repeat=(0, ANY),
        )
        for name in ("memory_snapshot", "nsys"):
            check(
                self.enabled or not getattr(self, name),
                "profile.enabled",
                f"true with profile.{name}",
                self.enabled,
                f"set profile.enabled=true or leave profile.{name} out",
            )
