"""The state of a torch optimizer as a tree of tensors, and back, exactly."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor


def optimizer_tree(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    """Return an optimizer's state as a tree with keys `SLOT/NAME`, such as `exp_avg/weight`.

    Learning rates and other settings are not part of it: they come from the configuration and
    the step. Before the first step the tree is empty.

    Args:
        optimizer: one whose state is tensors, such as AdamW (step, exp_avg, exp_avg_sq).
        names: of its parameters, in its order.
    """
    tree = {}
    for name, parameter in _named_parameters(optimizer, names):
        for slot, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"optimizer state {slot} of {name}: expected a tensor, got "
                    f"{type(value).__name__}; use an optimizer with tensor state, such as AdamW"
                )
            tree[f"{slot}/{name}"] = value
    return tree


def load_optimizer_tree(
    optimizer: torch.optim.Optimizer, names: Sequence[str], tree: Mapping[str, Tensor]
) -> None:
    """Put the state from `optimizer_tree` into an optimizer over the same parameters.

    The optimizer gets copies, so that its steps leave the tree as it is.

    Raises:
        ValueError: if the tree does not fit the parameters; the optimizer is then unchanged.
    """
    parameters = dict(_named_parameters(optimizer, names))
    numbers = {name: i for i, name in enumerate(parameters)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tree.items():
        slot, _, name = key.partition("/")
        if name not in parameters:
            raise ValueError(
                f"optimizer state {key}: expected a parameter among {', '.join(parameters)}; the "
                "network differs from the one that was saved, resume with its configuration"
            )
        _check_slot(key, slot, value, parameters[name])
        state.setdefault(numbers[name], {})[slot] = value.clone()
    if len({frozenset(slots) for slots in state.values()}) > 1:
        raise ValueError(
            "optimizer state: expected the same slots for every parameter, got "
            f"{sorted(tree)}; resume from another checkpoint"
        )
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def _check_slot(key: str, slot: str, value: Tensor, parameter: Tensor) -> None:
    """Refuse what `load_state_dict` would convert or broadcast without a word."""
    fits = slot == "step" or (value.shape == parameter.shape and value.dtype == parameter.dtype)
    if not fits:
        raise ValueError(
            f"optimizer state {key}: expected {parameter.dtype} {tuple(parameter.shape)} like the "
            f"parameter, got {value.dtype} {tuple(value.shape)}; resume with the configuration "
            "that was saved"
        )


def _named_parameters(
    optimizer: torch.optim.Optimizer, names: Sequence[str]
) -> Iterator[tuple[str, Tensor]]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if len(set(names)) != len(parameters) or len(names) != len(parameters):
        raise ValueError(
            f"names: expected {len(parameters)} different ones, one per parameter of the "
            f"optimizer, got {len(names)}; give them in the optimizer's order"
        )
    return zip(names, parameters, strict=True)
