"""The engine of replicas: every rank holds the whole network."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ispen_dist.engine import MOMENTS, Engine, Groups, copy_into
from ispen_dist.linalg.layout import Replicas
from ispen_dist.linalg.reduction import Reduction
from ispen_dist.linalg.trees import Tree, scaled
from ispen_dist.models.stages import Inputs
from ispen_dist.optim import checked_norm, clip_factor, found_inf, step_unless


class ReplicatedEngine(Engine):
    """Every rank holds all parameters; gradients are all-reduced with counts, in one collective.

    Args:
        network: the network itself.
        groups: parameter names by group.
        reduction: sums over ranks.
        autocast: type of first-order matrix products, or None for that of the parameters.
    """

    replicated = True

    def __init__(
        self,
        network: nn.Module,
        groups: Groups,
        reduction: Reduction,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__(network, Replicas(reduction), groups)
        self._autocast = autocast
        self._parameters: Tree = dict(network.named_parameters())
        self._adamw = torch.optim.AdamW(
            [{"params": [self._parameters[n] for n in names]} for names in groups.values()],
            fused=True,
        )

    def parameters(self, names: Iterable[str] | None = None) -> Tree:
        """Return the parameters themselves."""
        return {n: self._parameters[n] for n in (self._parameters if names is None else names)}

    def forward(self, inputs: Inputs) -> Tensor:
        """Run the network; under autocast its output is cast back."""
        self.network.train()
        if self._autocast is None:
            return self.network(inputs)
        device = next(iter(self._parameters.values()))
        with torch.autocast(device.device.type, self._autocast):
            output = self.network(inputs)
        return output.to(device.dtype)

    def step(
        self, total: Tensor, also: Sequence[Tensor], count: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """See `Engine.step`."""
        trained = self.trained()
        own = torch.autograd.grad(total, list(trained.values()))
        return self.step_along(dict(zip(trained, own, strict=True)), also, count)

    def step_along(
        self, own: Tree, also: Sequence[Tensor], count: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """See `Engine.step`, with the gradient of the rank's sum in place of the loss."""
        sums = self.layout.reduction.sum([*own.values(), *(s.detach() for s in also), count])
        global_count = sums.pop()
        gradient = dict(zip(own, sums, strict=False))
        means = [s / global_count for s in sums[len(own) :]]
        return means, self._update(scaled(gradient, 1.0 / global_count), means)

    def trained(self) -> Tree:
        """Return the parameters that the present phase trains."""
        return {name: self._parameters[name] for name in self.trained_names}

    @property
    def adamw_settings(self) -> dict[str, float]:
        """Settings of the optimizer's kernel in the present phase, but for the learning rate."""
        group = self._adamw.param_groups[0]
        beta1, beta2 = group["betas"]
        decay = self.phase.config.weight_decay
        return {"beta1": beta1, "beta2": beta2, "eps": group["eps"], "weight_decay": decay}

    def state(self) -> list[Tensor]:
        """Return the trained parameters and both moments of each, as constants."""
        trained = self.trained()
        if self.num_taken == 0:
            zeros = {name: torch.zeros_like(p) for name, p in trained.items()}
            self.load_moments({slot: zeros for slot in MOMENTS}, 0)
        moments = (self._adamw.state[p][slot] for slot in MOMENTS for p in trained.values())
        return [*(p.detach() for p in trained.values()), *moments]

    @torch.no_grad()
    def accept(self, state: Sequence[Tensor], num_steps: int) -> None:
        """Take over what `state` has become after a number of steps."""
        torch._foreach_copy_(self.state(), list(state))
        self.num_taken += num_steps
        for p in self.trained().values():
            self._adamw.state[p]["step"].fill_(self.num_taken)

    def apply(self, gradient: Tree, inputs: Inputs) -> None:
        """See `Engine.apply`."""
        self._update(gradient)

    def _update(self, gradient: Tree, terms: Sequence[Tensor] = ()) -> Tensor:
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(gradient.values()))))
        norm = checked_norm(norm, terms)
        gradient = scaled(gradient, clip_factor(norm, self.phase.config.clip_norm))
        self._prepare(self._adamw.param_groups)
        for name, part in gradient.items():
            # The fused kernel reads a gradient in the order of memory, whatever its strides.
            self._parameters[name].grad = part.contiguous()
        step_unless(self._adamw, found_inf(norm))
        self.num_taken += 1
        return norm

    @torch.no_grad()
    def load(self, parameters: Tree) -> None:
        """See `Engine.load`."""
        copy_into(self._parameters, parameters)

    def moments(self) -> dict[str, Tree]:
        """See `Engine.moments`."""
        return torch_moments(self._adamw, self._parameters, self.num_taken)

    @torch.no_grad()
    def load_moments(self, moments: Mapping[str, Tree], num_taken: int) -> None:
        """See `Engine.load_moments`."""
        load_torch_moments(self._adamw, self._parameters, moments, num_taken)
        self.num_taken = num_taken

    def _forget(self) -> None:
        self._adamw.state.clear()


def torch_moments(
    optimizer: torch.optim.Optimizer, parameters: Tree, num_taken: int
) -> dict[str, Tree]:
    """Return `MOMENTS` of a torch optimizer by parameter name; empty before the first step."""
    if num_taken == 0:
        return {}
    state = optimizer.state
    return {
        slot: {name: state[p][slot] for name, p in parameters.items() if p in state}
        for slot in MOMENTS
    }


def load_torch_moments(
    optimizer: torch.optim.Optimizer,
    parameters: Tree,
    moments: Mapping[str, Tree],
    num_taken: int,
) -> None:
    """Set `MOMENTS` and the step of a torch optimizer; it gets copies."""
    optimizer.state.clear()
    for name in next(iter(moments.values()), {}):
        parameter = parameters[name]
        state = {"step": torch.tensor(float(num_taken), dtype=torch.float32)}
        if optimizer.param_groups[0].get("fused"):
            state["step"] = state["step"].to(parameter.device)
        for slot in MOMENTS:
            value = torch.zeros_like(parameter)
            copy_into({name: value}, {name: moments[slot][name]})
            state[slot] = value
        optimizer.state[parameter] = state
