"""Every method file on tiny data, and what sets the methods apart from each other."""

import copy
import itertools
import math
from pathlib import Path

import numpy as np
import problems
import pytest
import torch
import yaml
from labels import SETTINGS as LABELS
from launched import TRAIN
from ranks import start_ranks
from records import rows_of
from tags import SETTINGS as TAGS
from tags import tagged_text

from ispen_dist import objectives
from ispen_dist.checkpoint import Checkpoint
from ispen_dist.command_line import config_from_dict, config_to_dict, load_config
from ispen_dist.config import ConfigError, InferenceConfig
from ispen_dist.config.problems import WITHOUT_THETA
from ispen_dist.data.loading import load_splits
from ispen_dist.distributed import Session
from ispen_dist.graphs.compiler import Compiler
from ispen_dist.implicit import outer_gradients, staged_outer_gradients
from ispen_dist.inference import descend, infer, mean_field, predict
from ispen_dist.inner import inner_step
from ispen_dist.inner_program import InnerProgram
from ispen_dist.linalg.operators import build_operator
from ispen_dist.linalg.staged_operators import build_staged_operator
from ispen_dist.losses import Losses
from ispen_dist.objectives import OUTER_OBJECTIVES
from ispen_dist.optim import Phase
from ispen_dist.outer import OuterStep
from ispen_dist.players import build_players, replicated
from ispen_dist.recording.console import Console
from ispen_dist.recording.run_folder import RunFolder
from ispen_dist.trainer import Trainer

METHODS = Path(__file__).parent.parent / "configs" / "methods"
NAMES = sorted(path.stem for path in METHODS.glob("*.yaml"))
TASKS = ("labels", "tags")
LEARNS_NOTHING = {"mle", "task_explicit"}
"""Methods whose energy stays as the warm-up leaves it; the file says why."""
SHORT = {"warmup_rounds": 1, "max_outer_steps": 2, "num_threads": 1, "dtype": "float64"}


@pytest.fixture(scope="module")
def task_files(tmp_path_factory):
    """The configuration files of both tasks, beside their data."""
    folder = tmp_path_factory.mktemp("tasks")
    features = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    np.savez(folder / "all.npz", features=features, targets=(features[:, :3] > 0).astype(np.uint8))
    for name, size, seed in (("train", 22, 0), ("dev", 6, 1)):
        (folder / f"{name}.conll").write_text(tagged_text(size, seed))
    data = {
        "labels": {"task": "multilabel", "format": "npz", "train": ["all.npz"]},
        "tags": {"train": ["train.conll"], "dev": "dev.conll"},
    }
    files = {}
    for task, settings in (("labels", LABELS), ("tags", TAGS)):
        own = {"data": data[task] | {"root": str(folder)}, "train": SHORT}
        own["solver"] = {"max_steps": 3, "damping": 30.0}  # no solve of so raw a network fails
        files[task] = folder / f"{task}.yaml"
        files[task].write_text(yaml.safe_dump(settings | own))
    return files


@pytest.fixture(scope="module")
def session():
    session = Session()
    yield session
    session.close()


def trainer_of(session, task_file, method):
    config = load_config(task_file, METHODS / f"{method}.yaml")
    folder = RunFolder(Path("unused"), config, Console(is_main=False), is_main=False)
    return Trainer(config, load_splits(config), session, folder)


def take_rounds(trainer, until=None):
    """Train without records up to a round, and return the figures of every round."""
    rows = []
    while trainer.round < (until or trainer.num_rounds):
        rows.append(trainer.rounds.take(trainer.round))
        trainer.round += 1
    return rows


def parameters(trainer):
    """Return copies of both networks by name."""
    return {
        name: {k: v.detach().clone() for k, v in engine.parameters().items()}
        for name, engine in trainer.engines.items()
    }


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[k], second[k]) for k in first)


def test_the_method_files_are_those_that_the_readme_names():
    table = (METHODS.parent.parent / "README.md").read_text("utf-8")
    section = table.partition("### Methods")[2].partition("\n### ")[0]
    pairs = {f"{o}_{m}" for o in ("ssvm", "dvn", "cd", "nce", "task", "nce_task")
             for m in ("explicit", "implicit")}  # fmt: skip
    assert pairs < set(NAMES)
    for name in set(NAMES) - pairs:
        assert f"`{name}`" in section, name


@pytest.mark.parametrize(
    ("name", "task"),
    [
        # The losses of the pairs are trained on tags by other tests.
        pytest.param(name, task, marks=[pytest.mark.thorough] if task == "tags" and pair else [])
        for name in NAMES
        for task in TASKS
        for pair in [name.endswith(("_explicit", "_implicit"))]
    ],
)
def test_every_method_trains(name, task, task_files, session):
    if name.startswith("crf") and task == "labels":
        with pytest.raises(ConfigError, match=r"energy\.name: expected linear_chain for outer"):
            load_config(task_files[task], METHODS / f"{name}.yaml")
        return
    trainer = trainer_of(session, task_files[task], name)
    rows = take_rounds(trainer, 1)
    before = parameters(trainer)
    rows += take_rounds(trainer)
    for row in rows:
        assert all(math.isfinite(v) for k, v in row.items() if k != "residual"), row
    assert all(math.isfinite(v) for v in trainer._evaluate(trainer.splits.dev).values())
    after = parameters(trainer)
    assert same(before["energy"], after["energy"]) == (name in LEARNS_NOTHING)
    by_stander = not trainer.config.inference.by_network
    assert same(before["inference_net"], after["inference_net"]) == by_stander
    assert sum("outer_loss" in row for row in rows) == (0 if name == "mle" else 2)


def test_the_registry_and_the_settings_agree_on_what_holds_theta_constant():
    constant = {name for name, row in OUTER_OBJECTIVES.items() if not row.depends_on_theta}
    assert constant == set(WITHOUT_THETA)


# -- structures inferred from the energy ---------------------------------------------------------


def players_of(task, **changes):
    config = problems.multilabel_config() if task == "multilabel" else problems.tagging_config(task)
    values = config_to_dict(config)
    for name, value in changes.items():
        section, key = name.split("__")
        values[section][key] = value
    codec = problems.multilabel_codec() if task == "multilabel" else problems.tagging_codec()
    players = build_players(config_from_dict(values), codec, problems.CPU)
    with torch.no_grad():
        for name, value in problems.random_phi(players).items():
            players.phi[name].copy_(value)
    return players


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_descent_reaches_the_minimum_of_a_convex_energy(momentum):
    target = torch.tensor([[0.2, 0.7, 0.5], [0.9, 0.1, 0.4]], dtype=torch.float64)
    config = InferenceConfig(steps=400, learning_rate=4.0, momentum=momentum)
    z = descend(lambda z: (z.sigmoid() - target).square().sum(), torch.zeros_like(target), config)
    torch.testing.assert_close(z.sigmoid(), target, rtol=0.0, atol=1e-10)
    assert not z.requires_grad


@pytest.mark.parametrize("task", ["multilabel", "bilstm"])
@pytest.mark.parametrize("start", ["zeros", "potentials"])
def test_descent_lowers_the_energy_and_the_cost_is_subtracted(task, start):
    players = players_of(
        task, inference__name="gradient_descent", inference__start=start, inference__steps=300,
        inference__learning_rate=3.0, outer__margin_scale=5.0,
    )  # fmt: skip
    batch = problems.random_batch(task, 5, 0)
    b = players.potentials(batch).detach()
    view = players.view(batch, b, b)
    relaxed = lambda z: players.space.relax(z, batch.inputs)  # noqa: E731
    energy = lambda z: view.energy(relaxed(z)[None])[0]  # noqa: E731
    augmented = lambda z: energy(z) - 5.0 * players.space.cost(relaxed(z), view.y)  # noqa: E731
    first = torch.zeros_like(b) if start == "zeros" else b
    found = infer(players, batch.inputs, b)
    other = infer(players, batch.inputs, b, gold=view.y)
    assert (energy(found) < energy(first)).all()
    assert (augmented(other) < augmented(first)).all()
    assert augmented(other).sum() < augmented(found).sum() - 0.1
    assert energy(found).sum() < energy(other).sum() - 0.1


@pytest.mark.parametrize("task", ["multilabel", "bilstm"])
@pytest.mark.parametrize("unrolled", [True, False])
def test_the_gradient_of_the_outer_loss_is_that_of_its_structure(task, unrolled):
    """Unrolled: a finite difference through the steps. Otherwise the structure is a constant."""
    players = players_of(
        task, inference__name="gradient_descent", inference__unrolled=unrolled, inference__steps=4,
        inference__momentum=0.5, inference__start="potentials", outer__objective="dvn",
    )  # fmt: skip
    batch, generator = problems.random_batch(task, 5, 0), torch.Generator()
    losses = Losses(players, replicated(players))
    _, gradient = losses.energy_gradient(batch, generator)
    draw = torch.Generator().manual_seed(7)
    direction = {k: torch.randn(g.shape, generator=draw).to(g) for k, g in gradient.items()}
    constant = infer(players, batch.inputs, players.potentials(batch).detach())

    def loss(step):
        with torch.no_grad():
            for name, p in players.phi.items():
                p.add_(step * direction[name])
        b = players.potentials(batch).detach()
        logits = infer(players, batch.inputs, b) if unrolled else constant
        value = OUTER_OBJECTIVES["dvn"].loss(players.view(batch, logits, b)).mean()
        with torch.no_grad():
            for name, p in players.phi.items():
                p.sub_(step * direction[name])
        return value

    eps = 1e-5
    expected = (loss(eps) - loss(-eps)) / (2 * eps)
    found = sum((g * direction[k]).sum() for k, g in gradient.items())
    assert abs(found) > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)


def test_a_chain_is_summed_and_solved_as_by_enumeration():
    players = players_of("bilstm", outer__objective="crf", inference__name="viterbi")
    batch = problems.random_tagging_batch(6)
    batch.inputs["mask"][5] = False  # a filler
    b = players.potentials(batch).detach()
    view = players.view(batch, b, b)
    nll, best = objectives.crf(view).detach(), infer(players, batch.inputs, b).argmax(-1)
    num_tags = b.shape[-1]
    for row, length in enumerate(batch.inputs["mask"].sum(-1).tolist()):
        if not length:
            assert math.isfinite(nll[row])
            continue
        paths = torch.tensor(list(itertools.product(range(num_tags), repeat=length)))
        y = torch.zeros(len(paths), *b.shape[1:], dtype=b.dtype)
        y[:, :length] = torch.nn.functional.one_hot(paths, num_tags).to(b.dtype)
        energy = players.energy.score(b[row], y).detach()
        gold = players.energy.score(b[row : row + 1], view.y[row : row + 1])[0]
        torch.testing.assert_close(nll[row], gold + torch.logsumexp(-energy, 0), rtol=1e-10, atol=0)
        assert best[row, :length].tolist() == paths[energy.argmin()].tolist()


@pytest.mark.parametrize("task", ["multilabel", "bilstm"])
def test_mean_field_is_stationary_in_the_free_energy_of_the_product(task):
    """The free energy is that of an independent distribution against P exp(-w E)."""
    weight = 0.7
    players = players_of(
        task, inference__name="mean_field", inference__steps=200,
        inference__energy_weight=weight,
    )  # fmt: skip
    batch = problems.random_batch(task, 5, 0)
    b, logits = (players.potentials(batch).detach() * c for c in (1.0, -2.0))
    energy, mask = players.energy_at(b), batch.inputs.get("mask")

    def free_energy(z):
        ybar = players.space.relax(z, batch.inputs)
        entropy = torch.special.entr(ybar.clamp(min=1e-300))  # padding is 0
        if mask is None:  # a label has two values
            entropy = entropy + torch.special.entr(1.0 - ybar)
        product = players.space.nll(logits, ybar) + weight * energy(ybar[None])[0]
        return product - entropy.flatten(1).sum(1)

    found = mean_field(players, batch.inputs, logits, b)
    assert (free_energy(found) < free_energy(logits)).all()
    slopes = []
    for z in (logits, found):
        z.requires_grad_()
        slopes.append(torch.autograd.grad(free_energy(z).sum(), z)[0].abs().max())
    assert slopes[0] > 1e-2
    assert slopes[1] < 1e-12


def test_mean_field_trains_as_the_network_alone_and_predicts_something_else(task_files, session):
    pair = ["nce_task_identity", "nce_task_identity_mean_field"]
    trainers = [trainer_of(session, task_files["labels"], name) for name in pair]
    for trainer in trainers:
        take_rounds(trainer)
    first, second = (parameters(trainer) for trainer in trainers)
    for name, tree in first.items():
        assert same(tree, second[name])
    sample = trainers[0].splits.dev.collate([0, 1, 2])
    inputs = sample.to(sample.weight.device, torch.float64).inputs
    alone, corrected = (predict(t.players, t.engines, inputs) for t in trainers)
    b = trainers[0].players.energy.potentials(inputs).detach()
    head = trainers[0].players.energy.label_bias
    assert (alone - corrected).abs().min() > 1e-3
    assert (corrected - alone - b - head).abs().max() < 1.0  # what the small global term adds


# -- two heads -----------------------------------------------------------------------------------

HEADS = {"inference__cost_augmented": True, "outer__objective": "ssvm_plus"}


@pytest.mark.parametrize("task", ["multilabel", "transformer"])
def test_both_heads_enter_the_losses_as_in_the_formula(task):
    players = players_of(task, outer__margin_scale=2.0, **HEADS)
    batch = problems.random_batch(task, 5, 0)
    logits, b = players.inference_net(batch.inputs), players.potentials(batch)
    half = logits.shape[-1] // 2
    view = players.view(batch, logits, b)
    space, y = players.space, view.y
    predicted, augmented = (space.relax(z, batch.inputs) for z in logits.split(half, -1))
    energy = lambda ybar: players.energy(batch.inputs, ybar)  # noqa: E731
    likelihood = space.nll(logits[..., :half], y) + space.nll(logits[..., half:], y)
    of_augmented = energy(augmented) - 2.0 * space.cost(augmented, y)
    total = likelihood + 0.3 * (energy(predicted) + of_augmented)
    torch.testing.assert_close(objectives.inner(view, 0.3)[0], total.sum())
    hinge = torch.relu(energy(y) - of_augmented) + torch.relu(energy(y) - energy(predicted))
    torch.testing.assert_close(objectives.outer(view, "ssvm_plus")[0], hinge.sum())


def test_two_heads_take_every_path_alike():
    """Plain and compiled inner steps; outer gradients and products of graph and stages."""
    batches = [problems.random_multilabel_batch(5, seed) for seed in range(3)]
    plain, compiled = (players_of("multilabel", **HEADS) for _ in range(2))
    engines = [replicated(players) for players in (plain, compiled)]
    for pair in engines:
        optimizer = plain.config.inner.optimizer
        pair.inference_net.begin(Phase("inner", optimizer, 9, frozenset({"all"})))
    rows = [inner_step(plain, engines[0], batch, 0.3) for batch in batches]
    program = InnerProgram(compiled, engines[1], Compiler("trace"))
    for row, other in zip(rows, program(batches, 0.3, lambda i: None), strict=True):
        for key in row:
            torch.testing.assert_close(other[key], row[key], rtol=1e-10, atol=1e-12)
    losses, draw = Losses(plain, engines[0]), torch.Generator()
    graph = outer_gradients(losses.outer_graph(batches[0], draw), losses.theta(), losses.phi())
    staged = staged_outer_gradients(losses.outer_staged(batches[0], draw))
    torch.testing.assert_close(staged, graph, rtol=1e-10, atol=1e-12)
    v = {k: torch.ones_like(p) for k, p in losses.theta().items()}
    whole = build_operator(
        "hessian", losses.inner_graph(batches[1]), losses.theta(), losses.phi()
    ).matvec(v)
    by_stages = build_staged_operator("hessian", losses.inner_staged(batches[1])).matvec(v)
    torch.testing.assert_close(by_stages, whole, rtol=1e-10, atol=1e-12)


# -- orders --------------------------------------------------------------------------------------


def test_energy_first_learns_one_network_at_a_time(task_files, session):
    trainer = trainer_of(session, task_files["labels"], "seal_static_nce")
    assert trainer.num_rounds == 1 + 2 + 2
    take_rounds(trainer, 1)
    warm = parameters(trainer)
    rows = take_rounds(trainer, 3)
    assert all("outer_loss" in row and "inner_loss" not in row for row in rows)
    learned = parameters(trainer)
    assert same(learned["inference_net"], warm["inference_net"])
    assert not same(learned["energy"], warm["energy"])
    rows = take_rounds(trainer)
    assert all("outer_loss" not in row and row["energy"] != 0.0 for row in rows)
    assert same(parameters(trainer)["energy"], learned["energy"])
    assert not same(parameters(trainer)["inference_net"], learned["inference_net"])
    assert trainer.engines.inference_net.num_taken == 3 * trainer.config.inner.steps


@pytest.mark.parametrize(("method", "stop"), [("seal_static_nce", 2), ("seal_static_nce", 4),
                                              ("dvn", 2), ("infnet", 3)])  # fmt: skip
def test_a_run_goes_on_bit_for_bit_in_the_middle_of_every_order(method, stop, task_files, session):
    whole = trainer_of(session, task_files["tags"], method)
    take_rounds(whole, stop)
    trees, state = copy.deepcopy((whole._trees(), whole._state()))
    expected = take_rounds(whole)
    resumed = trainer_of(session, task_files["tags"], method)
    resumed.restore(Checkpoint(stop, trees, state))
    assert take_rounds(resumed) == expected
    for name, tree in parameters(whole).items():
        assert same(parameters(resumed)[name], tree), name


def test_outer_steps_of_a_round_count_through(task_files, session, monkeypatch):
    trainer = trainer_of(session, task_files["labels"], "seal_nce")
    values = config_to_dict(trainer.config)
    values["outer"]["steps"] = 3
    config = config_from_dict(values)
    several = Trainer(config, trainer.splits, session, trainer.folder)
    seen = []
    take = OuterStep.__call__
    monkeypatch.setattr(OuterStep, "__call__", lambda *at: seen.append(at[-1]) or take(*at))
    take_rounds(several)
    assert seen == list(range(6))
    assert several.engines.energy.num_taken == several.rounds.learning.num_steps == 6


@pytest.mark.thorough
@pytest.mark.parametrize("runtime", ["replicas", "zero3", "fsdp2"])
@pytest.mark.parametrize(
    ("method", "inference"),
    [
        ("dvn", "gradient_descent"),
        ("spen_unrolled", "gradient_descent"),
        ("infnet_plus", "network"),
        ("ssvm_explicit", "mean_field"),
    ],
)
def test_two_ranks_learn_what_one_does(method, inference, runtime, task_files, tmp_path):
    """Also where the energy that descent and mean field read is sharded."""
    arguments = [
        "--config", str(task_files["labels"]), "--config", str(METHODS / f"{method}.yaml"),
        "--inference_net.dropout=0", "--energy.features.dropout=0", "--train.dtype=float32",
        "--energy.freeze_local=false", f"--inference.name={inference}",
    ]  # fmt: skip
    for name, num_ranks in (("replicas", 1), (runtime, 2)):
        output = str(tmp_path / str(num_ranks))
        start_ranks(TRAIN, num_ranks, *arguments, "--output", output, runtime=name)
    one, two = rows_of(tmp_path / "1"), rows_of(tmp_path / "2")
    assert len(one) == len(two) > 3
    for first, second in zip(one, two, strict=True):
        assert first.keys() == second.keys()
        for key in first.keys() - {"phase"}:
            assert second[key] == pytest.approx(first[key], rel=1e-3, abs=1e-5), key
