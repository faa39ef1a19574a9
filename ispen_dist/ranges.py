"""Named ranges of time that a profiler sees: the one door through which code names what it does.

Nothing is recorded until `use` is given what makes a range; a run that is not profiled enters the
same empty context everywhere and never calls a profiler.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, ParamSpec, TypeVar, get_args

P = ParamSpec("P")
R = TypeVar("R")

Name = Literal[
    "data", "inner step", "pretraining step", "outer step", "probe", "outer gradient", "curvature",
    "solve", "product", "mixed product", "energy update", "all-reduce", "all-gather",
    "reduce-scatter", "broadcast", "barrier", "compile", "evaluation", "checkpoint", "records",
]  # fmt: skip

NAMES: tuple[str, ...] = get_args(Name)
"""All ranges. `solve` without its products and reductions is the solver's vector updates;
`curvature` is what an operator computes once per solve."""

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "broadcast", "barrier")
"""Ranges in which a rank waits for the others."""

Begin = Callable[[str], AbstractContextManager[Any]]

_NOTHING: AbstractContextManager[Any] = nullcontext()
_begin: Begin | None = None


def use(begin: Begin | None) -> None:
    """Make ranges by a function of the name from now on, such as `torch.profiler.record_function`.

    Args:
        begin: returns a context manager; None ends the recording.
    """
    global _begin
    _begin = begin


def named(name: Name) -> AbstractContextManager[Any]:
    """Return a context that is the range of the given name, if ranges are recorded."""
    return _NOTHING if _begin is None else _begin(name)


def marked(name: Name) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make every call of a function a range.

    Example:
        >>> @marked("data")
        ... def read() -> int:
        ...     return 3
        >>> read()
        3
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if _begin is None:
                return function(*args, **kwargs)
            with _begin(name):
                return function(*args, **kwargs)

        return call

    return decorate
