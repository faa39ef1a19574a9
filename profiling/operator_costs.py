"""Arithmetic and memory of recorded operators, from the shapes of their inputs."""

import math
from collections.abc import Iterable

from trace_events import Event

_SIZES = {"double": 8, "float": 4, "half": 2, "c10::Half": 2, "c10::BFloat16": 2, "long": 8,
          "long int": 8, "int": 4, "bool": 1, "unsigned char": 1}  # fmt: skip
# These only make another tensor of the same memory, or memory that nothing was read for.
_MOVES_NOTHING = {
    "aten::view", "aten::as_strided", "aten::transpose", "aten::t", "aten::permute",
    "aten::expand", "aten::slice", "aten::select", "aten::split", "aten::detach", "aten::unsqueeze",
    "aten::squeeze", "aten::reshape", "aten::_reshape_alias", "aten::alias", "aten::empty",
    "aten::empty_strided", "aten::empty_like", "aten::unbind", "detach", "aten::narrow",
    "aten::split_with_sizes", "aten::_unsafe_view", "aten::resize_", "aten::result_type",
    "aten::unflatten", "aten::lift_fresh", "aten::is_nonzero",
}  # fmt: skip
# Position of the two factors among the inputs.
_PRODUCTS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1, "aten::mv": 0,
             "aten::dot": 0, "aten::addmv": 1}  # fmt: skip


def matrix_product_flops(event: Event) -> float:
    """Return the multiplications and additions of a dense matrix product, 0 for all else.

    `aten::addmm` may call `aten::mm`'s kernel but not `aten::mm`, so nothing counts twice. Sparse
    products, fused kernels and element-wise work are left out.
    """
    first = _PRODUCTS.get(event.name)
    shapes = event.args.get("Input Dims")
    if first is None or shapes is None or len(shapes) < first + 2:
        return 0.0
    a, b = shapes[first], shapes[first + 1]
    columns = b[-1] if len(b) == len(a) and len(b) > 1 else 1
    return 2.0 * math.prod(a) * columns


def leaves(events: Iterable[Event]) -> list[Event]:
    """Return the operators that call no other operator on their thread."""
    result: list[Event] = []
    by_thread: dict[object, list[Event]] = {}
    for event in events:
        by_thread.setdefault(event.thread, []).append(event)
    for own in by_thread.values():
        own.sort(key=lambda e: (e.begin, -e.end))
        followers = [*own[1:], None]
        result += [
            e for e, after in zip(own, followers, strict=True)
            if after is None or after.begin >= e.end
        ]  # fmt: skip
    return result


def input_bytes(event: Event) -> int:
    """Return the size of the tensors that an operator reads, as far as shapes were recorded."""
    if event.name in _MOVES_NOTHING:
        return 0
    shapes, types = event.args.get("Input Dims", []), event.args.get("Input type", [])
    return sum(
        math.prod(shape) * _SIZES[kind]
        for shape, kind in zip(shapes, types, strict=False)
        # Scalars have no shape, and lists of tensors lists of shapes.
        if kind in _SIZES and shape and all(isinstance(n, int) for n in shape)
    )
