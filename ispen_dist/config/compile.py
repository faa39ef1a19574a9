"""What is compiled."""

import itertools
from dataclasses import dataclass, field
from typing import Literal

from ispen_dist.config.checks import check


@dataclass(frozen=True)
class CompileConfig:
    """Compiled functions and kernels: the same numbers, faster."""

    inner: bool = False
    """Compile the inner step: forward, energy, backward and optimizer. Not for a bilstm, whose
    shapes depend on lengths, nor under DeepSpeed and FSDP2."""
    whole_round: bool = False
    """With compile.inner, make all inner steps of a round one function that does not return to
    Python in between; compiling it takes longer, the more blocks and steps the longer."""
    curvature: bool = False
    """Compile the curvature, split by what is known when: what depends on the solve point alone is
    computed once per solve. Not for a bilstm."""
    backend: Literal["inductor", "trace"] = "inductor"
    """inductor generates code; trace runs the traced graphs operation by operation, without waiting
    for code, to look for errors."""
    kernels: Literal["auto", "reference", "always"] = "auto"
    """Hand-written kernels: where they are the better choice, nowhere, or wherever they can run
    (also in Triton's interpreter on a CPU, which is slow)."""
    buckets: list[int] = field(default_factory=list)
    """Numbers of tokens to which batches of sequences are padded, increasing, so that there are few
    shapes to compile; longer batches are padded to multiples of the last. Empty: powers of two from
    8 where something is compiled, and no padding otherwise."""

    def __post_init__(self) -> None:
        check(
            all(a < b for a, b in itertools.pairwise([0, *self.buckets])),
            "compile.buckets",
            "increasing positive numbers",
            self.buckets,
        )

    @property
    def any(self) -> bool:
        """Whether something is compiled."""
        return self.inner or self.curvature
