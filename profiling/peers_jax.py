"""The benchmark problems in jax.numpy, as a JAX user would write them for speed.

Parameters and data come from the torch problem. A product is the compiled linear map at stored
residuals of the gradient, linearised once; a whole hypergradient is one compiled function: outer
gradient, a loop of conjugate gradients, mixed derivative. The mixed derivative is `d_phi` of the
directional derivative of G along q, one tangent pass of the network and no second reverse pass.

Importing this module sets environment variables that jax reads once, so it must come before any
other import of jax; it takes the number of threads that torch has at that moment, where that is
one. Data are arguments of the compiled functions: as constants XLA would fold them at compile time.

Shapes: B batch, T tokens, F hashed features per token, D width, N heads, K tags, L labels.
"""

import math
import os
from collections.abc import Callable
from typing import Any

import torch
from bench_problems import Problem

from ispen_dist.config import NetworkConfig
from ispen_dist.linalg.trees import Tree
from ispen_dist.models.encoders import MASKED_SCORE

if torch.get_num_threads() == 1:
    # The first two are for the compiled code, the last sizes the pool that runs it.
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "")
        + " --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    )
    os.environ["NPROC"] = "1"

import jax
import jax.numpy as jnp

Arrays = dict[str, Any]
Function = Callable[..., Any]
LAYER_NORM_EPSILON = 1e-5


def gradient(problem: Problem) -> Callable[[], Tree]:
    """Return one compiled gradient of G in theta."""
    inner, _, theta, phi, data = _problem(problem)
    function = _compiled(jax.grad(inner), theta, phi, data)
    return lambda: _to_torch(function(theta, phi, data))


def product(problem: Problem, v: Tree) -> Callable[[], Tree]:
    """Return one compiled product with the Hessian, its residuals computed beforehand."""
    inner, _, theta, phi, data = _problem(problem)
    direction = _from_torch(v)

    @jax.jit
    def linearised(theta: Arrays, phi: Arrays, data: Arrays) -> Any:
        return jax.linearize(lambda t: jax.grad(inner)(t, phi, data), theta)[1]

    # The linear map is a pytree of its residuals, so it can be an argument of a compiled function.
    linear_map = jax.block_until_ready(linearised(theta, phi, data))
    function = _compiled(lambda H, u: H(u), linear_map, direction)
    return lambda: _to_torch(function(linear_map, direction))


def hypergradient(problem: Problem, num_steps: int) -> Callable[[], Tree]:
    """Return a whole hypergradient, compiled as one function."""
    inner, outer, theta, phi, data = _problem(problem)

    def whole(theta: Arrays, phi: Arrays, data: Arrays) -> Arrays:
        rhs, explicit = jax.grad(outer, argnums=(0, 1))(theta, phi, data)
        H = _hessian(problem, lambda t: jax.grad(inner)(t, phi, data), theta)
        q = conjugate_gradients(lambda v: _add_scaled(H(v), problem.damping, v), rhs, num_steps)

        def along_q(phi: Arrays) -> Any:
            return jax.jvp(lambda t: inner(t, phi, data), (theta,), (q,))[1]

        return _add_scaled(explicit, -1.0, jax.grad(along_q)(phi))

    function = _compiled(whole, theta, phi, data)
    return lambda: _to_torch(function(theta, phi, data))


def _hessian(problem: Problem, gradient: Function, theta: Arrays) -> Function:
    """Return the product with the Hessian inside a compiled loop, in the faster of its two forms.

    On an MLP XLA itself moves what is constant out of the loop, and saves 6% over residuals that
    are stored; on a transformer of 2 blocks it costs 9% (jax 0.10.2, one CPU thread). A kept
    reverse pass was no faster on the first and took 1.6 times as long on the second.
    """
    if problem.name == "bibtex":
        return lambda v: jax.jvp(gradient, (theta,), (v,))[1]
    return jax.linearize(gradient, theta)[1]


def conjugate_gradients(matvec: Function, rhs: Arrays, num_steps: int) -> Arrays:
    """Take that many steps from zero.

    `jax.scipy.sparse.linalg.cg` is the same but for a product with its zero start and a stopping
    rule.
    """

    def step(_: int, state: Any) -> Any:
        q, r, p, rr = state
        Ap = matvec(p)
        alpha = rr / _dot(p, Ap)
        q, r = _add_scaled(q, alpha, p), _add_scaled(r, -alpha, Ap)
        rr_next = _dot(r, r)
        return q, r, _add_scaled(r, rr_next / rr, p), rr_next

    start = (jax.tree.map(jnp.zeros_like, rhs), rhs, rhs, _dot(rhs, rhs))
    return jax.lax.fori_loop(0, num_steps, step, start)[0]


def _dot(a: Arrays, b: Arrays) -> Any:
    return sum(jnp.vdot(a[k], b[k]) for k in a)


def _add_scaled(y: Arrays, scale: Any, x: Arrays) -> Arrays:
    return {k: y[k] + scale * x[k] for k in y}


def _compiled(function: Function, *arguments: Any) -> Function:
    return jax.jit(function).lower(*arguments).compile()


# -- torch to jax and back ------------------------------------------------------------------------


def _from_torch(tree: Tree) -> Arrays:
    return {k: jnp.asarray(v.detach().cpu().numpy()) for k, v in tree.items()}


def _to_torch(arrays: Arrays) -> Tree:
    """Wait for the result, and return it without a copy."""
    return {k: torch.from_dlpack(v) for k, v in jax.block_until_ready(arrays).items()}


def _problem(problem: Problem) -> tuple[Function, Function, Arrays, Arrays, Arrays]:
    """Return G and L, `(theta, phi, data) -> scalar`, with their arguments."""
    config, batch = problem.players.config, problem.batch
    network, features = _network(config.inference_net), _network(config.energy.features)
    space = _LABELS if config.energy.name == "label_interaction" else _TAGS
    data = {
        "inputs": _from_torch(batch.inputs),
        "target": jnp.asarray(batch.target.cpu().numpy()),
        "weight": jnp.asarray(batch.weight.cpu().numpy()),
        "energy": _from_torch(dict(problem.players.energy.named_parameters())),
    }

    def mean(loss_B: Any, data: Arrays) -> Any:
        return (loss_B * data["weight"]).sum() / data["weight"].sum()

    def inner(theta: Arrays, phi: Arrays, data: Arrays) -> Any:
        inputs, head = data["inputs"], data["energy"] | phi
        logits = network(theta, inputs)
        b = features(_part(head, "feature_network."), inputs) + head["label_bias"]
        y = space["encode"](data["target"], inputs, logits)
        energy = space["energy"](head, b, space["relax"](logits, inputs))
        return mean(space["nll"](logits, y) + config.inner.energy_weight * energy, data)

    def outer(theta: Arrays, phi: Arrays, data: Arrays) -> Any:
        inputs = data["inputs"]
        logits = network(theta, inputs)
        y = space["encode"](data["target"], inputs, logits)
        return mean(space["cost"](space["relax"](logits, inputs), y), data)

    return inner, outer, _from_torch(problem.theta), _from_torch(problem.phi), data


# -- networks, after ispen_dist.models ------------------------------------------------------------


def _network(config: NetworkConfig) -> Function:
    """Return `(parameters, inputs) -> logits` of a network without dropout."""
    if config.name == "mlp" and config.activation == "relu":
        return _mlp
    if config.name == "transformer":
        return lambda p, inputs: _transformer(p, inputs, config.num_layers, config.num_heads)
    raise ValueError(
        f"peers_jax: expected a relu mlp or a transformer, got {config.name} with "
        f"{config.activation}; write it here or leave jax out"
    )


def _part(p: Arrays, prefix: str) -> Arrays:
    return {k.removeprefix(prefix): v for k, v in p.items() if k.startswith(prefix)}


def _linear(p: Arrays, name: str, x: Any) -> Any:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def _layer_norm(p: Arrays, name: str, x: Any) -> Any:
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred * centred).mean(-1, keepdims=True)
    normalised = centred * jax.lax.rsqrt(variance + LAYER_NORM_EPSILON)
    return normalised * p[f"{name}.weight"] + p[f"{name}.bias"]


def _mlp(p: Arrays, inputs: Arrays) -> Any:
    names = sorted({k.rpartition(".")[0] for k in p}, key=lambda k: int(k.rpartition(".")[2]))
    x = inputs["features"]
    for name in names[:-1]:
        x = jax.nn.relu(_linear(p, name, x))
    return _linear(p, names[-1], x)


def _transformer(p: Arrays, inputs: Arrays, num_blocks: int, num_heads: int) -> Any:
    ids_BTF = inputs["features"]
    present = (ids_BTF != 0).astype(p["embedding.weight"].dtype)
    x_BTD = jnp.einsum("btf,btfd->btd", present, p["embedding.weight"][ids_BTF])
    padded = jnp.pad(x_BTD, ((0, 0), (1, 1), (0, 0)))
    window = jnp.concatenate([padded[:, :-2], x_BTD, padded[:, 2:]], axis=-1)
    h_BTD = _linear(p, "encoder.project", window)
    h_BTD = h_BTD + _positions(h_BTD.shape[1], h_BTD.shape[2], h_BTD.dtype)
    bias_B11T = (~inputs["mask"]).astype(h_BTD.dtype)[:, None, None, :] * MASKED_SCORE
    for i in range(num_blocks):
        h_BTD = _block(_part(p, f"encoder.blocks.{i}."), h_BTD, bias_B11T, num_heads)
    h_BTD = _layer_norm(p, "encoder.final_norm", h_BTD)
    return _linear(p, "output", jnp.concatenate([h_BTD, x_BTD], axis=-1))


def _positions(num_positions: int, width: int, dtype: Any) -> Any:
    position = jnp.arange(num_positions, dtype=dtype)
    channel = jnp.arange((width + 1) // 2, dtype=dtype)
    angle = position[:, None] * jnp.exp(channel * (-2.0 * math.log(1e4) / width))
    pairs = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    return pairs.reshape(num_positions, -1)[:, :width]


def _block(p: Arrays, h_BTD: Any, bias_B11T: Any, num_heads: int) -> Any:
    B, T, D = h_BTD.shape
    normalised = _layer_norm(p, "attention_norm", h_BTD)
    heads = _linear(p, "attention.qkv", normalised).reshape(B, T, 3, num_heads, D // num_heads)
    q, k, v = jnp.moveaxis(heads, 2, 0)
    scores = jnp.einsum("bind,bjnd->bnij", q, k) / math.sqrt(D // num_heads) + bias_B11T
    mixed = jnp.einsum("bnij,bjnd->bind", jax.nn.softmax(scores, axis=-1), v)
    h_BTD = h_BTD + _linear(p, "attention.out", mixed.reshape(B, T, D))
    hidden = _linear(p, "feedforward.0", _layer_norm(p, "feedforward_norm", h_BTD))
    return h_BTD + _linear(p, "feedforward.3", jax.nn.gelu(hidden, approximate=False))


# -- output spaces and energies, after ispen_dist.models ------------------------------------------


def _label_nll(logits_BL: Any, y_BL: Any) -> Any:
    return (jax.nn.softplus(logits_BL) - logits_BL * y_BL).sum(-1)


def _label_cost(ybar_BL: Any, y_BL: Any) -> Any:
    overlap, size = (ybar_BL * y_BL).sum(-1), ybar_BL.sum(-1) + y_BL.sum(-1)
    empty = size == 0
    return jnp.where(empty, 0.0, 1.0 - 2.0 * overlap / jnp.where(empty, 1.0, size))


def _label_energy(head: Arrays, b_BL: Any, ybar_BL: Any) -> Any:
    return jax.nn.softplus(ybar_BL @ head["M"].T) @ head["v"] - (ybar_BL * b_BL).sum(-1)


def _tag_cost(ybar_BTK: Any, y_BTK: Any) -> Any:
    num_tokens = jnp.maximum(y_BTK.sum((-1, -2)), 1.0)
    return 1.0 - (ybar_BTK * y_BTK).sum((-1, -2)) / num_tokens


def _chain_energy(head: Arrays, b_BTK: Any, ybar_BTK: Any) -> Any:
    pairwise = (ybar_BTK[:, :-1] @ head["W"]) * ybar_BTK[:, 1:]
    return -((ybar_BTK * b_BTK).sum((-1, -2)) + pairwise.sum((-1, -2)))


def _one_hot(target_BT: Any, inputs: Arrays, logits_BTK: Any) -> Any:
    one_hot = jax.nn.one_hot(target_BT, logits_BTK.shape[-1], dtype=logits_BTK.dtype)
    return one_hot * inputs["mask"][..., None]


_LABELS: dict[str, Function] = {
    "encode": lambda target_BL, inputs, logits_BL: target_BL,
    "relax": lambda logits_BL, inputs: jax.nn.sigmoid(logits_BL),
    "nll": _label_nll,
    "cost": _label_cost,
    "energy": _label_energy,
}
_TAGS: dict[str, Function] = {
    "encode": _one_hot,
    "relax": lambda logits, inputs: jax.nn.softmax(logits, axis=-1) * inputs["mask"][..., None],
    "nll": lambda logits, y: -(jax.nn.log_softmax(logits, axis=-1) * y).sum((-1, -2)),
    "cost": _tag_cost,
    "energy": _chain_energy,
}
