"""The moving average of both networks, which is evaluated and kept in place of the last ones.

After round n it is `avg_n = d avg_{n-1} + (1 - d) (theta_n, phi_n)`, `avg_1` the first networks
(Polyak and Juditsky 1992 average the steps of stochastic gradient descent alike). Outer steps are
noisy: from one evaluation to the next the networks move further than they get better. Training
itself does not see it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ispen_dist.engine import Engines
from ispen_dist.linalg import trees
from ispen_dist.linalg.trees import Tree


class MovingAverage:
    """Averages this rank's parts of both networks.

    Args:
        engines: both networks.
        decay: d, the share that is kept in a round; 0 keeps no average.
    """

    def __init__(self, engines: Engines, decay: float) -> None:
        self._engines, self._decay = engines, decay
        self.networks: dict[str, Tree] = {}

    @torch.no_grad()
    def enter(self) -> None:
        """Enter the networks as a round left them."""
        if not self._decay:
            return
        for name, engine in self._engines.items():
            parameters = engine.parameters()
            if name not in self.networks:
                self.networks[name] = trees.copied(parameters)
                continue
            for key, value in self.networks[name].items():
                value.lerp_(parameters[key], 1.0 - self._decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the averages in place of the networks, which come back as they were."""
        last = {
            name: trees.copied(engine.parameters())
            for name, engine in self._engines.items()
            if name in self.networks
        }
        self._load(self.networks)
        try:
            yield
        finally:
            self._load(last)

    def _load(self, networks: dict[str, Tree]) -> None:
        for name, engine in self._engines.items():
            if name in networks:
                engine.load(networks[name])
