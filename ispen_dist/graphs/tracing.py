"""From a function of tensors to a pure graph of ATen operations, derivatives included.

`torch.compile` cannot differentiate twice through a compiled module, so the derivatives are taken
first: the function calls autograd, twice if it has to, and what is traced is the list of operations
that autograd ran. The graph is functional (no operation writes into its input), knows its shapes,
and draws nothing: dropout masks are lifted out and become inputs, so that a compiled function sees
the same masks as a plain one, in every pass of a solve.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.fx.experimental.proxy_tensor import make_fx

from ispen_dist.linalg.stages import StageError

aten = torch.ops.aten

Function = Callable[..., list[Tensor]]


@dataclass(frozen=True)
class Draw:
    """One random mask: entries are 1 with probability `rate`, else 0."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    rate: float

    def __call__(self) -> Tensor:
        """Draw from the global generator, as `torch.bernoulli` does in the traced function."""
        return torch.empty(self.shape, dtype=self.dtype, device=self.device).bernoulli_(self.rate)


@dataclass(frozen=True)
class Traced:
    """A pure graph.

    Attributes:
        module: takes the inputs of the function in order, then one mask per draw.
        draws: in the order in which the function draws.
    """

    module: fx.GraphModule
    draws: tuple[Draw, ...]


def trace(function: Function, inputs: Sequence[Tensor], name: str) -> Traced:
    """Trace a function at the shapes, strides and types of given inputs.

    Nothing is computed: tensors have no memory while they are traced.

    Args:
        function: from tensors to a list of tensors; it may call `torch.autograd.grad`.
        inputs: examples; the graph holds for their shapes only.
        name: for messages.

    Raises:
        StageError: where the function depends on values of its inputs, draws by something else
            than dropout, or cannot be differentiated twice.
    """
    # Here, since it brings the whole code generator with it: seconds that only compiling needs.
    from torch._inductor.decomposition import select_decomp_table

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    # Each input is a tensor of its own here, even where the caller passes one twice: the tracer
    # tells inputs apart by identity.
    fakes = [mode.from_tensor(x.detach()) for x in inputs]
    with refusing_data_dependence(name), mode, torch.enable_grad():
        raw = make_fx(function)(*fakes)
    with mode, torch.no_grad():
        pure = make_fx(
            torch.func.functionalize(raw, remove="mutations"),
            # Those of the code generator, which does not apply them inside subgraphs of a program.
            decomposition_table=select_decomp_table(),
        )(*fakes)
    graph = without_repeats(pure.graph)
    draws = lift_draws(graph, name)
    fill_by_shape(graph)
    graph.eliminate_dead_code()
    graph.lint()
    return Traced(fx.GraphModule(pure, graph), draws)


@contextlib.contextmanager
def refusing_data_dependence(name: str) -> Iterator[None]:
    """Turn the tracer's complaint about values into an error that names the function."""
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise StageError(
            f"{name}: expected shapes that do not depend on values, found {error.func}; it "
            "cannot be compiled, set compile.inner=false and compile.curvature=false"
        ) from error


def without_repeats(graph: fx.Graph) -> fx.Graph:
    """Return a copy in which what is computed twice from the same inputs is computed once."""
    result = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    seen: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "call_function" and not draws_randomly(node):
            arguments = fx.map_arg((node.args, node.kwargs), lambda n: copies[n])
            key = (node.target, repr(arguments))
            if key not in seen:
                seen[key] = result.node_copy(node, lambda n: copies[n])
            copies[node] = seen[key]
        else:
            copies[node] = result.node_copy(node, lambda n: copies[n])
    return result


def fill_by_shape(graph: fx.Graph) -> None:
    """Make constants from their shapes instead of tensors like them, in place."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.target is aten.full_like.default and value.is_contiguous():
            node.target = aten.full.default
            node.args = (list(value.shape), node.args[1])
            node.kwargs = {"dtype": value.dtype, "device": value.device}


def draws_randomly(node: fx.Node) -> bool:
    """Whether an operation reads a random generator."""
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded in target.tags
    )


def lift_draws(graph: fx.Graph, name: str) -> tuple[Draw, ...]:
    """Turn every random mask of a graph into an input, in place."""
    draws = []
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node in [n for n in graph.nodes if draws_randomly(n)]:
        if node.target is not aten.bernoulli.p:
            raise StageError(
                f"{name}: expected dropout as the only source of randomness, found {node.target}; "
                "use ispen_dist.models.dropout.Dropout, or set compile.inner=false and "
                "compile.curvature=false"
            )
        value = node.meta["val"]
        draws.append(Draw(value.shape, value.dtype, value.device, float(node.args[1])))
        with graph.inserting_after(last):
            last = graph.placeholder(f"mask_{len(draws)}")
        last.meta["val"] = value
        room = node.args[0]
        node.replace_all_uses_with(last)
        graph.erase_node(node)
        if isinstance(room, fx.Node) and not room.users and room.op == "call_function":
            graph.erase_node(room)
    return tuple(draws)
