"""Vector updates of conjugate gradients over a whole tree, each in one launch.

A *tree* is here a sequence of tensors of any shapes, one of float32 or float64, on one device; the
trees of one call have the same shapes. Kernels find the tensors through a table of addresses and
walk over chunks of them, so a model of hundreds of parameters costs one launch per update:

    dots                       <a_i, b_i> for several pairs
    cg_update_                 x += alpha p,     r -= alpha Ap,  then <r, r>
    direction_update_          p = r + beta p
    single_reduction_update_   p = r + beta p,   s = Ar + beta s,  x += alpha p,  r -= alpha s

`alpha` and `beta` are tensors of shape () on the device: the host is never asked. Inner products
are sums of chunks, each in the type of the tree; chunks are added in float64, in an order that
depends on the shapes alone, so a repeated call returns the same bits.

Order of differentiability: 0, reverse and forward mode alike. A tensor that would be recorded by
autograd is refused; the references can be differentiated where PyTorch allows updates in place.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import forward_ad

Tensors = Sequence[Tensor]

# 8 values of every vector per thread of 8 warps: enough loads in flight to fill the memory pipe of
# an SM, and the five float64 vectors of the largest update still leave room for a second program.
CHUNK = 2048
NUM_WARPS = 8
# Widest load of a thread in bytes; torch allocates at 512, but a view may start anywhere.
ALIGNMENT = 16
# Columns of partial sums that the second stage reads at a time.
COMBINE_BLOCK = 2048

DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


def dots_reference(pairs: Sequence[tuple[Tensors, Tensors]]) -> Tensor:
    """See `dots`."""
    sums = [sum((a * b).sum() for a, b in zip(*pair, strict=True)) for pair in pairs]
    like = next((tensor for pair in pairs for tensor in pair[0]), torch.empty(0))
    return (
        torch.stack([like.new_zeros(()) + value for value in sums]) if sums else like.new_empty(0)
    )


def cg_update_reference(
    x: Tensors, r: Tensors, p: Tensors, Ap: Tensors, alpha: Tensor, shift: Tensor | None = None
) -> Tensor:
    """See `cg_update_`."""
    for x_i, r_i, p_i, Ap_i in zip(x, r, p, Ap, strict=True):
        x_i.addcmul_(p_i, alpha.to(p_i.dtype))
        if shift is not None:
            Ap_i = torch.addcmul(Ap_i, p_i, shift.to(p_i.dtype))
        r_i.addcmul_(Ap_i, -alpha.to(Ap_i.dtype))
    return dots_reference([(r, r)])[0] if len(r) else alpha.new_zeros(())


def direction_update_reference(p: Tensors, r: Tensors, beta: Tensor) -> None:
    """See `direction_update_`."""
    for p_i, r_i in zip(p, r, strict=True):
        torch.addcmul(r_i, p_i, beta.to(p_i.dtype), out=p_i)


def single_reduction_update_reference(
    x: Tensors, r: Tensors, p: Tensors, s: Tensors, Ar: Tensors, alpha: Tensor, beta: Tensor
) -> None:
    """See `single_reduction_update_`."""
    direction_update_reference(p, r, beta)
    direction_update_reference(s, Ar, beta)
    for x_i, r_i, p_i, s_i in zip(x, r, p, s, strict=True):
        x_i.addcmul_(p_i, alpha.to(p_i.dtype))
        r_i.addcmul_(s_i, -alpha.to(s_i.dtype))


@triton.jit
def _base(
    addresses, chunks, vector, num_tensors, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Return the address of this program's chunk of one of the vectors."""
    tensor = tl.load(chunks + 3 * tl.program_id(0))
    start = tl.load(chunks + 3 * tl.program_id(0) + 1)
    base = tl.load(addresses + vector * num_tensors + tensor).to(tl.pointer_type(DTYPE)) + start
    if ALIGNED:
        base = tl.multiple_of(base, 16)
    return base


# A mask forbids wide loads, so only the last chunk of a tensor has one (FULL is False there).
@triton.jit
def _load(base, count, CHUNK: tl.constexpr, FULL: tl.constexpr):
    i = tl.arange(0, CHUNK)
    return tl.load(base + i) if FULL else tl.load(base + i, mask=i < count, other=0.0)


@triton.jit
def _store(base, value, count, CHUNK: tl.constexpr, FULL: tl.constexpr):
    i = tl.arange(0, CHUNK)
    if FULL:
        tl.store(base + i, value)
    else:
        tl.store(base + i, value, mask=i < count)


@triton.jit
def _dot_chunk(a, b, count, CHUNK: tl.constexpr, FULL: tl.constexpr):
    return tl.sum(_load(a, count, CHUNK, FULL) * _load(b, count, CHUNK, FULL))


@triton.jit
def _cg_chunk(x, r, p, Ap, alpha, shift, count, CHUNK: tl.constexpr, FULL: tl.constexpr):
    # Loads first: the compiler must not move one above a store that might be to the same place.
    along = _load(p, count, CHUNK, FULL)
    x_new = _load(x, count, CHUNK, FULL) + alpha * along
    product = _load(Ap, count, CHUNK, FULL) + shift * along
    r_new = _load(r, count, CHUNK, FULL) - alpha * product
    _store(x, x_new, count, CHUNK, FULL)
    _store(r, r_new, count, CHUNK, FULL)
    # Beyond the end, 0 - alpha * 0 is NaN where alpha is not finite, and then so is the sum.
    return tl.sum(r_new * r_new)


@triton.jit
def _direction_chunk(p, r, beta, count, CHUNK: tl.constexpr, FULL: tl.constexpr):
    p_new = _load(r, count, CHUNK, FULL) + beta * _load(p, count, CHUNK, FULL)
    _store(p, p_new, count, CHUNK, FULL)


@triton.jit
def _single_reduction_chunk(
    x, r, p, s, Ar, alpha, beta, count, CHUNK: tl.constexpr, FULL: tl.constexpr
):
    r_old = _load(r, count, CHUNK, FULL)
    p_new = r_old + beta * _load(p, count, CHUNK, FULL)
    s_new = _load(Ar, count, CHUNK, FULL) + beta * _load(s, count, CHUNK, FULL)
    x_new = _load(x, count, CHUNK, FULL) + alpha * p_new
    _store(p, p_new, count, CHUNK, FULL)
    _store(s, s_new, count, CHUNK, FULL)
    _store(x, x_new, count, CHUNK, FULL)
    _store(r, r_old - alpha * s_new, count, CHUNK, FULL)


# The pairs of a chunk follow each other in one program, so that a vector that stands in several
# pairs is read from memory once and from the cache afterwards.
@triton.jit(do_not_specialize=["num_tensors", "num_pairs", "num_chunks"])
def _dots_kernel(
    addresses, chunks, partials, num_tensors, num_pairs, num_chunks,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    count = tl.load(chunks + 3 * tl.program_id(0) + 2)
    for pair in range(num_pairs):
        a = _base(addresses, chunks, 2 * pair, num_tensors, DTYPE, ALIGNED, CHUNK)
        b = _base(addresses, chunks, 2 * pair + 1, num_tensors, DTYPE, ALIGNED, CHUNK)
        if count == CHUNK:
            part = _dot_chunk(a, b, count, CHUNK, True)
        else:
            part = _dot_chunk(a, b, count, CHUNK, False)
        tl.store(partials + pair * num_chunks + tl.program_id(0), part.to(tl.float64))


@triton.jit(do_not_specialize=["num_tensors"])
def _cg_update_kernel(
    addresses, chunks, partials, alpha_ptr, shift_ptr, num_tensors,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    count = tl.load(chunks + 3 * tl.program_id(0) + 2)
    alpha = tl.load(alpha_ptr).to(DTYPE)
    shift = tl.load(shift_ptr).to(DTYPE)
    x = _base(addresses, chunks, 0, num_tensors, DTYPE, ALIGNED, CHUNK)
    r = _base(addresses, chunks, 1, num_tensors, DTYPE, ALIGNED, CHUNK)
    p = _base(addresses, chunks, 2, num_tensors, DTYPE, ALIGNED, CHUNK)
    Ap = _base(addresses, chunks, 3, num_tensors, DTYPE, ALIGNED, CHUNK)
    if count == CHUNK:
        part = _cg_chunk(x, r, p, Ap, alpha, shift, count, CHUNK, True)
    else:
        part = _cg_chunk(x, r, p, Ap, alpha, shift, count, CHUNK, False)
    tl.store(partials + tl.program_id(0), part.to(tl.float64))


@triton.jit(do_not_specialize=["num_tensors"])
def _direction_update_kernel(
    addresses, chunks, beta_ptr, num_tensors,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    count = tl.load(chunks + 3 * tl.program_id(0) + 2)
    beta = tl.load(beta_ptr).to(DTYPE)
    p = _base(addresses, chunks, 0, num_tensors, DTYPE, ALIGNED, CHUNK)
    r = _base(addresses, chunks, 1, num_tensors, DTYPE, ALIGNED, CHUNK)
    if count == CHUNK:
        _direction_chunk(p, r, beta, count, CHUNK, True)
    else:
        _direction_chunk(p, r, beta, count, CHUNK, False)


@triton.jit(do_not_specialize=["num_tensors"])
def _single_reduction_update_kernel(
    addresses, chunks, alpha_ptr, beta_ptr, num_tensors,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    count = tl.load(chunks + 3 * tl.program_id(0) + 2)
    alpha = tl.load(alpha_ptr).to(DTYPE)
    beta = tl.load(beta_ptr).to(DTYPE)
    x = _base(addresses, chunks, 0, num_tensors, DTYPE, ALIGNED, CHUNK)
    r = _base(addresses, chunks, 1, num_tensors, DTYPE, ALIGNED, CHUNK)
    p = _base(addresses, chunks, 2, num_tensors, DTYPE, ALIGNED, CHUNK)
    s = _base(addresses, chunks, 3, num_tensors, DTYPE, ALIGNED, CHUNK)
    Ar = _base(addresses, chunks, 4, num_tensors, DTYPE, ALIGNED, CHUNK)
    if count == CHUNK:
        _single_reduction_chunk(x, r, p, s, Ar, alpha, beta, count, CHUNK, True)
    else:
        _single_reduction_chunk(x, r, p, s, Ar, alpha, beta, count, CHUNK, False)


@triton.jit(do_not_specialize=["num_chunks"])
def _combine_kernel(partials, sums, num_chunks, BLOCK: tl.constexpr):
    row = partials + tl.program_id(0).to(tl.int64) * num_chunks
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, num_chunks, BLOCK):
        column = start + tl.arange(0, BLOCK)
        total += tl.load(row + column, mask=column < num_chunks, other=0.0)
    tl.store(sums + tl.program_id(0), tl.sum(total).to(sums.dtype.element_ty))


class _Layout(NamedTuple):
    """Everything that a launch needs to know about its trees."""

    addresses: Tensor  # (vectors, tensors) int64, without empty tensors
    chunks: Tensor  # (chunks, 3) int64: tensor, first element, number of elements
    like: Tensor
    aligned: bool
    keep: list[list[Tensor]]  # copies must live until the launch is queued

    @property
    def constants(self) -> dict[str, object]:
        """The compile-time arguments of a chunked kernel."""
        dtype = DTYPES[self.like.dtype]
        return {"DTYPE": dtype, "ALIGNED": self.aligned, "CHUNK": CHUNK, "num_warps": NUM_WARPS}


def _upload(host: Tensor, device: torch.device) -> Tensor:
    """Copy without a synchronisation: the pinned buffer is kept by PyTorch until it was read."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


# Both tables are functions of their keys alone, so a stale entry is never a wrong one. The stream
# is a key because the copy is ordered on it.
@lru_cache(maxsize=256)
def _address_table(addresses: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    return _upload(torch.tensor(addresses, dtype=torch.int64, device="cpu"), device)


@lru_cache(maxsize=32)
def _chunk_map(sizes: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    size = torch.tensor(sizes, dtype=torch.int64, device="cpu")
    num_chunks = (size + CHUNK - 1) // CHUNK
    tensor = torch.repeat_interleave(num_chunks)
    first = (num_chunks.cumsum(0) - num_chunks)[tensor]
    start = (torch.arange(len(tensor), device="cpu") - first) * CHUNK
    count = (size[tensor] - start).clamp(max=CHUNK)
    return _upload(torch.stack([tensor, start, count], dim=1).contiguous(), device)


def _refuse(name: str, expected: str, got: object, do: str) -> None:
    raise ValueError(f"{name}: expected {expected}, got {got}; {do}")


def _check(name: str, tree: Tensors, like_name: str, like: Tensors) -> None:
    """Raise unless `tree` fits `like` and no derivative is asked for."""
    if len(tree) != len(like):
        _refuse(name, f"{len(like)} tensors as in {like_name}", len(tree), "pass equal trees")
    first = like[0] if like else None
    for i, (a, b) in enumerate(zip(tree, like, strict=True)):
        if a.shape != b.shape:
            _refuse(f"{name}[{i}]", f"shape {tuple(b.shape)}", tuple(a.shape), "pass equal trees")
        if a.dtype != first.dtype or a.dtype not in DTYPES:
            _refuse(f"{name}[{i}]", "float32 or float64, one for all", a.dtype, "cast the trees")
        if a.device != first.device:
            _refuse(f"{name}[{i}]", f"device {first.device}", a.device, "move the trees together")
        if (a.requires_grad and torch.is_grad_enabled()) or _has_tangent(a):
            raise RuntimeError(
                f"{name}[{i}]: expected no autograd, as the update has no derivative, got a tensor "
                "that is recorded; detach it, enter torch.no_grad() or call the reference"
            )


def _has_tangent(a: Tensor) -> bool:
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(a).tangent is not None


def _check_written(trees: dict[str, Tensors], written: Sequence[str]) -> None:
    """Raise unless written tensors are contiguous and share memory with no other one."""
    for name in written:
        for i, tensor in enumerate(trees[name]):
            if not tensor.is_contiguous():
                _refuse(
                    f"{name}[{i}]",
                    "a contiguous tensor, as it is written in place",
                    f"strides {tensor.stride()}",
                    "call .contiguous() before the solve",
                )
    starts: dict[int, str] = {}
    for name, tree in trees.items():
        for i, tensor in enumerate(tree):
            other = starts.setdefault(tensor.data_ptr(), name) if tensor.numel() else name
            if other != name and (name in written or other in written):
                _refuse(f"{name}[{i}]", f"memory of its own, as {' and '.join(written)} change",
                        f"a tensor that begins where one of {other} does", "clone it")  # fmt: skip


def _check_scalar(name: str, value: Tensor, like: Tensors) -> None:
    fits = value.shape == () and (not like or value.device == like[0].device)
    if not fits or value.dtype not in DTYPES:
        _refuse(
            name,
            "a float32 or float64 tensor of shape () on the device of the trees",
            f"{value.dtype} {tuple(value.shape)} on {value.device}",
            "move or reshape it",
        )
    if (value.requires_grad and torch.is_grad_enabled()) or _has_tangent(value):
        raise RuntimeError(f"{name}: expected no autograd, got a recorded tensor; detach it")


def _layout(trees: dict[str, Tensors], written: Sequence[str] = ()) -> _Layout | None:
    """Check the trees and return their tables; None where they hold no element."""
    like_name, like = next(iter(trees.items()))
    for name, tree in trees.items():
        _check(name, tree, like_name, like)
    _check_written(trees, written)
    keep = [[tensor.contiguous() for tensor in tree if tensor.numel()] for tree in trees.values()]
    if not keep[0]:
        return None
    device = keep[0][0].device
    if device.type != "cuda" and isinstance(_combine_kernel, triton.JITFunction):
        _refuse(
            like_name,
            "tensors on a GPU",
            device,
            "move them, call the reference, or set TRITON_INTERPRET=1 before the import",
        )
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    addresses = tuple(tensor.data_ptr() for tree in keep for tensor in tree)
    return _Layout(
        _address_table(addresses, device, stream),
        _chunk_map(tuple(tensor.numel() for tensor in keep[0]), device, stream),
        keep[0][0],
        all(address % ALIGNMENT == 0 for address in addresses),
        keep,
    )


def _on(device: torch.device) -> object:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _combine(partials: Tensor, like: Tensor) -> Tensor:
    sums = torch.empty(len(partials), dtype=like.dtype, device=like.device)
    _combine_kernel[(len(partials),)](partials, sums, partials.shape[1], BLOCK=COMBINE_BLOCK)
    return sums


def _partials(num_rows: int, layout: _Layout) -> Tensor:
    shape = (num_rows, len(layout.chunks))
    return torch.empty(shape, dtype=torch.float64, device=layout.like.device)


def dots(pairs: Sequence[tuple[Tensors, Tensors]]) -> Tensor:
    """Compute the inner products of several pairs of trees in one launch and one small sum.

    Args:
        pairs: n pairs of trees; all 2n trees have the same shapes. Strided tensors are copied.

    Returns:
        Tensor (n,) of the type of the trees. Differentiable to order 0: raises on recorded tensors.

    Raises:
        ValueError: where shapes, types or devices differ.
        RuntimeError: where autograd would record the call.
    """
    names = ("pairs[{}][0]", "pairs[{}][1]")
    trees = {
        n.format(i): t for i, pair in enumerate(pairs) for n, t in zip(names, pair, strict=True)
    }
    layout = _layout(trees) if trees else None
    if layout is None:
        like = next((tensor for tree in trees.values() for tensor in tree), torch.empty(0))
        return like.new_zeros(len(pairs))
    partials = _partials(len(pairs), layout)
    with _on(layout.like.device):
        _dots_kernel[(len(layout.chunks),)](
            layout.addresses, layout.chunks, partials, len(layout.keep[0]), len(pairs),
            len(layout.chunks), **layout.constants,
        )  # fmt: skip
        return _combine(partials, layout.like)


def cg_update_(
    x: Tensors, r: Tensors, p: Tensors, Ap: Tensors, alpha: Tensor, shift: Tensor | None = None
) -> Tensor:
    """Step along `p` in place, `x += alpha p`, `r -= alpha (Ap + shift p)`, in one pass.

    Args:
        x: iterate, contiguous, changed in place.
        r: residual, contiguous, changed in place; shares no memory with the others.
        p: direction.
        Ap: its product.
        alpha: step length, shape (); one that is not finite makes every result NaN or infinite.
        shift: added to the diagonal of A, shape (); None is 0.

    Returns:
        `<r, r>` after the step, shape (), of the type of the trees. Differentiable to order 0.

    Raises:
        ValueError: where shapes, types, devices or strides do not fit.
        RuntimeError: where autograd would record the call.
    """
    shift = alpha.new_zeros(()) if shift is None else shift
    _check_scalar("alpha", alpha, x)
    _check_scalar("shift", shift, x)
    layout = _layout({"x": x, "r": r, "p": p, "Ap": Ap}, written=("x", "r"))
    if layout is None:
        return (x[0] if x else alpha).new_zeros(())
    partials = _partials(1, layout)
    with _on(layout.like.device):
        _cg_update_kernel[(len(layout.chunks),)](
            layout.addresses, layout.chunks, partials, alpha, shift, len(layout.keep[0]),
            **layout.constants,
        )  # fmt: skip
        return _combine(partials, layout.like)[0]


def direction_update_(p: Tensors, r: Tensors, beta: Tensor) -> None:
    """Turn the direction in place, `p = r + beta p`.

    Args:
        p: direction, contiguous, changed in place; shares no memory with `r`.
        r: residual.
        beta: shape ().

    Raises:
        ValueError: where shapes, types, devices or strides do not fit.
        RuntimeError: where autograd would record the call (differentiable to order 0).
    """
    _check_scalar("beta", beta, p)
    layout = _layout({"p": p, "r": r}, written=("p",))
    if layout is None:
        return
    with _on(layout.like.device):
        _direction_update_kernel[(len(layout.chunks),)](
            layout.addresses, layout.chunks, beta, len(layout.keep[0]), **layout.constants
        )


def single_reduction_update_(
    x: Tensors, r: Tensors, p: Tensors, s: Tensors, Ar: Tensors, alpha: Tensor, beta: Tensor
) -> None:
    """Do the four updates of an iteration of Chronopoulos and Gear (1989) in place, in one pass.

    In this order: `p = r + beta p`, `s = Ar + beta s`, `x += alpha p`, `r -= alpha s`.

    Args:
        x: iterate, contiguous, changed in place.
        r: residual, likewise; the four changed trees share no memory.
        p: direction, likewise.
        s: its product with A, likewise.
        Ar: product of A with the residual.
        alpha: step length, shape ().
        beta: shape ().

    Raises:
        ValueError: where shapes, types, devices or strides do not fit.
        RuntimeError: where autograd would record the call (differentiable to order 0).
    """
    _check_scalar("alpha", alpha, x)
    _check_scalar("beta", beta, x)
    trees = {"x": x, "r": r, "p": p, "s": s, "Ar": Ar}
    layout = _layout(trees, written=("x", "r", "p", "s"))
    if layout is None:
        return
    with _on(layout.like.device):
        _single_reduction_update_kernel[(len(layout.chunks),)](
            layout.addresses, layout.chunks, alpha, beta, len(layout.keep[0]), **layout.constants
        )
