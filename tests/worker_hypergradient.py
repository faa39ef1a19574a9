"""One rank of a hypergradient over an unevenly shared batch; started by test_distributed.py."""

import sys
from pathlib import Path

import problems
import torch
from safetensors.torch import save_file

from ispen_dist import CG, hypergradient
from ispen_dist.data.batch import Batch
from ispen_dist.distributed import Session
from ispen_dist.linalg.reduction import OneProcess, Reduction
from ispen_dist.linalg.trees import Tree

NUM_EXAMPLES = 7
CASES = [
    (task, curvature, objective)
    for task in ("multilabel", "bilstm")
    for curvature in ("hessian", "gauss_newton")
    for objective in ("ssvm", "task")
]


def rows_of(rank: int, num_ranks: int) -> list[int]:
    """Uneven shares of the batch; with three ranks one of them has nothing."""
    bounds = {1: [0, 7], 2: [0, 5, 7], 3: [0, 6, 6, 7]}[num_ranks]
    return list(range(bounds[rank], bounds[rank + 1]))


def share(batch: Batch, rows: list[int]) -> Batch:
    """Return these rows, or one filler of weight 0 where there are none."""
    chosen = rows or [0]
    weight = batch.weight[chosen] if rows else torch.zeros(1, dtype=batch.weight.dtype)
    inputs = {key: value[chosen] for key, value in batch.inputs.items()}
    return Batch(inputs, batch.target[chosen], weight, batch.index[chosen])


def compute(rank: int, num_ranks: int, reduction: Reduction) -> Tree:
    """Return the hypergradients of all cases, with the scalars of their solves."""
    result = {}
    for task, curvature, objective in CASES:
        rows = rows_of(rank, num_ranks)
        batches = [share(problems.random_batch(task, NUM_EXAMPLES, s), rows) for s in (0, 9)]
        problem = problems.build_problem(task, *batches, objective=objective, task_weight=1.0)
        solve = hypergradient(
            problem.inner,
            problem.outer,
            problem.theta,
            problem.phi,
            solver=CG(12, 1e-10),
            damping=3.0,
            curvature=curvature,
            reduction=reduction,
        )
        name = f"{task}/{curvature}/{objective}"
        result[f"{name}/value"] = problems.flatten(solve.value)
        result[f"{name}/implicit"] = problems.flatten(solve.implicit)
        result[f"{name}/losses"] = torch.stack([solve.inner_loss, solve.outer_loss])
        result[f"{name}/steps"] = torch.tensor([float(solve.num_steps), solve.residual])
        assert solve.status.usable, solve.status
    return result


def main() -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    session = Session()
    result = compute(session.rank, session.num_ranks, session.reduction)
    save_file(result, Path(sys.argv[1]) / f"rank{session.rank}.safetensors")
    session.close()


def one_rank() -> Tree:
    """The reference: the whole batch in one process."""
    return compute(0, 1, OneProcess())


if __name__ == "__main__":
    main()
