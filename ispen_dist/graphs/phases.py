"""Split a graph into phases, by what is known when.

Inputs of a graph become known one group after the other. For a stage of a network, an exact
Hessian product has four groups, and what follows from them is computed in four phases:

    1  parameters, inputs, state     ->  next state                         once per solve
    2  adjoint of the next state     ->  gradients of parameters and state  once per solve
    3  direction, tangent of state   ->  tangent of the next state          every product
    4  tangent of the adjoint        ->  tangents of both gradients         every product

Values do not move while a linear solver iterates, so everything that depends on the first two
groups alone is computed there and kept, if a later phase needs it; a product then costs six matrix
products per linear layer, two gradients, and its memory is what is kept.

What is kept is a cut of the graph between the phases. It is chosen by a minimum cut over bytes,
where cheap elementwise operations may be repeated after the cut and everything else may not:
reading a kept tensor costs about as much as repeating a sum or a product of two, and less than
repeating an exponential. Of equal cuts the one nearest to the use is taken, which repeats least.
The cut between solve and product comes first: it is read in every product, and it is what the
memory of a solve consists of.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import networkx
import torch
from torch import Tensor, fx

aten = torch.ops.aten

_VIEWS = {
    aten.alias, aten.detach, aten.expand, aten.permute, aten.select, aten.slice, aten.squeeze,
    aten.t, aten.transpose, aten.unsqueeze, aten.view, aten._unsafe_view,
}  # fmt: skip
_CHEAP = _VIEWS | {
    aten.add, aten.sub, aten.mul, aten.neg, aten.div, aten.where, aten.relu, aten.clamp_min,
    aten.eq, aten.ne, aten.gt, aten.ge, aten.lt, aten.le, aten.bitwise_not, aten.logical_not,
    aten._to_copy, aten.full, aten.full_like, aten.zeros_like, aten.ones_like, aten.scalar_tensor,
}  # fmt: skip
"""What may be repeated: no copy into another layout, no transcendental function, no reduction."""


@dataclass(frozen=True)
class Phase:
    """One phase as a graph of its own.

    Attributes:
        module: from what it reads to its results, then what it leaves for later phases.
        reads: names of its inputs, in order.
        num_results: how many outputs are results.
        leaves: names of the others.
    """

    module: fx.GraphModule
    reads: tuple[str, ...]
    num_results: int
    leaves: tuple[str, ...]


def split(
    module: fx.GraphModule, known: Sequence[int], wanted: Sequence[int], last_of_solve: int
) -> dict[int, Phase]:
    """Split a graph.

    Args:
        module: a pure graph, see `tracing`.
        known: for every input, the phase from which on it is known.
        wanted: for every output, the phase that returns it.
        last_of_solve: the last phase that runs once per solve; later ones run for every product.

    Returns:
        A `Phase` by number.
    """
    numbers = sorted(set(known) | set(wanted))
    last_of_solve = max(n for n in numbers if n <= last_of_solve)
    nodes = [n for n in module.graph.nodes if n.op != "output"]
    outputs = outputs_of(module)
    at = _phase_of_nodes(nodes, known, outputs, wanted, last_of_solve)
    inputs = [n for n in nodes if n.op == "placeholder"]

    def needs(phases: list[int]) -> set[fx.Node]:
        """Return what is read by phases and computed before them."""
        read = {a for n in nodes if at[n] in phases for a in n.all_input_nodes}
        read |= {o for o, w in zip(outputs, wanted, strict=True) if w in phases}
        return {n for n in read if at[n] < phases[0]}

    kept = {n for n in nodes if n.op in ("placeholder", "get_attr")}
    if of_products := [n for n in numbers if n > last_of_solve]:
        # First and together: what one phase of the solve leaves for the other is gone by then.
        kept |= set(_cut(nodes, needs(of_products), kept)[0])
    from_earlier: dict[int, list[fx.Node]] = {}
    repeated: dict[int, set[fx.Node]] = {}
    for number in numbers:
        from_earlier[number], repeated[number] = _cut(nodes, needs([number]), kept)
        kept |= set(from_earlier[number])
    result = {}
    for number in numbers:
        body = [n for n in nodes if n not in inputs and (at[n] == number or n in repeated[number])]
        results = [o for o, w in zip(outputs, wanted, strict=True) if w == number]
        later = dict.fromkeys(n for m in numbers if m > number for n in from_earlier[m])
        leaves = [n for n in later if at[n] == number and n.op == "call_function"]
        used = {a for n in body for a in n.all_input_nodes} | set(results)
        fresh = [n for n in inputs if at[n] == number]
        reads = [n for n in [*fresh, *from_earlier[number]] if n in used and n.op != "get_attr"]
        constants = [n for n in nodes if n.op == "get_attr" and n not in body]
        piece = _piece(module, reads, constants + body, [*results, *leaves])
        names = [tuple(n.name for n in group) for group in (reads, leaves)]
        result[number] = Phase(piece, names[0], len(results), names[1])
    return result


def outputs_of(module: fx.GraphModule) -> list[fx.Node]:
    """Return the nodes that a graph returns."""
    outputs: Any = module.graph.output_node().args[0]
    return list(outputs)


def _phase_of_nodes(
    nodes: list[fx.Node],
    known: Sequence[int],
    outputs: list[fx.Node],
    wanted: Sequence[int],
    last_of_solve: int,
) -> dict[fx.Node, int]:
    """Return the phase that computes each node.

    Not the first in which it could be, but the first that needs it; for what a product needs of
    the solve point, the last phase of the solve. So little is kept between phases.
    """
    earliest = dict(zip((n for n in nodes if n.op == "placeholder"), known, strict=False))
    for n in nodes:
        if n.op != "placeholder":
            earliest[n] = max((earliest[a] for a in n.all_input_nodes), default=min(known))
    last = max(*known, *wanted)
    at = {n: earliest[n] for n in nodes if n.op == "placeholder"}
    for number in sorted(set(wanted)):
        stack = [o for o, w in zip(outputs, wanted, strict=True) if w == number]
        while stack:
            n = stack.pop()
            if n not in at and (earliest[n] <= last_of_solve) == (number <= last_of_solve):
                at[n] = number
                stack += n.all_input_nodes
    for n in nodes:
        if n not in at:
            at[n] = last_of_solve if earliest[n] <= last_of_solve else last
        if n.target is operator.getitem:
            at[n] = at[n.all_input_nodes[0]]
    return at


def _cut(
    nodes: list[fx.Node], needed: set[fx.Node], kept: set[fx.Node]
) -> tuple[list[fx.Node], set[fx.Node]]:
    """Choose what a phase reads of earlier ones, and what it repeats, by a minimum cut."""
    network = networkx.DiGraph()
    reached: set[fx.Node] = set()
    stack = list(needed)
    # Built from the uses backwards, so that the cut lies nearest to them.
    for n in needed:
        network.add_edge("uses", (n, "value"), capacity=float("inf"))
    while stack:
        n = stack.pop()
        if n in reached:
            continue
        reached.add(n)
        network.add_edge((n, "value"), (n, "inputs"), capacity=0 if n in kept else _bytes(n))
        if _is_cheap(n) and n not in kept:
            for a in n.all_input_nodes:
                network.add_edge((n, "inputs"), (a, "value"), capacity=float("inf"))
                stack.append(a)
            if not n.all_input_nodes:
                network.add_node((n, "inputs"))
        else:
            network.add_edge((n, "inputs"), "values", capacity=float("inf"))
    if "values" not in network or "uses" not in network:
        return [], reached
    _, (near, _) = networkx.minimum_cut(network, "uses", "values")
    read = [n for n in nodes if n in reached and (n, "value") in near and (n, "inputs") not in near]
    return read, {n for n in reached if (n, "inputs") in near}


def _is_cheap(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target.overloadpacket in _CHEAP


def _bytes(node: fx.Node) -> float:
    value = node.meta.get("val")
    # A tuple of results cannot be read by another graph; its entries can. What a view shows is
    # kept anyway, and no graph shall return what lies in the memory of its inputs.
    if not isinstance(value, Tensor) or getattr(node.target, "overloadpacket", None) in _VIEWS:
        return float("inf")
    return value.numel() * value.element_size() + 1


def _piece(
    module: fx.GraphModule, reads: list[fx.Node], body: list[fx.Node], results: list[fx.Node]
) -> fx.GraphModule:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for n in reads:
        copies[n] = graph.placeholder(n.name)
        copies[n].meta = dict(n.meta)
    for n in body:
        copies[n] = graph.node_copy(n, lambda a: copies[a])
    graph.output(tuple(copies[n] for n in results))
    graph.eliminate_dead_code()
    graph.lint()
    return fx.GraphModule(module, graph)
