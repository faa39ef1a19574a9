"""Curvature of an inner loss whose two players are staged and may be sharded.

    G(theta, phi) = g(z, psi),    z = model(theta) by stages,    psi = what g reads of phi

psi is small beside phi: the energy's local potentials at the batch and the parameters of its
interaction terms, in whole tensors on every rank. Its gradient is pulled back into own parts of
phi by `Potentials`. So the energy is never differentiated twice in its sharded parameters, and the
model is not touched again for the mixed product: d_phi <d_theta G, q> = d_phi <g_z, J q>.

What each product computes is in `staged`; what depends on the solve point alone is computed when
an operator is built. With states kept, an exact product goes forward once (tangents, and what the
known adjoints contribute) and back once (an ordinary pull-back). Without, it goes forward with
values and tangents and back with adjoints and theirs, and between products nothing is kept but z.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ispen_dist.linalg.operators import pull_back
from ispen_dist.linalg.reduction import LossValue, own_share
from ispen_dist.linalg.staged import StagedFunction
from ispen_dist.linalg.tangents import Tangents
from ispen_dist.linalg.trees import Tree, as_leaves


class Potentials(Protocol):
    """What an output loss reads of phi at one batch.

    Attributes:
        psi: whole tensors: the rank's own local potentials, and the interaction parameters.
    """

    psi: Tree

    def pull_back(self, psi_bar: Tree) -> Tree:
        """Return the gradient in phi of a function of psi, summed over ranks, as own parts."""
        ...


@dataclass(frozen=True)
class StagedLoss:
    """A loss of both players at one batch.

    Attributes:
        model: `theta -> z`.
        output_loss: `(z, psi, data) -> (sum, count)` over the rank's examples.
        potentials: psi and the way back into phi.
        name: for messages.
        data: tensors of the batch that the output loss reads.
        signature: equal for losses whose output losses are the same function, so that they share
            one compiled form; None where it must not be compiled, since it draws.
    """

    model: StagedFunction
    output_loss: Callable[[Tensor, Tree, Mapping[str, Tensor]], LossValue]
    potentials: Potentials
    name: str = "inner_loss"
    data: Mapping[str, Tensor] = field(default_factory=dict)
    signature: Hashable = None

    def at(self, z: Tensor, *, create_graph: bool) -> "AtOutput":
        """Evaluate at z with its gradient in z and psi."""
        leaves = {"z": z.detach().requires_grad_()} | as_leaves(self.potentials.psi)
        psi = {key: value for key, value in leaves.items() if key != "z"}
        reduction = self.model.layout.reduction
        share = own_share(self.output_loss(leaves["z"], psi, self.data), reduction, self.name)
        return AtOutput(
            reduction.sum([share.detach()])[0],
            leaves,
            pull_back([share], leaves, [torch.ones_like(share)], create_graph=create_graph),
        )


@dataclass(frozen=True)
class AtOutput:
    """An output loss at one z.

    Attributes:
        value: over the global batch.
        leaves: `z`, and psi.
        gradient: in the leaves, of the rank's own share.
    """

    value: Tensor
    leaves: Tree
    gradient: Tree

    @property
    def z_bar(self) -> Tensor:
        """Return `g_z` as a constant."""
        return self.gradient["z"].detach()

    def z_bar_dot(self, z_dot: Tensor) -> Tensor:
        """Return `g_zz zdot`."""
        return pull_back([self.gradient["z"]], {"z": self.leaves["z"]}, [z_dot])["z"]

    def psi_bar_dot(self, z_dot: Tensor) -> Tree:
        """Return `d_psi <g_z, zdot>`."""
        psi = {key: value for key, value in self.leaves.items() if key != "z"}
        return pull_back([self.gradient["z"]], psi, [z_dot])


class _StagedOperator:
    """What both curvatures share; `value` and `gradient` as in `CurvatureOperator`."""

    def __init__(self, loss: StagedLoss) -> None:
        self._model, self._potentials = loss.model, loss.potentials
        states = self._model.states()
        self._output = loss.at(states[-1][0], create_graph=True)
        self.value = self._output.value
        self.gradient, adjoints = self._model.pull_back(self._output.z_bar, states)
        self._adjoints = adjoints if self._model.keep_states else []
        self._tangents = Tangents()

    def mixed(self, q: Tree, combination: Sequence[float] = ()) -> Tree:
        """Return `d_phi <g_z, J q>`."""
        z_dot = self._tangents.combined(combination) if combination else self._model.tangent(q)
        return self._potentials.pull_back(self._output.psi_bar_dot(z_dot))


class StagedHessian(_StagedOperator):
    """The exact Hessian `d^2 G / d theta^2` of a `StagedLoss`, on own parts."""

    def matvec(self, v: Tree) -> Tree:
        """Return `H v`, summed over ranks."""
        model, output = self._model, self._output
        if self._adjoints:
            z_dot, direct, of_states = model.forward_curvature(v, self._adjoints)
            z_bar_dot = output.z_bar_dot(self._tangents.seen(z_dot))
            return model.pull_back(z_bar_dot, extra=of_states, onto=direct)[0]
        states, tangents = model.states_and_tangents(v)
        z_bar_dot = output.z_bar_dot(self._tangents.seen(tangents[-1][0]))
        return model.backward_curvature(v, states, tangents, output.z_bar, z_bar_dot)


class StagedGaussNewton(_StagedOperator):
    """The generalised Gauss-Newton matrix `J^T g_zz J` of a `StagedLoss`, on own parts."""

    def matvec(self, v: Tree) -> Tree:
        """Return `J^T g_zz J v`, summed over ranks."""
        states, tangents = self._model.states_and_tangents(v)
        z_bar_dot = self._output.z_bar_dot(self._tangents.seen(tangents[-1][0]))
        del tangents
        return self._model.pull_back(z_bar_dot, states)[0]


def build_staged_operator(curvature: str, loss: StagedLoss) -> StagedHessian | StagedGaussNewton:
    """Build the operator of the given name, one of `operators.CURVATURES`."""
    return StagedHessian(loss) if curvature == "hessian" else StagedGaussNewton(loss)
