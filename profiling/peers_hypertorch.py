"""The adapter in the style of hypertorch."""

from collections.abc import Callable, Sequence

import torch
from bench_problems import Problem
from peer import Peer, Work, mean_of, outer_gradients
from torch import Tensor

from ispen_dist.linalg.trees import Tree, as_leaves


class HyperTorch(Peer):
    """Own code in the style of hypertorch (Grazzi et al. 2020), which has no release to install.

    As there, the inner problem is given as a fixed-point map, whose graph is kept; a product is a
    reverse pass through it, and conjugate gradients work on lists of tensors. With the map
    `theta -> theta - (d_theta G + damping theta)`, `I - map'` is the damped Hessian.

    Departures: (1) inner products are sums over tensors and not over one concatenated copy, which
    is faster; (2) the residual is not compared with a tolerance.
    """

    name = "hypertorch"
    kernels = "auto"

    def _product(self, problem: Problem, v: Tree) -> Work:
        theta, mapped = self._fixed_point(problem, as_leaves(problem.phi), damping=0.0)
        return lambda: dict(zip(theta, _minus_map(theta, mapped, list(v.values())), strict=True))

    def _hypergradient(self, problem: Problem, num_steps: int) -> Work:
        def work() -> Tree:
            phi = as_leaves(problem.phi)
            theta, mapped = self._fixed_point(problem, phi, problem.damping)
            rhs, explicit = outer_gradients(problem, theta, phi)
            q = conjugate_gradients(lambda p: _minus_map(theta, mapped, p), rhs, num_steps)
            implicit = torch.autograd.grad(mapped, list(phi.values()), q)
            return {k: e + i for k, e, i in zip(phi, explicit, implicit, strict=True)}

        return work

    def _fixed_point(
        self, problem: Problem, phi: Tree, damping: float
    ) -> tuple[Tree, list[Tensor]]:
        theta = as_leaves(problem.theta)
        value = mean_of(problem.inner())(theta, phi)
        grads = torch.autograd.grad(value, list(theta.values()), create_graph=True)
        scale = 1.0 - damping
        return theta, [scale * w - g for w, g in zip(theta.values(), grads, strict=True)]


def _minus_map(theta: Tree, mapped: list[Tensor], p: list[Tensor]) -> list[Tensor]:
    """Return `(I - map')^T p`."""
    image = torch.autograd.grad(mapped, list(theta.values()), p, retain_graph=True)
    return [a - b for a, b in zip(p, image, strict=True)]


def conjugate_gradients(
    matvec: Callable[[list[Tensor]], list[Tensor]], rhs: Sequence[Tensor], num_steps: int
) -> list[Tensor]:
    """Take that many steps from zero, without a stopping rule (Hestenes and Stiefel 1952)."""
    q = [torch.zeros_like(b) for b in rhs]
    r = p = list(rhs)
    rr = _dot(r, r)
    for _ in range(num_steps):
        Ap = matvec(p)
        alpha = rr / _dot(p, Ap)
        q = [a + alpha * b for a, b in zip(q, p, strict=True)]
        r = [a - alpha * b for a, b in zip(r, Ap, strict=True)]
        rr, rr_old = _dot(r, r), rr
        p = [a + (rr / rr_old) * b for a, b in zip(r, p, strict=True)]
    return q


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    pairs = zip(a, b, strict=True)
    return torch.stack([torch.dot(x.flatten(), y.flatten()) for x, y in pairs]).sum()
