"""Structured-prediction energy networks trained with exact implicit gradients, at scale."""

from ispen_dist.implicit import Hypergradient, hypergradient, unrolled_hypergradient
from ispen_dist.linalg.operators import ComposedLoss
from ispen_dist.linalg.solution import Solution, Status
from ispen_dist.linalg.solvers import CG, Identity, Neumann, Nystrom, PreconditionedCG, Sama

__all__ = [
    "CG",
    "ComposedLoss",
    "Hypergradient",
    "Identity",
    "Neumann",
    "Nystrom",
    "PreconditionedCG",
    "Sama",
    "Solution",
    "Status",
    "hypergradient",
    "unrolled_hypergradient",
]
