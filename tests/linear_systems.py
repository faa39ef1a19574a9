"""Small symmetric systems for the tests of solvers, and an arithmetic that counts."""

import math

import torch

from ispen_dist.linalg.vectors import Vectors

ONES = {"w": torch.ones(3, dtype=torch.float64)}
METRIC = {"w": torch.tensor([1.0, 4.0, 0.2], dtype=torch.float64)}


def diagonal(*entries):
    d = torch.tensor(entries)
    return lambda v: {"w": d * v["w"]}


def spectrum(condition):
    """A symmetric positive definite matrix of size 40, and a right-hand side."""
    draw = torch.Generator().manual_seed(4)
    Q, _ = torch.linalg.qr(torch.randn(40, 40, generator=draw))
    A = (Q * torch.logspace(0, math.log10(condition), 40)) @ Q.T
    return (A + A.T) / 2, {"w": torch.randn(40, generator=draw)}


def positive_like(tree, seed=5):
    """Entries from 0.1 to 10, as the second moments of an optimizer spread."""
    draw = torch.Generator().manual_seed(seed)
    return {k: 10.0 ** (2.0 * torch.rand(v.shape, generator=draw) - 1.0) for k, v in tree.items()}


def counting_vectors():
    """Arithmetic of one process, and the number of inner products of every reduction."""
    calls = []

    def counted(products):
        calls.append(products.numel())
        return products

    return Vectors(reduce=counted), calls
