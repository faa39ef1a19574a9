"""The output loss of a `StagedLoss` as compiled phases: value, gradients, and their tangents."""

import torch
from torch import Tensor

from ispen_dist.graphs.compiler import Compiler, spec_of
from ispen_dist.graphs.stage_graphs import (
    PRODUCT,
    TANGENT,
    VALUE,
    StageGraph,
    StagePoint,
    assemble,
)
from ispen_dist.graphs.tracing import trace
from ispen_dist.linalg.staged_operators import StagedLoss
from ispen_dist.linalg.stages import grad, leaves, materialised
from ispen_dist.linalg.trees import Tree


class CompiledOutput:
    """An output loss at one z; the counterpart of `staged_operators.AtOutput`.

    Args:
        loss: with a signature; its output loss returns a pair `(sum, count)`.
        compiler: remembers the phases.
        z: outputs of the model.

    Attributes:
        value: over the global batch.
        z_bar: `g_z` of the rank's own share.
    """

    def __init__(self, loss: StagedLoss, compiler: Compiler, z: Tensor) -> None:
        psi, reduction = loss.potentials.psi, loss.model.layout.reduction
        self._psi_names = list(psi)
        tensors = [z, *psi.values(), *loss.data.values()]
        key = ("output", loss.signature, tuple(psi), tuple(loss.data), spec_of(tensors))
        self._point = StagePoint(compiler.once(key, lambda: _build(compiler, loss, tensors)))
        total, count, z_bar = self._point.value(tensors, [], ())
        # The sum is differentiated and scaled afterwards: the global count is a sum over ranks.
        self._share = 1.0 / reduction.sum([count])[0]
        self.value = reduction.sum([total * self._share])[0]
        self.z_bar = z_bar * self._share

    def z_bar_dot(self, z_dot: Tensor) -> Tensor:
        """Return `g_zz zdot`."""
        result = self._point.tangent([z_dot], ())[0] * self._share
        self._point.forget_tangent()
        return result

    def psi_bar_dot(self, z_dot: Tensor) -> Tree:
        """Return `d_psi <g_z, zdot>`."""
        self._point.tangent([z_dot], ())
        result = self._point.product(())
        return {n: x * self._share for n, x in zip(self._psi_names, result, strict=True)}


def _build(compiler: Compiler, loss: StagedLoss, tensors: list[Tensor]) -> StageGraph:
    names = list(loss.potentials.psi)

    def function(*inputs: Tensor) -> list[Tensor]:
        z, *psi = leaves(inputs[: 1 + len(names)])
        data = dict(zip(loss.data, inputs[1 + len(names) :], strict=False))
        total, count = loss.output_loss(z, dict(zip(names, psi, strict=True)), data)
        z_bar = materialised(grad((total,), [z], (torch.ones_like(total),), create_graph=True), [z])
        dots = grad(z_bar, [z, *psi], (inputs[-1],), create_graph=True)
        z_bar_dot, *psi_bar_dot = materialised(dots, [z, *psi])
        return [total, torch.as_tensor(count).to(total), *z_bar, z_bar_dot, *psi_bar_dot]

    traced = trace(function, [*tensors, tensors[0]], loss.name)
    known = [VALUE] * len(tensors) + [TANGENT]
    wanted = [VALUE] * 3 + [TANGENT] + [PRODUCT] * len(names)
    return assemble(compiler, traced, known, wanted, f"output of {loss.name}")
