"""Tiles of attention: what its kernels read, multiply and write, as device functions.

A tile is a block of rows of one head, (ROWS, BLOCK_H): the head size is padded to a power of two,
and what lies beyond the head or its rows reads zero. Addresses are 64 bits wide at the start of a
block only: inside it 32 bits are enough, and cheaper.
"""

import math
from typing import Any, NamedTuple

import triton.language as tl

from ispen_kernels.launch import INTERPRETED, part

# The exponent of exp2 is the exponent of exp times this: the hardware has only exp2.
LOG2E = tl.constexpr(math.log2(math.e))
# The interpreter keeps bfloat16 as integers and multiplies those; it must widen before a product.
WIDEN_BFLOAT16 = tl.constexpr(INTERPRETED)
# TF32 would lose 13 bits of every factor, and a linear solve needs them.
FLOAT32_PRODUCT = tl.constexpr("ieee")


class Operand(NamedTuple):
    """A tensor as kernels take it, in any layout, or one head of it; None where there is none."""

    pointer: Any
    strides: Any


class Rows(NamedTuple):
    """The rows of a head and how they are cut: all but the length are known when compiled.

    Attributes:
        length: rows of a head.
        H: head size.
        ROWS: rows of a tile.
        BLOCK_H: columns of a tile.
        RAGGED: whether the last tile reaches beyond the end.
    """

    length: Any
    H: Any
    ROWS: Any
    BLOCK_H: Any
    RAGGED: Any


@part
def owned(rows):
    """Return which head the program works on, over all batch entries, and its first row."""
    num_blocks = (rows.length + rows.ROWS - 1) // rows.ROWS
    return tl.program_id(0) // num_blocks, (tl.program_id(0) % num_blocks) * rows.ROWS


@part
def head(x, index, num_heads):
    """Return one head of an operand; None stays None."""
    if x is None:
        one = None
    else:
        batch_offset = (index // num_heads).to(tl.int64) * x.strides[0]
        head_offset = (index % num_heads).to(tl.int64) * x.strides[1]
        one = Operand(x.pointer + batch_offset + head_offset, x.strides)
    return one


@part
def load(x, start, rows):
    """Load the tile of a head that begins at row `start`; None stays None."""
    if x is None:
        tile = None
    else:
        row = tl.arange(0, rows.ROWS)
        col = tl.arange(0, rows.BLOCK_H)
        base = x.pointer + tl.cast(start, tl.int64) * x.strides[2]
        pointers = base + row[:, None] * x.strides[2] + col[None, :] * x.strides[3]
        if rows.RAGGED and rows.BLOCK_H != rows.H:
            inside = (start + row < rows.length)[:, None] & (col < rows.H)[None, :]
            tile = tl.load(pointers, mask=inside, other=0.0)
        elif rows.RAGGED:
            tile = tl.load(pointers, mask=(start + row < rows.length)[:, None], other=0.0)
        elif rows.BLOCK_H != rows.H:
            tile = tl.load(pointers, mask=(col < rows.H)[None, :], other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@part
def store(pointer, tile, index, start, rows):
    """Store a tile of a contiguous output."""
    row = start + tl.arange(0, rows.ROWS)
    col = tl.arange(0, rows.BLOCK_H)
    base = pointer + tl.cast(index, tl.int64) * rows.length * rows.H
    inside = (row < rows.length)[:, None] & (col < rows.H)[None, :]
    place = row.to(tl.int64)[:, None] * rows.H + col[None, :]
    tl.store(base + place, tile.to(pointer.dtype.element_ty), mask=inside)


@part
def load_statistic(pointer, index, start, rows, OTHER: tl.constexpr):
    """Load a row statistic, one number per row of a tile.

    Rows beyond the end read OTHER: an infinite lse makes all their weights zero.
    """
    row = start + tl.arange(0, rows.ROWS)
    base = pointer + tl.cast(index, tl.int64) * rows.length
    if rows.RAGGED:
        statistic = tl.load(base + row, mask=row < rows.length, other=OTHER)
    else:
        statistic = tl.load(base + row)
    return statistic


@part
def store_statistic(pointer, values, index, start, rows):
    """Store a row statistic."""
    row = start + tl.arange(0, rows.ROWS)
    base = pointer + tl.cast(index, tl.int64) * rows.length
    tl.store(base + row, values, mask=row < rows.length)


@part
def key_offset(bias, batch, start, keys, ACC: tl.constexpr):
    """Return what is added to the scores of keys: the bias, in base 2.

    Minus infinity beyond the end; None where there is nothing to add.
    """
    key = start + tl.arange(0, keys.ROWS)
    if bias is not None:
        pointers = bias.pointer + tl.cast(batch, tl.int64) * bias.strides[0]
        pointers += key.to(tl.int64) * bias.strides[1]
        loaded = tl.load(pointers, mask=key < keys.length, other=float("-inf"))
        offset = loaded.to(ACC) * LOG2E
    elif keys.RAGGED:
        offset = tl.where(key < keys.length, 0.0, float("-inf")).to(ACC)
    else:
        offset = None
    return offset


@part
def dot(a, b, acc):
    """Return acc + a b; float32 is multiplied as float32, not as TF32."""
    if WIDEN_BFLOAT16 and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=FLOAT32_PRODUCT, out_dtype=acc.dtype)


@part
def product(a, b, ACC: tl.constexpr):
    """Return a b^T."""
    return dot(a, tl.trans(b), tl.full((a.shape[0], b.shape[0]), 0.0, ACC))


@part
def product_tangent(a, b, a_dot, b_dot, ACC: tl.constexpr):
    """Return a_dot b^T + a b_dot^T; a direction that is None is zero."""
    c = tl.full((a.shape[0], b.shape[0]), 0.0, ACC)
    if a_dot is not None:
        c = dot(a_dot, tl.trans(b), c)
    if b_dot is not None:
        c = dot(a, tl.trans(b_dot), c)
    return c


@part
def scores(a, b, SCALE: tl.constexpr, ACC: tl.constexpr):
    """Return the scores of a tile of queries and one of keys without a bias, in base 2."""
    return product(a, b, ACC) * (SCALE * LOG2E)


@part
def add_offset(s, offset, KEY_AXIS: tl.constexpr):
    """Add an offset of keys, or None, to scores whose keys lie along KEY_AXIS."""
    if offset is not None:
        s += tl.expand_dims(offset, 1 - KEY_AXIS)
    return s
