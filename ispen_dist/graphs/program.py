"""Several compiled graphs and what happens between them, recorded and compiled as one function.

While a program is recorded, tensors are stand-ins. A graph that is called is not copied into the
program but becomes a subgraph of it, once however often it is called: the blocks of a network, and
the steps of a loop, share their code, and compile time does not grow with their number.
"""

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import GraphAppendingTracer

aten = torch.ops.aten
_invoke = torch.ops.higher_order.invoke_subgraph


class Program:
    """A function that is being recorded."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self._root = nn.Module()
        self._tracer = GraphAppendingTracer(self.graph)
        self._subgraphs: dict[int, tuple[str, nn.Module]] = {}
        _recording[self._tracer] = self

    def input(self, name: str, like: Tensor) -> Any:
        """Return a stand-in for the next input, which will be like a given tensor."""
        return self._stand_in(self.graph.placeholder(name), like)

    def inputs(self, name: str, like: Sequence[Tensor]) -> list[Any]:
        """Return stand-ins for several inputs."""
        return [self.input(f"{name}_{i}", x) for i, x in enumerate(like)]

    def finish(self, outputs: Sequence[Any]) -> fx.GraphModule:
        """Return the recorded graph with the given outputs."""
        self.graph.output(tuple(x.node for x in outputs))
        self.graph.eliminate_dead_code()
        self.graph.lint()
        del _recording[self._tracer]
        return fx.GraphModule(self._root, self.graph)

    def call(self, module: fx.GraphModule, tensors: Sequence[Any]) -> list[Any]:
        """Record a call of a graph and return stand-ins for its outputs."""
        outputs: Any = module.graph.output_node().args[0]
        own = [i for i, node in enumerate(outputs) if node.op != "placeholder"]
        name = self._add(module, own)
        nodes = tuple(x.node for x in tensors)
        made = self.graph.call_function(_invoke, (self.graph.get_attr(name), name, *nodes))
        places = [node for node in module.graph.nodes if node.op == "placeholder"]
        result = []
        for i, node in enumerate(outputs):
            if i not in own:  # an input that is handed through
                result.append(tensors[places.index(node)])
                continue
            item = self.graph.call_function(operator.getitem, (made, own.index(i)))
            result.append(self._stand_in(item, _returned(node.meta["val"])))
        return result

    def _add(self, module: fx.GraphModule, own: list[int]) -> str:
        """Return the name of a subgraph that returns only what it computes."""
        if id(module) not in self._subgraphs:
            # Unique in the process: the tracer knows subgraphs of all programs by their names.
            name = f"subgraph_{next(_numbers)}"
            graph = fx.Graph()
            copies: dict[fx.Node, fx.Node] = {}
            outputs: Any = graph.graph_copy(module.graph, copies)
            graph.output(tuple(_as_returned(graph, outputs[i]) for i in own))
            self._root.add_module(name, fx.GraphModule(module, graph))
            self._subgraphs[id(module)] = (name, module)
        return self._subgraphs[id(module)][0]

    def _stand_in(self, node: fx.Node, like: Tensor) -> Any:
        node.meta["val"] = like
        return fx.Proxy(node, self._tracer)


_recording: dict[Any, Program] = {}
_numbers = itertools.count()


def _is_part(value: Tensor) -> bool:
    """Whether a tensor shows only a part of what is stored."""
    return value.untyped_storage().nbytes() > value.numel() * value.element_size()


def _returned(value: Tensor) -> Tensor:
    return value.clone(memory_format=torch.contiguous_format) if _is_part(value) else value


def _as_returned(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Return a node, copied where it is a part: torch 2.13 loses the offset between subgraphs."""
    if not _is_part(node.meta["val"]):
        return node
    return graph.call_function(
        aten.clone.default, (node,), {"memory_format": torch.contiguous_format}
    )


def record_call(module: fx.GraphModule, name: str, tensors: Sequence[Any]) -> list[Any]:
    """Record a call of a graph in the program of the stand-ins."""
    program = next(_recording[x.tracer] for x in tensors if isinstance(x, fx.Proxy))
    return program.call(module, tensors)


def recorded_as(x: Any, stride: tuple[int, ...]) -> Any:
    """Return a stand-in that lies in memory as the code that reads it expects."""
    like = x.node.meta["val"]
    if like.stride() == stride:
        return x
    program = _recording[x.tracer]
    graph = program.graph
    settings = {"dtype": like.dtype, "device": like.device}
    room = graph.call_function(
        aten.empty_strided.default, (list(like.shape), list(stride)), settings
    )
    copy = graph.call_function(aten.copy.default, (room, x.node))
    return program._stand_in(copy, like.new_empty_strided(like.shape, stride))
