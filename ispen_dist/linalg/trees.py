"""Arithmetic on parameter trees, `dict[str, Tensor]` with the same keys and shapes."""

from collections.abc import Sequence

import torch
from torch import Tensor

Tree = dict[str, Tensor]


def dots(pairs: Sequence[tuple[Tree, Tree]]) -> Tensor:
    """Compute the inner products of several pairs of trees.

    Args:
        pairs: `n` pairs of trees with equal keys and shapes.

    Returns:
        Tensor of shape `(n,)`. A solver asks for all the products of one iteration in one call, so
        that a sharded layout can answer with a single all-reduce.
    """
    return torch.stack([_dot(a, b) for a, b in pairs])


def _dot(a: Tree, b: Tree) -> Tensor:
    return torch.stack([torch.dot(a[k].flatten(), b[k].flatten()) for k in a]).sum()


def add_scaled(y: Tree, scale: float | Tensor, x: Tree) -> Tree:
    """Return `y + scale * x` as a new tree, in one pass over memory."""
    if isinstance(scale, Tensor):
        return {key: torch.addcmul(y[key], x[key], scale) for key in y}
    return {key: torch.add(y[key], x[key], alpha=scale) for key in y}


def scaled(x: Tree, scale: float | Tensor) -> Tree:
    """Return `scale * x` as a new tree."""
    return dict(zip(x, torch._foreach_mul(list(x.values()), scale), strict=True))


def divided(x: Tree, y: Tree) -> Tree:
    """Return the quotients `x / y` entry by entry as a new tree with the keys of `x`."""
    return {key: value / y[key] for key, value in x.items()}


def random_like(x: Tree, generator: torch.Generator) -> Tree:
    """Return standard normal entries like `x` from a generator of the CPU, on any device alike."""
    return {
        key: torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
        for key, value in x.items()
    }


def copied(x: Tree) -> Tree:
    """Return a tree of copies that lie in memory as `x` does."""
    return {key: value.detach().clone() for key, value in x.items()}


def zeros_like(x: Tree) -> Tree:
    """Return a tree of zeros with the keys, shapes, types and devices of `x`."""
    return {key: torch.zeros_like(value) for key, value in x.items()}


def norm(x: Tree) -> Tensor:
    """Return the Euclidean norm over all entries of the tree, a tensor of shape `()`."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(x.values()))))


def as_leaves(x: Tree) -> Tree:
    """Return a tree that shares storage with `x` and starts a new autograd graph."""
    return {key: value.detach().requires_grad_() for key, value in x.items()}


def detached(x: Tree) -> Tree:
    """Return a tree that shares storage with `x` and carries no autograd history."""
    return {key: value.detach() for key, value in x.items()}


def num_elements(x: Tree) -> int:
    """Count the scalars in the tree."""
    return sum(value.numel() for value in x.values())
