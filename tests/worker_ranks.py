"""One rank of a run under some runtime; started by test_runtimes.py.

Writes the hypergradients of all tiny problems and a short training trajectory of both networks,
whole tensors on every rank. The same computed in one process by plain PyTorch is `reference`.
"""

import dataclasses
import sys
from pathlib import Path

import problems
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ispen_dist import CG, hypergradient
from ispen_dist.config import OptimizerConfig, SolverConfig
from ispen_dist.data.batch import Batch
from ispen_dist.engine import Engine, Engines
from ispen_dist.inner import inner_step, pretrain_local_step
from ispen_dist.linalg.solver import Solver
from ispen_dist.linalg.solvers import Sama
from ispen_dist.linalg.trees import Tree
from ispen_dist.losses import Losses
from ispen_dist.optim import Phase
from ispen_dist.outer import OuterStep, SolverRecord
from ispen_dist.players import Players, build_players, groups_of, replicated

NUM_EXAMPLES = 9
SOLVER = {"name": "cg", "max_steps": 12, "rtol": 1e-6, "damping": 30.0, "warm_start": False}
DAMPING = dict.fromkeys(problems.IMAGES, 100.0)
"""Of problems whose most negative curvature is beyond that of `SOLVER`: -52 and -33 here."""
DTYPES = {"float64": torch.float64, "float32": torch.float32}
CURVATURES = ("hessian", "gauss_newton")
THETA = OptimizerConfig(
    learning_rate=3e-3, weight_decay=0.01, final_fraction=0.1, clip_norm=0.5, pretrained_factor=0.3
)
LOCAL = OptimizerConfig(learning_rate=2e-3, weight_decay=0.02, clip_norm=0.3, pretrained_factor=0.2)
PHI = OptimizerConfig(learning_rate=1e-3, weight_decay=0.03, clip_norm=0.2, pretrained_factor=0.1)
TRAJECTORIES = ("multilabel", "bilstm", "transformer", "pretrained")
NUM_STEPS, NUM_PRETRAINING = 14, 6


def rows_of(rank: int, num_ranks: int) -> list[int]:
    """Uneven shares of the batch; with four ranks one of them has nothing."""
    bounds = {1: [0, 9], 2: [0, 7, 9], 3: [0, 6, 6, 9], 4: [0, 4, 4, 7, 9]}[num_ranks]
    return list(range(bounds[rank], bounds[rank + 1]))


def share(batch: Batch, rows: list[int]) -> Batch:
    """Return these rows, or one filler of weight 0 where there are none."""
    chosen = rows or [0]
    weight = batch.weight[chosen] if rows else torch.zeros(1, dtype=batch.weight.dtype)
    inputs = {key: value[chosen] for key, value in batch.inputs.items()}
    return Batch(inputs, batch.target[chosen], weight, batch.index[chosen])


def players_of(
    task: str, dtype: str, curvature: str = "hessian", memory: str = "auto", solver_name: str = "cg"
) -> Players:
    config = problems.config_of(task, objective="ssvm", task_weight=1.0)
    settings = {**SOLVER, "name": solver_name, "curvature": curvature, "memory": memory}
    settings["damping"] = DAMPING.get(task, SOLVER["damping"])
    solver = dataclasses.replace(config.solver, **settings)
    # Wider than the tiny problems: a layer norm of two units is too ill-conditioned for float32.
    net = dataclasses.replace(config.inference_net, hidden_size=8, embedding_size=6, num_heads=2)
    config = dataclasses.replace(
        config,
        inference_net=net,
        energy=dataclasses.replace(config.energy, features=net),
        solver=solver,
        train=dataclasses.replace(config.train, dtype=dtype, method="implicit"),
    )
    players = build_players(config, problems.codec_of(task), problems.CPU)
    with torch.no_grad():
        for name, value in problems.random_phi(players).items():
            players.phi[name].copy_(value)
    return players


def batch_of(task: str, seed: int, rows: list[int], dtype: str) -> Batch:
    batch = problems.random_batch(task, NUM_EXAMPLES, seed)
    return share(batch, rows).to(problems.CPU, DTYPES[dtype])


def engines_of(session, players: Players) -> tuple[Players, Engines]:
    networks = {"inference_net": players.inference_net, "energy": players.energy}
    engines = Engines(*(session.engine(n, net, groups_of(net)) for n, net in networks.items()))
    plain = players.with_networks(engines.inference_net.network, engines.energy.network)
    return plain, engines


def whole(prefix: str, engine: Engine, tree: Tree) -> Tree:
    return {f"{prefix}/{name}": value.clone() for name, value in engine.whole(tree)}


TASKS = tuple(task for task in problems.TASKS if task != "token_mlp")
"""All kinds of stages: the missing one has those of a transformer without its blocks."""


def hypergradients(session, dtype: str) -> Tree:
    """Return explicit and implicit part of every problem, by every curvature and memory."""
    rows = rows_of(session.rank, session.num_ranks)
    result: Tree = {}
    for task in TASKS:
        built = engines_of(session, players_of(task, dtype))
        for curvature in CURVATURES:
            for memory in ("auto", "recompute"):
                config = players_of(task, dtype, curvature, memory).config
                players = dataclasses.replace(built[0], config=config)
                step = OuterStep(players, built[1], 0, SolverRecord(damping=config.solver.damping))
                inner, outer = (batch_of(task, seed, rows, dtype) for seed in (0, 9))
                solve = step.hypergradient(inner, outer, 0)
                assert solve.status.usable, solve.status
                name = f"{dtype}/{task}/{curvature}"
                for part in ("explicit", "implicit"):
                    tree = getattr(solve, part)
                    result |= whole(f"{name}/{part}/{memory}", built[1].energy, tree)
    return result


def trajectory(session, task: str, solver_name: str = "cg") -> Tree:
    """Return both networks after `NUM_STEPS` steps through the engines."""
    players, engines = engines_of(session, players_of(task, "float32", solver_name=solver_name))
    rows = rows_of(session.rank, session.num_ranks)
    theta, phi = (frozenset(engine.groups) for _, engine in engines.items())
    engines.inference_net.begin(Phase("inner", THETA, NUM_STEPS, theta))
    engines.energy.begin(Phase("pretrain", LOCAL, NUM_PRETRAINING, phi - {"head"}))
    outer_step = OuterStep(players, engines, 0, SolverRecord(damping=SOLVER["damping"]))
    for i in range(NUM_STEPS):
        batch = batch_of(task, i, rows, "float32")
        inner_step(players, engines, batch, 0.3)
        if i < NUM_PRETRAINING:
            pretrain_local_step(players, engines, batch)
            continue
        if i == NUM_PRETRAINING:
            engines.energy.begin(Phase("outer", PHI, NUM_STEPS - NUM_PRETRAINING, phi))
        outer_step(batch, batch_of(task, 100 + i, rows, "float32"), i)
    return whole("theta", engines.inference_net, engines.inference_net.parameters()) | whole(
        "phi", engines.energy, engines.energy.parameters()
    )


# -- the reference: one process, the whole batch, plain PyTorch ----------------------------------

PLAIN_SOLVER = CG(SOLVER["max_steps"], SOLVER["rtol"])


def reference_hypergradients(dtype: str) -> Tree:
    """Return what `hypergradients` should, from the graph of the whole gradient."""
    result: Tree = {}
    for task in TASKS:
        players = players_of(task, dtype)
        for curvature in CURVATURES:
            solve = plain_solve(players, task, curvature, dtype, 0, 9, 0)
            for part in ("explicit", "implicit"):
                for name, value in getattr(solve, part).items():
                    result[f"{dtype}/{task}/{curvature}/{part}/{name}"] = value
    return result


def plain_solve(
    players, task, curvature, dtype, inner_seed, outer_seed, step, solver: Solver = PLAIN_SOLVER
):
    losses = Losses(players, replicated(players))
    inner, outer = (
        batch_of(task, seed, list(range(NUM_EXAMPLES)), dtype) for seed in (inner_seed, outer_seed)
    )
    return hypergradient(
        losses.inner_graph(inner),
        losses.outer_graph(outer, torch.Generator().manual_seed(step)),
        losses.theta(),
        losses.phi(),
        solver=solver,
        damping=players.config.solver.damping,
        curvature=curvature,
    )


def of_encoder(task: str, name: str) -> bool:
    """Whether a parameter is of a pretrained encoder."""
    own = name.removeprefix("feature_network.")
    return task == "pretrained" and own.startswith(("embeddings.", "blocks."))


def by_layers(task: str, tree: Tree) -> list[dict]:
    """Return the optimizer's groups: new parameters, and those of an encoder if there are any."""
    groups = ([p for n, p in tree.items() if of_encoder(task, n) == x] for x in (False, True))
    return [{"params": group} for group in groups if group]


def reference_trajectory(task: str, solver_name: str = "cg") -> Tree:
    """Return both networks after the same steps by AdamW, clip_grad_norm_ and autograd."""
    players = players_of(task, "float32")
    theta, local, phi = (
        torch.optim.AdamW(by_layers(task, tree), weight_decay=config.weight_decay)
        for tree, config in ((players.theta, THETA), (players.local, LOCAL), (players.phi, PHI))
    )
    phases = (
        Phase("inner", THETA, NUM_STEPS, frozenset()),
        Phase("pretrain", LOCAL, NUM_PRETRAINING, frozenset()),
        Phase("outer", PHI, NUM_STEPS - NUM_PRETRAINING, frozenset()),
    )

    def update(optimizer: torch.optim.Optimizer, phase: Phase, step: int) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, phase.config.clip_norm)
        rate = phase.learning_rate(step)
        for group, factor in zip(
            optimizer.param_groups, (1.0, phase.config.pretrained_factor), strict=False
        ):
            group["lr"] = rate * factor
        optimizer.step()
        optimizer.zero_grad()

    def likelihood(logits: Tensor, batch: Batch) -> Tensor:
        y = players.space.encode(batch.target, batch.inputs, logits.dtype)
        return players.space.nll(logits, y)

    for i in range(NUM_STEPS):
        batch = batch_of(task, i, list(range(NUM_EXAMPLES)), "float32")
        logits = players.inference_net(batch.inputs)
        ybar = players.space.relax(logits, batch.inputs)
        (likelihood(logits, batch) + 0.3 * players.energy(batch.inputs, ybar)).mean().backward()
        players.energy.zero_grad()
        update(theta, phases[0], i)
        if i < NUM_PRETRAINING:
            likelihood(players.energy.feature_network(batch.inputs), batch).mean().backward()
            update(local, phases[1], i)
            continue
        solver: Solver = PLAIN_SOLVER
        if solver_name == "sama":
            metric = {
                name: ((theta.state[p]["exp_avg_sq"] / (1.0 - 0.999 ** (i + 1))).sqrt() + 1e-8)
                / (THETA.pretrained_factor if of_encoder(task, name) else 1.0)
                for name, p in players.theta.items()
            }
            solver = Sama(SolverConfig().scale, metric)
        solve = plain_solve(players, task, "hessian", "float32", i, 100 + i, 0, solver)
        for name, value in solve.value.items():
            players.phi[name].grad = value
        update(phi, phases[2], i - NUM_PRETRAINING)
    result = {f"theta/{n}": p.detach() for n, p in players.theta.items()}
    return result | {f"phi/{n}": p.detach() for n, p in players.energy.named_parameters()}


def main() -> None:
    from ispen_dist.distributed import Session

    torch.set_num_threads(1)
    folder, wanted = Path(sys.argv[1]), sys.argv[2].split(",")
    session = Session()
    result: Tree = {}
    for dtype in DTYPES:
        if dtype in wanted:
            result |= hypergradients(session, dtype)
    if "trajectory" in wanted:
        for task in TRAJECTORIES:
            result |= {f"{task}/{k}": v for k, v in trajectory(session, task).items()}
    if "sama" in wanted:
        result |= {f"sama/{k}": v for k, v in trajectory(session, "pretrained", "sama").items()}
    # A gradient may lie by columns (`constant_linear`); safetensors stores rows only.
    save_file(
        {name: value.contiguous() for name, value in result.items()},
        folder / f"rank{session.rank}.safetensors",
    )
    session.close()


if __name__ == "__main__":
    main()
