"""What a checkpoint holds of a run: whole tensors, and plain values beside them.

Whole, so that a run goes on with another number of ranks and under another engine. They come to
the main process one at a time.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from ispen_dist.engine import MOMENTS, Engine, Engines
from ispen_dist.linalg.trees import Tree
from ispen_dist.outer import SolverRecord

Copies = Mapping[str, dict[str, Tree]]
"""Copies of the networks that a run keeps besides: by kind, as `best`, the networks' trees."""


def whole(engine: Engine, parts: Tree, *, is_main: bool) -> Tree:
    """Return copies of whole tensors on the CPU of the main process, and nothing elsewhere."""
    return {n: value.to("cpu", copy=True) for n, value in engine.whole(parts) if is_main}


def own(engine: Engine, tree: Tree, device: torch.device) -> Tree:
    """Return this rank's parts of whole tensors, on its device."""
    return {key: value.to(device) for key, value in engine.layout.own(tree).items()}


def trees_of(
    engines: Engines, copies: Copies, record: SolverRecord, *, is_main: bool
) -> dict[str, Tree]:
    """Return all tensors that change while a run trains; every rank calls it."""
    trees = {}
    for name, engine in engines.items():
        trees[name] = whole(engine, engine.parameters(), is_main=is_main)
        for slot, moments in engine.moments().items():
            trees[f"{name}_{slot}"] = whole(engine, moments, is_main=is_main)
        for kind, networks in copies.items():
            if name in networks:
                trees[f"{kind}_{name}"] = whole(engine, networks[name], is_main=is_main)
    start = record.start or {}
    trees["solver_start"] = whole(engines.inference_net, start, is_main=is_main)
    return trees


def restore_trees(
    engines: Engines,
    copies: Copies,
    trees: Mapping[str, Tree],
    phases: Mapping[str, Mapping[str, Any]],
    device: torch.device,
) -> None:
    """Load what `trees_of` returned, but for the start of the solver; engines are in their phase.

    Args:
        engines: both networks.
        copies: gets those that there are.
        trees: whole tensors.
        phases: of `phases_of`.
        device: of the parameters.
    """
    for name, engine in engines.items():
        engine.load(own(engine, trees[name], device))
        for kind, networks in copies.items():
            if f"{kind}_{name}" in trees:
                networks[name] = own(engine, trees[f"{kind}_{name}"], device)
        num_taken = phases[name]["num_taken"]
        if num_taken:
            moments = {s: own(engine, trees[f"{name}_{s}"], device) for s in MOMENTS}
            engine.load_moments(moments, num_taken)


def phases_of(engines: Engines) -> dict[str, dict[str, Any]]:
    """Return the phase of each engine and the steps it has taken in it."""
    return {
        name: {"name": engine.phase.name, "num_taken": engine.num_taken}
        for name, engine in engines.items()
    }


def solver_state(record: SolverRecord) -> dict[str, Any]:
    """Return a record without its start as plain values."""
    return {
        "damping": record.damping,
        "statuses": dict(record.statuses),
        "num_skipped": record.num_skipped,
        "num_steps": record.num_steps,
        "residual_sum": record.residual_sum,
        "num_residuals": record.num_residuals,
    }


def solver_record(state: Mapping[str, Any], start: Tree) -> SolverRecord:
    """Return the record of `solver_state`, with its start where there was one."""
    values = dict(state)
    values["statuses"] = Counter(values["statuses"])
    return SolverRecord(start=start or None, **values)
