"""Compiled functions by key: each is traced and compiled once for its shapes, never per solve."""

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from ispen_dist import ranges
from ispen_dist.graphs.program import record_call

Compiled = Callable[..., Sequence[Tensor]]
Built = TypeVar("Built")

BACKENDS = ("inductor", "trace")
"""`inductor` generates code; `trace` runs the traced graph operation by operation, to test graphs
and splits without waiting for code."""


@dataclass
class Compiler:
    """Builds compiled functions and remembers them.

    Attributes:
        backend: one of `BACKENDS`.
        report: is told of every function that is compiled, in a line.
        names: of the functions compiled so far.
        seconds: spent on tracing and compiling.
    """

    backend: str = "inductor"
    report: Callable[[str], None] | None = None
    names: list[str] = field(default_factory=list)
    seconds: float = 0.0
    _built: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, key: Hashable, build: Callable[[], Built]) -> Built:
        """Return what `build` returned for the key the first time."""
        if key not in self._built:
            begin = time.perf_counter()
            with ranges.named("compile"):
                self._built[key] = build()
            self.seconds += time.perf_counter() - begin
        return self._built[key]

    def compile(
        self, module: fx.GraphModule, name: str, *, replayed: bool = False
    ) -> "CompiledGraph":
        """Return a pure graph as a function; code is generated at its first call.

        Args:
            module: with shapes that do not change.
            name: for the report.
            replayed: on a GPU, record its launches once and replay them (CUDA graphs). What it
                returned is overwritten by the next call.
        """
        return CompiledGraph(self, module, name, replayed)

    def finished(self, name: str, seconds: float) -> None:
        """Enter one compiled function."""
        self.names.append(name)
        self.seconds += seconds
        if self.report is not None:
            total = f"{len(self.names)} functions, {self.seconds:.0f} s"
            self.report(f"compiled {name} in {seconds:.1f} s ({total})")


class CompiledGraph:
    """A graph whose code is generated at its first call, for the shapes and strides it finds.

    Called while a `Program` is recorded, it becomes a part of that program.
    """

    def __init__(
        self, compiler: Compiler, module: fx.GraphModule, name: str, replayed: bool = False
    ) -> None:
        self._compiler, self._name, self._replayed = compiler, name, replayed
        self._module = module
        self._function: Compiled | None = None

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        """Return the outputs of the graph, without an autograd history."""
        if any(isinstance(x, fx.Proxy) for x in tensors):
            return record_call(self._module, self._name, tensors)
        with torch.no_grad():
            if self._function is None:
                begin = time.perf_counter()
                self._function = self._generate(tensors)
                self._compiler.finished(self._name, time.perf_counter() - begin)
            return self._function(*tensors)

    @ranges.marked("compile")
    def _generate(self, tensors: Sequence[Tensor]) -> Compiled:
        if self._compiler.backend == "trace":
            return self._module
        # Not torch.compile: there is no Python to trace, and nothing to guard. A tensor of another
        # shape or stride raises.
        options = {"triton.cudagraphs": self._replayed and tensors[0].is_cuda}
        return torch._inductor.compile(self._module, list(tensors), options=options)


def spec_of(tensors: Sequence[Tensor]) -> Hashable:
    """Return what a compiled function depends on of its inputs."""
    return tuple((tuple(x.shape), x.stride(), x.dtype, x.device) for x in tensors)
