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

import torch
import triton
import triton.language as tl
from torch import Tensor

from ispen_kernels.launch import launch, part
from ispen_kernels.trees import Layout, Tensors, check_scalar, layout_of

# Columns of partial sums that the second stage reads at a time.
COMBINE_BLOCK = 2048


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


@part
def _base(addresses, chunks, vector, num_tensors, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the address of this program's chunk of one of the vectors."""
    tensor = tl.load(chunks + 3 * tl.program_id(0))
    start = tl.load(chunks + 3 * tl.program_id(0) + 1)
    base = tl.load(addresses + vector * num_tensors + tensor).to(tl.pointer_type(DTYPE)) + start
    if ALIGNED:
        base = tl.multiple_of(base, 16)
    return base


# A mask forbids wide loads, so only the last chunk of a tensor has one (FULL is False there).
@part
def _load(base, count, CHUNK: tl.constexpr, FULL: tl.constexpr):
    i = tl.arange(0, CHUNK)
    return tl.load(base + i) if FULL else tl.load(base + i, mask=i < count, other=0.0)


@part
def _store(base, value, count, CHUNK: tl.constexpr, FULL: tl.constexpr):
    i = tl.arange(0, CHUNK)
    if FULL:
        tl.store(base + i, value)
    else:
        tl.store(base + i, value, mask=i < count)


@part
def _dot_chunk(a, b, count, CHUNK: tl.constexpr, FULL: tl.constexpr):
    return tl.sum(_load(a, count, CHUNK, FULL) * _load(b, count, CHUNK, FULL))


@part
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


@part
def _direction_chunk(p, r, beta, count, CHUNK: tl.constexpr, FULL: tl.constexpr):
    p_new = _load(r, count, CHUNK, FULL) + beta * _load(p, count, CHUNK, FULL)
    _store(p, p_new, count, CHUNK, FULL)


@part
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
        a = _base(addresses, chunks, 2 * pair, num_tensors, DTYPE, ALIGNED)
        b = _base(addresses, chunks, 2 * pair + 1, num_tensors, DTYPE, ALIGNED)
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
    x = _base(addresses, chunks, 0, num_tensors, DTYPE, ALIGNED)
    r = _base(addresses, chunks, 1, num_tensors, DTYPE, ALIGNED)
    p = _base(addresses, chunks, 2, num_tensors, DTYPE, ALIGNED)
    Ap = _base(addresses, chunks, 3, num_tensors, DTYPE, ALIGNED)
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
    p = _base(addresses, chunks, 0, num_tensors, DTYPE, ALIGNED)
    r = _base(addresses, chunks, 1, num_tensors, DTYPE, ALIGNED)
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
    x = _base(addresses, chunks, 0, num_tensors, DTYPE, ALIGNED)
    r = _base(addresses, chunks, 1, num_tensors, DTYPE, ALIGNED)
    p = _base(addresses, chunks, 2, num_tensors, DTYPE, ALIGNED)
    s = _base(addresses, chunks, 3, num_tensors, DTYPE, ALIGNED)
    Ar = _base(addresses, chunks, 4, num_tensors, DTYPE, ALIGNED)
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


def _launch(kernel, layout: Layout, *args: object) -> None:
    """Launch one program for each chunk."""
    launch(
        kernel, (len(layout.chunks),), layout.like.device,
        layout.addresses, layout.chunks, *args, **layout.constants,
    )  # fmt: skip


def _combine(partials: Tensor, like: Tensor) -> Tensor:
    sums = torch.empty(len(partials), dtype=like.dtype, device=like.device)
    launch(
        _combine_kernel, (len(partials),), like.device,
        partials, sums, partials.shape[1], BLOCK=COMBINE_BLOCK,
    )  # fmt: skip
    return sums


def _partials(num_rows: int, layout: Layout) -> Tensor:
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
    layout = layout_of(trees) if trees else None
    if layout is None:
        like = next((tensor for tree in trees.values() for tensor in tree), torch.empty(0))
        return like.new_zeros(len(pairs))
    partials = _partials(len(pairs), layout)
    num_tensors, num_chunks = len(layout.keep[0]), len(layout.chunks)
    _launch(_dots_kernel, layout, partials, num_tensors, len(pairs), num_chunks)
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
    check_scalar("alpha", alpha, x)
    check_scalar("shift", shift, x)
    layout = layout_of({"x": x, "r": r, "p": p, "Ap": Ap}, written=("x", "r"))
    if layout is None:
        return (x[0] if x else alpha).new_zeros(())
    partials = _partials(1, layout)
    _launch(_cg_update_kernel, layout, partials, alpha, shift, len(layout.keep[0]))
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
    check_scalar("beta", beta, p)
    layout = layout_of({"p": p, "r": r}, written=("p",))
    if layout is not None:
        _launch(_direction_update_kernel, layout, beta, len(layout.keep[0]))


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
    check_scalar("alpha", alpha, x)
    check_scalar("beta", beta, x)
    trees = {"x": x, "r": r, "p": p, "s": s, "Ar": Ar}
    layout = layout_of(trees, written=("x", "r", "p", "s"))
    if layout is not None:
        _launch(_single_reduction_update_kernel, layout, alpha, beta, len(layout.keep[0]))
