"""Losses and networks in stages, their operators, and when two of those are the same."""

import dataclasses
import functools

import problems
import pytest
import torch
from torch import nn

from ispen_dist.graphs.compiler import Compiler
from ispen_dist.graphs.operators import CompiledOperator
from ispen_dist.linalg.layout import Replicas
from ispen_dist.linalg.operators import build_operator
from ispen_dist.linalg.reduction import OneProcess
from ispen_dist.linalg.staged import StagedFunction
from ispen_dist.losses import Losses
from ispen_dist.models.stages import Part, StagedNetwork, stages_at
from ispen_dist.players import build_players, replicated

CURVATURES = ["hessian", "gauss_newton"]
MEMORY = ["states", "recompute"]


def tiny(task, memory="states", dropout=0.0, **energy):
    """Losses of a tiny run with the energy away from zero."""
    config = problems.config_of(task, objective="ssvm", task_weight=1.0)
    net = dataclasses.replace(
        config.inference_net, dropout=dropout, feature_dropout=dropout, num_layers=2
    )
    config = dataclasses.replace(
        config,
        inference_net=net,
        energy=dataclasses.replace(config.energy, **energy),
        solver=dataclasses.replace(config.solver, memory=memory),
    )
    players = build_players(config, problems.codec_of(task), problems.CPU)
    with torch.no_grad():
        for name, value in problems.random_phi(players).items():
            players.phi[name].copy_(value)
    return Losses(players, replicated(players))


def random_like(tree, seed=7):
    draw = torch.Generator().manual_seed(seed)
    return {k: torch.randn(v.shape, generator=draw) for k, v in tree.items()}


def relative(a, b):
    a, b = problems.flatten(a), problems.flatten(b)
    return ((a - b).norm() / b.norm()).item()


def assert_the_same_mixed_product(operator, whole, losses, multiplied):
    """Of any vector, and without a pass of a combination of those that were multiplied."""
    q = random_like(losses.theta(), 3)
    mixed = operator.mixed(q)
    assert list(mixed) == list(losses.phi())
    assert relative(mixed, whole.mixed(q)) < 1e-12
    coefficients = [0.7 - 1.1 * i for i in range(len(multiplied))]
    q = {k: sum(c * v[k] for c, v in zip(coefficients, multiplied, strict=True)) for k in q}
    assert relative(operator.mixed({}, coefficients), whole.mixed(q)) < 1e-12


def assert_the_same_operator(operator, whole, losses):
    """Sums of about a hundred terms in another order: 1e-12 is four digits above roundoff."""
    assert operator.value.item() == pytest.approx(whole.value.item(), rel=1e-12)
    assert list(operator.gradient) == list(whole.gradient)
    assert relative(operator.gradient, whole.gradient) < 1e-12
    directions = [random_like(losses.theta(), seed) for seed in (1, 2)]
    for v in directions:
        assert relative(operator.matvec(v), whole.matvec(v)) < 1e-12
    assert_the_same_mixed_product(operator, whole, losses, directions)
    # A mixed product, which uses the tangent alone, leaves the next product right.
    assert relative(operator.matvec(v), whole.matvec(v)) < 1e-12


TRACED = Compiler("trace")
"""Shared by tests, as a run shares its own: what one of them traces the others use."""
losses_of = functools.cache(tiny)
"""Kept to the end: a compiler knows an output loss by its address."""


def whole_operator(losses, batch, curvature, seed=3):
    torch.manual_seed(seed)
    return build_operator(curvature, losses.inner_graph(batch), losses.theta(), losses.phi())


def compiled_operator(losses, batch, curvature, compiler=TRACED, seed=3):
    torch.manual_seed(seed)
    return CompiledOperator(losses.inner_staged(batch), compiler, curvature)


class Tied(StagedNetwork):
    """A linear layer read twice, with one frozen parameter between."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(3, 3)
        self.scale = nn.Linear(3, 3, bias=False)
        self.scale.weight.requires_grad_(False)

    def parts(self):
        return [
            Part("in", lambda x, *s: (torch.tanh(self.shared(x["x"])),), [self.shared]),
            Part("scale", lambda x, h: (torch.sin(self.scale(h)),), [self.scale]),
            Part("out", lambda x, h: (torch.tanh(self.shared(h)),), [self.shared]),
        ]


class Alone(StagedNetwork):
    """An encoder as a network."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def parts(self):
        return self.encoder.parts()


def staged_of(network, inputs, **settings):
    frozen = frozenset(n for n, p in network.named_parameters() if not p.requires_grad)
    return StagedFunction(
        stages_at(network, inputs, True),
        Replicas(OneProcess()),
        dict(network.named_parameters()),
        frozen=frozen,
        **settings,
    )


class NoPotentials:
    psi: dict = {}  # noqa: RUF012

    def pull_back(self, psi_bar):
        return {}


def square(z, psi, data=None):
    return (torch.exp(z) * z).sum(), 1.0
