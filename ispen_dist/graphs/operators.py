"""Curvature from compiled phases, with all that a product needs of the solve point kept.

The counterpart of `linalg.operators` (one graph of the whole gradient) and
`linalg.staged_operators` (nothing kept but stage boundaries): every rank holds all parameters.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from ispen_dist import ranges
from ispen_dist.graphs.compiler import Compiler
from ispen_dist.graphs.output_graph import CompiledOutput
from ispen_dist.graphs.stage_graphs import StagePoint, stage_graphs
from ispen_dist.linalg.reduction import sum_tree
from ispen_dist.linalg.staged import StagedFunction
from ispen_dist.linalg.staged_operators import AtOutput, StagedLoss
from ispen_dist.linalg.stages import State
from ispen_dist.linalg.tangents import Tangents
from ispen_dist.linalg.trees import Tree


class CompiledFunction:
    """`theta -> z` at one point, by compiled stages.

    Args:
        model: the function by stages; its layout holds whole parameters on every rank.
        compiler: of the stages.
        kind: what is wanted, one of `stage_graphs.KINDS`.
    """

    def __init__(self, model: StagedFunction, compiler: Compiler, kind: str) -> None:
        self._model = model
        self._trained = [[k for k in s.keys if k not in model.frozen] for s in model.stages]
        self._points = [StagePoint(graph) for graph in stage_graphs(compiler, kind, model)]
        state: State = ()
        for stage, point in zip(model.stages, self._points, strict=True):
            p = [model.parameters[key] for key in stage.keys]
            state = point.value(p, list(stage.inputs.values()), state)
        self.z = state[0]

    def pull_back(self, z_bar: Tensor) -> Tree:
        """Return `J^T z_bar` of this rank; to be called once, before any tangent."""
        return self._backwards(z_bar, lambda point, a: point.pull_back(a))

    def tangent(self, v: Tree) -> Tensor:
        """Return `J v`."""
        tangent: State = ()
        for point, keys in zip(self._points, self._trained, strict=True):
            tangent = point.tangent([v[key] for key in keys], tangent)
        return tangent[0]

    def product(self, z_bar_dot: Tensor) -> Tree:
        """Return the tangent of the rank's gradient, in the direction of the last `tangent`."""
        return self._backwards(z_bar_dot, lambda point, a: point.product(a))

    def forget_tangent(self) -> None:
        """Free what the last `tangent` left for a product."""
        for point in self._points:
            point.forget_tangent()

    def _backwards(self, z_bar: Tensor, step: Callable[[StagePoint, State], State]) -> Tree:
        total: Tree = {}
        a: State = (z_bar,)
        for point, keys in zip(reversed(self._points), reversed(self._trained), strict=True):
            grads = step(point, a)
            a = grads[len(keys) :]
            for key, grad in zip(keys, grads, strict=False):
                total[key] = total[key] + grad if key in total else grad
        return {key: total[key] for key in self._model.theta}


class CompiledOperator:
    """The curvature of a `StagedLoss`, see `CurvatureOperator`.

    Args:
        loss: its model holds whole parameters on every rank.
        compiler: of the stages.
        curvature: "hessian" or "gauss_newton".
    """

    def __init__(self, loss: StagedLoss, compiler: Compiler, curvature: str) -> None:
        self._reduction = loss.model.layout.reduction
        self._potentials = loss.potentials
        self._model = CompiledFunction(loss.model, compiler, curvature)
        self._output: AtOutput | CompiledOutput
        if loss.signature is None:
            self._output = loss.at(self._model.z, create_graph=True)
        else:
            self._output = CompiledOutput(loss, compiler, self._model.z)
        self.value = self._output.value
        self.gradient = sum_tree(self._model.pull_back(self._output.z_bar), self._reduction)
        self._tangents = Tangents()

    def matvec(self, v: Tree) -> Tree:
        """Return the product, summed over ranks."""
        z_bar_dot = self._output.z_bar_dot(self._tangents.seen(self._model.tangent(v)))
        return sum_tree(self._model.product(z_bar_dot), self._reduction)

    def mixed(self, q: Tree, combination: Sequence[float] = ()) -> Tree:
        """Return `d_phi <g_z, J q>`."""
        if combination:
            z_dot = self._tangents.combined(combination)
        else:
            z_dot = self._model.tangent(q)
            self._model.forget_tangent()
        return self._potentials.pull_back(self._output.psi_bar_dot(z_dot))


@ranges.marked("outer gradient")
def compiled_outer_gradients(loss: StagedLoss, compiler: Compiler) -> tuple[Tensor, Tree, Tree]:
    """Return `(L, d_theta L, d_phi L)` of a staged loss over the global batch."""
    model = CompiledFunction(loss.model, compiler, "gradient")
    output = loss.at(model.z, create_graph=False)
    d_theta = sum_tree(model.pull_back(output.z_bar), loss.model.layout.reduction)
    psi_bar = {key: value for key, value in output.gradient.items() if key != "z"}
    return output.value, d_theta, loss.potentials.pull_back(psi_bar)
