"""Which stages share a compiled function, and which must not."""

import problems
import pytest
import torch
from staged import (
    Alone,
    NoPotentials,
    assert_the_same_operator,
    compiled_operator,
    random_like,
    relative,
    square,
    staged_of,
    tiny,
    whole_operator,
)
from torch import nn

from ispen_dist.graphs.compiler import Compiler
from ispen_dist.graphs.operators import CompiledOperator
from ispen_dist.linalg.staged_operators import StagedLoss, build_staged_operator
from ispen_dist.losses import Losses
from ispen_dist.models.encoders import TransformerBlock, TransformerEncoder
from ispen_dist.models.stages import Part, StagedNetwork, stages_at
from ispen_dist.models.structure import structure
from ispen_dist.players import build_players, replicated

pytestmark = pytest.mark.usefixtures("float64")


def transformer_losses(num_layers: int, dropout: float = 0.0) -> Losses:
    """Losses of a transformer of some blocks, wide enough for two heads."""
    config = problems.tagging_config("transformer", objective="ssvm", task_weight=1.0)
    net = config.inference_net
    for name, value in {"num_layers": num_layers, "hidden_size": 4, "dropout": dropout}.items():
        object.__setattr__(net, name, value)
    players = build_players(config, problems.tagging_codec(), problems.CPU)
    return Losses(players, replicated(players))


def compiled_by(losses, batch, compiler):
    """Return the names of the functions that a solve compiles."""
    before = len(compiler.names)
    operator = compiled_operator(losses, batch, "hessian", compiler)
    operator.mixed(operator.matvec(random_like(losses.theta())))
    return compiler.names[before:]


def test_five_blocks_compile_as_many_functions_as_two():
    batch, compiler = problems.random_batch("transformer", 3, 0), Compiler("trace")
    two, five = (transformer_losses(n, 0.2) for n in (2, 5))
    names = compiled_by(two, batch, compiler)
    assert len(names) == 5 * 4 + 3  # embedding, projection, block, norm, output; the loss
    # The others hold their network, which has another number of blocks.
    assert len(compiled_by(five, batch, compiler)) == len(names) - 4
    assert len([name for name in compiler.names if "blocks" in name]) == 4


def test_a_second_solve_of_the_same_shapes_compiles_nothing():
    losses, compiler = tiny("multilabel", dropout=0.2), Compiler("trace")
    assert compiled_by(losses, problems.random_batch("multilabel", 3, 0), compiler)
    with torch.no_grad():
        for p in losses.theta().values():
            p.add_(0.1)
    again, other = (problems.random_batch("multilabel", size, 5) for size in (3, 4))
    assert compiled_by(losses, again, compiler) == []
    whole = whole_operator(losses, again, "hessian")
    assert_the_same_operator(compiled_operator(losses, again, "hessian", compiler), whole, losses)
    assert compiled_by(losses, other, compiler)


@pytest.mark.parametrize("other", [(8, 2, 0.1), (4, 1, 0.1), (4, 2, 0.3)])
def test_unlike_blocks_are_not_shared(other):
    assert structure(TransformerBlock(4, 2, 0.1)) == structure(TransformerBlock(4, 2, 0.1))
    assert structure(TransformerBlock(*other)) != structure(TransformerBlock(4, 2, 0.1))


def test_training_and_evaluation_are_not_shared():
    network, inputs = Alone(TransformerEncoder(4, 4, 2, 2, 0.1)), {}
    first, second = stages_at(network, inputs, True)[1:3]
    assert first.signature() == second.signature()
    assert first.signature() != stages_at(network, inputs, False)[1].signature()


def test_a_frozen_or_tied_parameter_is_not_shared():
    plain, frozen, tied = (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(3))
    frozen[0].weight.requires_grad_(False)
    tied[1].weight = tied[0].weight
    assert len({structure(m) for m in (plain, frozen, tied)}) == 3


class Offset(StagedNetwork):
    """Two stages of the same code that add different constants, made anew for every pass."""

    def __init__(self, make):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.make, self.offsets = make, (1.0, 2.0)

    def parts(self):
        def part(i, layer, offset):
            def run(inputs, *s):
                return (torch.tanh(layer(s[0] if s else inputs["x"]) + offset),)

            return Part(f"layers.{i}", run, [layer])

        return [part(i, self.layers[i], self.make(self.offsets[i])) for i in range(2)]


@pytest.mark.parametrize("make", [float, torch.tensor])
def test_constants_of_a_stage_are_not_shared(make):
    torch.manual_seed(0)
    network, inputs, compiler = Offset(make), {"x": torch.randn(4, 3)}, Compiler("trace")
    for offsets in ((1.0, 2.0), (0.5, -1.0), (3.0, 0.0)):
        network.offsets = offsets
        loss = StagedLoss(staged_of(network, inputs), square, NoPotentials())
        operator = CompiledOperator(loss, compiler, "hessian")
        eager = build_staged_operator("hessian", loss)
        v = random_like(operator.gradient)
        assert relative(operator.matvec(v), eager.matvec(v)) < 1e-13
        del loss, operator, eager
