"""What a configuration will cost, counted before anything is trained."""

import torch

from ispen_dist.config import Config
from ispen_dist.data.loading import Splits
from ispen_dist.linalg.trees import num_elements
from ispen_dist.players import build_players

_SOLVER_VECTORS = 5
"""Trees like theta that a solve holds at once: q, r, p, A p and the warm start."""


def describe(config: Config, splits: Splits, num_ranks: int) -> str:
    """Return a few lines: examples, parameters, steps, memory, and bytes communicated.

    Args:
        config: all settings.
        splits: the data sets.
        num_ranks: processes of the run.
    """
    players = build_players(config, splits.codec, torch.device("meta"))
    itemsize = 8 if config.train.dtype == "float64" else 4
    theta, phi = num_elements(players.theta), num_elements(players.phi)
    energy = sum(p.numel() for p in players.energy.parameters())
    train = config.train
    rounds = train.warmup_rounds + train.max_outer_steps
    inner_steps = rounds * config.inner.steps
    epochs = inner_steps * config.inner.batch_size / len(splits.train)
    implicit = train.method == "implicit"
    products = train.max_outer_steps * (config.solver.max_steps + 1) if implicit else 0
    state = itemsize * (4 * theta + energy + 3 * phi)
    vectors = itemsize * _SOLVER_VECTORS * theta if implicit else 0
    sent_inner = itemsize * theta * config.inner.steps
    sent_outer = itemsize * (theta * (config.solver.max_steps + 3) + 2 * phi) if implicit else 0
    test = len(splits.test) if splits.test is not None else 0
    lines = [
        ("examples", f"train {len(splits.train)}, dev {len(splits.dev)}, test {test}"),
        ("parameters", f"theta {theta:,}, phi {phi:,} learned of {energy:,}"),
        (
            "steps",
            f"{rounds} rounds: {inner_steps} inner ({epochs:.1f} epochs), "
            f"{train.max_outer_steps if train.method != 'mle' else 0} outer, "
            f"at most {products} curvature products",
        ),
        (
            "memory per rank",
            f"{_bytes(state)} parameters, gradients and optimizers, "
            f"{_bytes(vectors)} solver vectors, activations besides",
        ),
        ("checkpoint", f"about {_bytes(itemsize * (4 * theta + 2 * energy + 2 * phi))} each"),
        (
            "reduced per round",
            _bytes(sent_inner + sent_outer) if num_ranks > 1 else "nothing, one process",
        ),
    ]
    return "\n".join(f"# {name:18s} {value}" for name, value in lines)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000.0:
            return f"{count:.3g} {unit}"
        count /= 1000.0
    return f"{count:.3g} TB"
