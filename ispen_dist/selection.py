"""The networks that did best on dev since the end of the warm-up."""

from collections.abc import Mapping

from ispen_dist.engine import Engines
from ispen_dist.linalg import trees
from ispen_dist.linalg.trees import Tree


class Selection:
    """Keeps copies of this rank's parts of the best networks.

    Args:
        engines: both networks.
        main: the metric that decides; more is better.
    """

    def __init__(self, engines: Engines, main: str) -> None:
        self._engines, self._main = engines, main
        self.networks: dict[str, Tree] = {}
        self.dev: dict[str, float] = {}
        self.num_stale = 0

    def enter(self, dev: Mapping[str, float]) -> None:
        """Enter an evaluation of the present networks, and copy them if they are the best yet."""
        if self.dev and dev[self._main] <= self.dev[self._main]:
            self.num_stale += 1
            return
        self.dev, self.num_stale = dict(dev), 0
        self.networks = {n: trees.copied(e.parameters()) for n, e in self._engines.items()}

    @property
    def best(self) -> float | None:
        """The deciding metric of the best networks, None before the first evaluation."""
        return self.dev[self._main] if self.dev else None

    def load(self) -> None:
        """Put the best networks in place of the present ones."""
        for name, engine in self._engines.items():
            if name in self.networks:
                engine.load(self.networks[name])
