"""When two stages are the same function, so that one compiled form serves both.

Equality is by everything a function can read: code, closures, arguments, and for modules their
type, settings, parameter shapes and children. What is not understood, a buffer or an object of an
unknown type, is equal to itself alone: a doubt costs a compilation and never a wrong number.
"""

from collections.abc import Hashable, Mapping
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (str, int, float, bool, type(None), torch.dtype, torch.device, type)


def structure(value: Any) -> Hashable:
    """Return a value that is equal for modules, or callables, of the same structure.

    Names do not enter. Parameters enter by shape, type and whether they are tied to each other.
    """
    return _structure(value, {})


def _structure(value: Any, seen: dict[int, tuple[int, Any]]) -> Hashable:
    if isinstance(value, _PLAIN):
        return type(value).__name__, value
    if isinstance(value, nn.Parameter):
        number, _ = seen.setdefault(id(value), (len(seen), value))
        return "parameter", number, tuple(value.shape), value.dtype, value.requires_grad
    if id(value) in seen:
        return "again", seen[id(value)][0]
    if isinstance(value, Tensor):
        return "tensor", id(value)
    seen[id(value)] = (len(seen), value)  # held, so that no later object has its id
    if isinstance(value, tuple | list):
        return (type(value).__name__, *(_structure(x, seen) for x in value))
    if isinstance(value, Mapping):
        return "mapping", tuple((k, _structure(x, seen)) for k, x in value.items())
    if isinstance(value, partial):
        parts = (value.func, value.args, value.keywords)
        return "partial", tuple(_structure(x, seen) for x in parts)
    if isinstance(value, MethodType):
        return "method", value.__func__.__code__, _structure(value.__self__, seen)
    if isinstance(value, FunctionType):
        cells = tuple(_structure(c.cell_contents, seen) for c in value.__closure__ or ())
        return "function", value.__code__, cells, _structure(value.__defaults__, seen)
    if isinstance(value, nn.Module):
        return _module(value, seen)
    return "object", id(value)


def _module(module: nn.Module, seen: dict[int, tuple[int, Any]]) -> Hashable:
    settings = {k: v for k, v in vars(module).items() if k not in _BASE}
    return (
        type(module),
        tuple((k, _structure(v, seen)) for k, v in settings.items()),
        tuple((k, _structure(p, seen)) for k, p in module._parameters.items()),
        tuple((k, _structure(b, seen)) for k, b in module._buffers.items()),
        tuple((k, _structure(m, seen)) for k, m in module._modules.items()),
    )


_BASE = frozenset(vars(nn.Module()))
"""Attributes of every module: registries, read above, and hooks, which no stage runs under."""
