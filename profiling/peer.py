"""What an adapter of another system has to do, and what adapters share.

Every adapter computes

    dL/dphi = d_phi L - d_phi <d_theta G, q>,     (H + damping I) q = d_theta L

with a fixed number of conjugate-gradient steps from zero, tolerances switched off, so that all run
equally long. What a user would do once per training run (building objects, moving data,
compiling) is done before the callable is returned; what every outer step pays is inside.

An adapter corrects nothing: where a system is wrong, its number is returned as it is.

To add one: derive from `Peer` and add a row to `peers.PEERS`.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import metadata

import torch
from bench_problems import Problem
from torch import Tensor

from ispen_dist.linalg.operators import Loss
from ispen_dist.linalg.trees import Tree
from ispen_dist.ops.choice import using_kernels

Work = Callable[[], Tree]
"""What is timed: no arguments, returns a tree of torch tensors."""


class Peer(ABC):
    """A system under comparison.

    Attributes:
        name: as in the table.
        packages: names under which its releases are installed.
        modules: what must be importable.
        install: how to get it.
        kernels: what operations of the model it runs on, see `ispen_dist.ops.choice`: "auto" where
            it can differentiate ours, which are faster, and "reference" where it cannot.
    """

    name: str
    packages: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    install: str = 'pip install -e ".[peers]"'
    kernels: str = "reference"

    def versions(self) -> str:
        """Return the versions of its packages and of torch, as "name version name version"."""
        return " ".join(f"{name} {metadata.version(name)}" for name in (*self.packages, "torch"))

    def available(self) -> str | None:
        """Return None where the system can be imported, else the reason why not."""
        for module in self.modules:
            try:
                importlib.import_module(module)
            except (ImportError, OSError, RuntimeError) as error:
                return f"{module}: {error}; {self.install}"
        return None

    def gradient(self, problem: Problem) -> Work | None:
        """Return one gradient of G in theta, where the system has its own."""
        return self._told(lambda: self._gradient(problem))

    def product(self, problem: Problem, v: Tree) -> Work | None:
        """Return one exact product `H v` without damping, where the system exposes one.

        The point is fixed and everything that is constant during a solve has been computed.
        """
        return self._told(lambda: self._product(problem, v))

    def hypergradient(self, problem: Problem, num_steps: int) -> Work:
        """Return the whole hypergradient, a tree like phi, with that many steps."""
        work = self._told(lambda: self._hypergradient(problem, num_steps))
        assert work is not None
        return work

    def _gradient(self, problem: Problem) -> Work | None:
        return None

    def _product(self, problem: Problem, v: Tree) -> Work | None:
        return None

    @abstractmethod
    def _hypergradient(self, problem: Problem, num_steps: int) -> Work: ...

    def _told(self, build: Callable[[], Work | None]) -> Work | None:
        """Build work, and have it run, under the system's choice of kernels."""
        with using_kernels(self.kernels):
            work = build()
        if work is None:
            return None

        def told() -> Tree:
            with using_kernels(self.kernels):
                return work()

        return told


def mean_of(loss: Loss) -> Callable[[Tree, Tree], Tensor]:
    """Return a loss of this package as a scalar function."""

    def mean(theta: Tree, phi: Tree) -> Tensor:
        total, count = loss(theta, phi)
        return total / count

    return mean


def outer_gradients(problem: Problem, theta: Tree, phi: Tree) -> tuple[list[Tensor], list[Tensor]]:
    """Return `d_theta L` and `d_phi L` from one backward pass, zeros where nothing depends."""
    leaves = [*theta.values(), *phi.values()]
    value = mean_of(problem.outer())(theta, phi)
    grads = torch.autograd.grad(value, leaves, materialize_grads=True, allow_unused=True)
    return list(grads[: len(theta)]), list(grads[len(theta) :])
