"""Other systems on the problems of `bench_problems.py`, each at its best setting; see `peer.py`."""

import importlib

from bench_problems import Problem
from peer import Peer, Work
from peers_betty import Betty
from peers_curvlinops import Curvlinops
from peers_hypertorch import HyperTorch
from peers_torchopt import TorchOpt

from ispen_dist.linalg.trees import Tree


class Jax(Peer):
    """The model rewritten in jax.numpy: gradient linearised once, the whole solve compiled.

    See `peers_jax.py`, which is imported on first use because it must come before jax itself. It
    has a gradient of its own, and computes with dense features, as "reference" does.
    """

    name = "jax"
    packages = ("jax", "jaxlib")
    modules = ("peers_jax",)

    def _gradient(self, problem: Problem) -> Work:
        return importlib.import_module("peers_jax").gradient(problem)

    def _product(self, problem: Problem, v: Tree) -> Work:
        return importlib.import_module("peers_jax").product(problem, v)

    def _hypergradient(self, problem: Problem, num_steps: int) -> Work:
        return importlib.import_module("peers_jax").hypergradient(problem, num_steps)


PEERS: dict[str, Peer] = {
    peer.name: peer for peer in (TorchOpt(), Betty(), Curvlinops(), HyperTorch(), Jax())
}
