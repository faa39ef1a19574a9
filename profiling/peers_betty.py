"""The adapter of Betty."""

import torch
from bench_problems import Problem
from peer import Peer, Work, mean_of
from torch import Tensor, nn

from ispen_dist.linalg.trees import Tree


class Betty(Peer):
    """Betty's `ImplicitProblem` with `type="cg"`: its own backward pass of the upper problem.

    Damping is a ridge in the lower problem's loss, as Betty has none of its own; it does not
    enter the mixed derivative. The product is inside its solver and not exposed. Release 0.1.1
    makes each search direction from the old residual, so its directions are not conjugate; later
    ones want Python below 3.11. pip from 24.1 refuses its metadata, so it is in no extra.
    """

    name = "betty"
    packages = ("betty-ml",)
    modules = ("betty",)
    install = 'pip install "pip<24.1" && pip install betty-ml==0.1.1'
    kernels = "auto"

    def _hypergradient(self, problem: Problem, num_steps: int) -> Work:
        from betty.configs import Config
        from betty.problems import ImplicitProblem

        theta, phi = _Values(problem.theta), _Values(problem.phi)
        inner, outer = mean_of(problem.inner()), mean_of(problem.outer())

        def ridged(batch: object) -> Tensor:
            square = torch.stack([(w * w).sum() for w in theta.values]).sum()
            return inner(theta.tree, phi.tree) + 0.5 * problem.damping * square

        device = str(problem.device)
        config = Config(type="cg", cg_iterations=num_steps, cg_alpha=1.0)
        lower = ImplicitProblem("lower", config, module=theta, device=device)
        upper = ImplicitProblem("upper", Config(), module=phi, device=device)
        lower.training_step = ridged
        upper.add_paths([[upper, lower, upper]])

        def work() -> Tree:
            loss = outer(theta.tree, phi.tree)
            upper.backward(loss, upper.trainable_parameters(), upper.paths, retain_graph=True)
            result = {k: p.grad for k, p in phi.tree.items() if p.grad is not None}
            phi.zero_grad()
            return result

        return work


class _Values(nn.Module):
    """A tree as the parameters of a module."""

    def __init__(self, tree: Tree) -> None:
        super().__init__()
        self._names = list(tree)
        self.values = nn.ParameterList([nn.Parameter(v.clone()) for v in tree.values()])

    @property
    def tree(self) -> Tree:
        return dict(zip(self._names, self.values, strict=True))
