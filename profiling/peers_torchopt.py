"""The adapter of TorchOpt."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from bench_problems import Problem
from peer import Peer, Work, mean_of
from torch import Tensor

from ispen_dist.linalg.trees import Tree, as_leaves


class TorchOpt(Peer):
    """TorchOpt's `custom_root` with its conjugate gradients.

    The Hessian is symmetric, so `solve_cg` serves in place of `solve_normal_cg`, which would take
    two products a step. Its solver multiplies the zero start as well: one product more than steps.
    It differentiates the optimality condition in theta and in phi apart, each with a forward pass.
    The product is the one that it hands to a linear solver; its keyword `solve` gives access.
    It works by torch.func, which refuses our custom operators.
    """

    name = "torchopt"
    packages = ("torchopt",)
    modules = ("torchopt",)

    def _product(self, problem: Problem, v: Tree) -> Work:
        kept: list[Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]] = []

        def solve(matvec: Any, rhs: Any) -> Any:
            kept.append(matvec)
            return rhs

        self._work(problem, solve)()
        direction = tuple(v.values())

        def work() -> Tree:
            with torch.no_grad():  # as in a solve; otherwise it records a graph of the product
                return dict(zip(v, kept[0](direction), strict=True))

        return work

    def _hypergradient(self, problem: Problem, num_steps: int) -> Work:
        from torchopt.linear_solve import solve_cg

        solve = solve_cg(ridge=problem.damping, rtol=0.0, atol=0.0, maxiter=num_steps)
        return self._work(problem, solve)

    def _work(self, problem: Problem, solve: Any) -> Work:
        from torchopt.diff.implicit import custom_root

        # It calls functorch by its old name, once per solve.
        warnings.filterwarnings("ignore", "We've integrated functorch", FutureWarning)
        inner, outer = mean_of(problem.inner()), mean_of(problem.outer())
        names_theta, names_phi = list(problem.theta), list(problem.phi)

        def value(theta: tuple[Tensor, ...], phi: tuple[Tensor, ...]) -> Tensor:
            return inner(
                dict(zip(names_theta, theta, strict=True)), dict(zip(names_phi, phi, strict=True))
            )

        @custom_root(torch.func.grad(value), argnums=1, solve=solve)
        def solution(theta: tuple[Tensor, ...], phi: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return theta

        def work() -> Tree:
            phi = as_leaves(problem.phi)
            theta = solution(tuple(problem.theta.values()), tuple(phi.values()))
            loss = outer(dict(zip(names_theta, theta, strict=True)), phi)
            grads = torch.autograd.grad(loss, list(phi.values()))
            return dict(zip(phi, grads, strict=True))

        return work
