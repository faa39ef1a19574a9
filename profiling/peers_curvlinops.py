"""The adapter of curvlinops."""

import copy
import warnings
from typing import Any

import torch
from bench_problems import Problem
from peer import Peer, Work, mean_of, outer_gradients
from torch import Tensor, nn

from ispen_dist.linalg.trees import Tree, add_scaled, as_leaves


class Curvlinops(Peer):
    """curvlinops' Hessian operator and its inverse by conjugate gradients.

    Its product is forward over reverse mode and rebuilt every time, forward pass included. The
    energy's potentials do not depend on theta, so they are computed once per solve and not once
    per product. Its probe for determinism is off, and so are the three limits at which its solver
    would stop updating early; it multiplies the zero start as well, one product more than steps.
    It has no hypergradient: both ends are plain automatic differentiation. It works by torch.func,
    like TorchOpt.

    Through layer norm its products are wrong in the rows of the norms' weights (torch 2.13, also in
    float64: 0.05 to 0.4 of the row): forward mode over `jacrev` is, over `torch.func.grad` is not.
    """

    name = "curvlinops"
    packages = ("curvlinops-for-pytorch", "linear_operator")
    modules = ("curvlinops",)

    def _product(self, problem: Problem, v: Tree) -> Work:
        operator, direction = self._operator(problem, _network(problem)), list(v.values())
        return lambda: dict(zip(v, operator @ direction, strict=True))

    def _hypergradient(self, problem: Problem, num_steps: int) -> Work:
        from curvlinops import CGInverseLinearOperator
        from curvlinops.examples import IdentityLinearOperator

        shapes = [tuple(w.shape) for w in problem.theta.values()]
        ridge = problem.damping * IdentityLinearOperator(shapes, problem.device, problem.dtype)
        network = _network(problem)
        # In units of its normalised right-hand side; an eps of zero could divide by zero.
        limits = {"tolerance": 0.0, "stop_updating_after": 0.0, "eps": 1e-30}
        steps = {"max_iter": num_steps, "max_tridiag_iter": 0}

        def work() -> Tree:
            theta, phi = as_leaves(problem.theta), as_leaves(problem.phi)
            rhs, explicit = outer_gradients(problem, theta, phi)
            A = self._operator(problem, network) + ridge
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the tolerance of zero was not reached
                q = CGInverseLinearOperator(A, **steps, **limits) @ rhs
            value = mean_of(problem.inner())(theta, phi)
            gradient = torch.autograd.grad(value, list(theta.values()), create_graph=True)
            mixed = torch.autograd.grad(gradient, list(phi.values()), q)
            return add_scaled(
                dict(zip(phi, explicit, strict=True)), -1.0, dict(zip(phi, mixed, strict=True))
            )

        return work

    def _operator(self, problem: Problem, network: nn.Module) -> Any:
        from curvlinops import HessianLinearOperator

        parameters = dict(network.named_parameters())
        size = len(problem.batch.weight)
        return HessianLinearOperator(
            network,
            _OutputLoss(problem),
            [parameters[name] for name in problem.theta],
            [(problem.batch.inputs, problem.batch.target)],
            check_deterministic=False,
            num_data=size,
            batch_size_fn=lambda inputs: size,
        )


def _network(problem: Problem) -> nn.Module:
    """Return a copy of the inference network that holds theta."""
    network = copy.deepcopy(problem.players.inference_net)
    network.load_state_dict(problem.theta)
    return network


class _OutputLoss(nn.Module):
    """G as a function of the logits, at potentials that are computed once."""

    reduction = "mean"

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self._batch, self._phi, self._losses = problem.batch, problem.phi, problem.losses
        with torch.no_grad():
            self._potentials = problem.players.potentials(problem.batch, problem.phi)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        total, count = self._losses.inner_output(self._batch, logits, self._potentials, self._phi)
        return total / count
