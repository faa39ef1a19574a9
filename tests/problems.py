"""Tiny bilevel problems with independent dense references, for the proofs."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from ispen_dist.config import (
    Config,
    DataConfig,
    EnergyConfig,
    FeatureConfig,
    InnerConfig,
    NetworkConfig,
    OuterConfig,
    TrainConfig,
)
from ispen_dist.data.batch import Batch
from ispen_dist.data.datasets import Codec, MultiLabelCodec, TaggingCodec
from ispen_dist.data.segmentation import SegmentationCodec
from ispen_dist.data.subwords import Subwords
from ispen_dist.data.token_features import HashedTokenFeatures
from ispen_dist.linalg.operators import ComposedLoss
from ispen_dist.linalg.trees import Tree
from ispen_dist.losses import Losses
from ispen_dist.players import Players, build_players, replicated

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Problem:
    """Inner and outer loss with a point; `flat_*` are the same on one vector, for references."""

    inner: ComposedLoss
    outer: Callable
    theta: Tree
    phi: Tree

    def flat_inner(self, theta: Tensor, phi: Tensor) -> Tensor:
        return scalar(self.inner(unflatten(theta, self.theta), unflatten(phi, self.phi)))

    def flat_outer(self, theta: Tensor, phi: Tensor) -> Tensor:
        return scalar(self.outer(unflatten(theta, self.theta), unflatten(phi, self.phi)))


def scalar(value: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return value[0] / value[1] if isinstance(value, tuple) else value


def flatten(tree: Tree) -> Tensor:
    return torch.cat([v.flatten() for v in tree.values()])


def unflatten(vector: Tensor, like: Tree) -> Tree:
    parts = vector.split([v.numel() for v in like.values()])
    return {k: part.view(v.shape) for (k, v), part in zip(like.items(), parts, strict=True)}


def dense_hessian(problem: Problem, theta: Tensor, phi: Tensor) -> Tensor:
    """H by reverse over reverse, column by column, on one flat vector."""
    hessian = torch.autograd.functional.hessian(lambda t: problem.flat_inner(t, phi), theta)
    assert isinstance(hessian, Tensor)
    return hessian


def solve_inner(problem: Problem, theta: Tensor, phi: Tensor) -> Tensor:
    """Newton's method to the inner optimum, |gradient| below 1e-13."""
    for _ in range(100):
        theta = theta.detach().requires_grad_()
        value = problem.flat_inner(theta, phi)
        (gradient,) = torch.autograd.grad(value, theta)
        if gradient.norm() < 1e-13:
            return theta.detach()
        H = dense_hessian(problem, theta.detach(), phi)
        shift = max(0.0, 1e-3 - torch.linalg.eigvalsh(H)[0].item())
        step = torch.linalg.solve(H + shift * torch.eye(len(H)), gradient)
        scale = 1.0
        with torch.no_grad():
            while scale > 1e-6 and problem.flat_inner(theta - scale * step, phi) > value + 1e-15:
                scale /= 2
        theta = theta.detach() - scale * step
    raise AssertionError(f"no inner optimum: gradient norm {gradient.norm():.1e}")


def dense_hypergradient(problem: Problem, theta: Tensor, phi: Tensor, damping: float) -> Tensor:
    """The formula with a dense solve and a dense mixed derivative."""
    H = dense_hessian(problem, theta, phi)
    theta, phi = theta.requires_grad_(), phi.requires_grad_()
    d_theta, d_phi = torch.autograd.grad(
        problem.flat_outer(theta, phi), (theta, phi), materialize_grads=True
    )
    q = torch.linalg.solve(H + damping * torch.eye(len(H)), d_theta)
    (g,) = torch.autograd.grad(problem.flat_inner(theta, phi), theta, create_graph=True)
    (mixed,) = torch.autograd.grad(g @ q, phi, materialize_grads=True)
    return d_phi - mixed


def multilabel_codec() -> MultiLabelCodec:
    return MultiLabelCodec(("a", "b", "c"), tuple("vwxyz"))


def multilabel_config(**outer: object) -> Config:
    net = NetworkConfig(name="mlp", hidden_size=3, activation="softplus")
    return Config(
        data=DataConfig(task="multilabel", format="npz", train=["x.npz"]),
        inference_net=net,
        energy=EnergyConfig(name="label_interaction", features=net, num_units=2),
        inner=InnerConfig(energy_weight=0.3),
        outer=OuterConfig(**{"objective": "task", "num_samples": 3, **outer}),  # type: ignore[arg-type]
        train=TrainConfig(dtype="float64", method="explicit", seed=1),
    )


def tagging_codec() -> TaggingCodec:
    return TaggingCodec(("D", "N", "V"), HashedTokenFeatures(num_buckets=13, max_affix=1))


def subwords(**settings: object) -> Subwords:
    """A tokenizer that knows letters, and an encoder of one block."""
    vocabulary = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3, "##b": 4}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tokenizer.add_special_tokens(["[UNK]"])
    sizes = {
        "vocab_size": 5, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 4, "max_position_embeddings": 6, "type_vocab_size": 1,
        # Small initial values before a layer norm make curvature that no damping of a test covers.
        "initializer_range": 0.5,
    }  # fmt: skip
    encoder = {"model_type": "bert", "pad_token_id": 0, **sizes, **settings}
    return Subwords(tokenizer.to_str(), "[UNK]", json.dumps(encoder))


def pretrained_codec() -> TaggingCodec:
    return replace(tagging_codec(), subwords=subwords())


def tagging_config(
    network: str = "bilstm", energy: str = "linear_chain", **outer: object
) -> Config:
    net = NetworkConfig(
        name=network,
        embedding_size=2,
        hidden_size=2,
        num_heads=1,  # type: ignore[arg-type]
        model="tiny" if network == "pretrained" else "",
    )
    return Config(
        data=DataConfig(train=["x.conll"]),
        features=FeatureConfig(num_buckets=13, max_affix=1),
        inference_net=net,
        energy=EnergyConfig(
            name=energy,  # type: ignore[arg-type]
            features=net,
            num_units=3,
            num_layers=2,
        ),
        inner=InnerConfig(energy_weight=0.3),
        outer=OuterConfig(**{"objective": "task", "num_samples": 3, **outer}),  # type: ignore[arg-type]
        train=TrainConfig(dtype="float64", method="explicit", seed=1),
    )


def segmentation_codec(stride: int = 1) -> SegmentationCodec:
    return SegmentationCodec((5 * stride, 4 * stride, 2), (0.0, 0.0), (1.0, 1.0), stride)


def segmentation_config(network: str = "fcn", **outer: object) -> Config:
    # Of the encoder nothing is trained: it has too many parameters for a dense Hessian.
    net = NetworkConfig(name=network, hidden_size=1, trainable_layers=0)  # type: ignore[arg-type]
    return Config(
        data=DataConfig(task="segmentation", format="npz", train=["x.npz"]),
        inference_net=net,
        energy=EnergyConfig(name="convolutional", features=net, num_units=1),
        inner=InnerConfig(energy_weight=0.3),
        outer=OuterConfig(**{"objective": "task", "num_samples": 3, **outer}),  # type: ignore[arg-type]
        train=TrainConfig(dtype="float64", method="explicit", seed=1),
    )


def config_of(task: str, **outer: object) -> Config:
    """Settings of a tiny run of one of `TASKS`."""
    if task == "multilabel":
        return multilabel_config(**outer)
    return segmentation_config(task, **outer) if task in IMAGES else tagging_config(task, **outer)


def codec_of(task: str) -> Codec:
    if task == "multilabel":
        return multilabel_codec()
    if task == "pretrained":
        return pretrained_codec()
    return segmentation_codec() if task in IMAGES else tagging_codec()


def random_segmentation_batch(size: int, seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    image = torch.randn(size, 2, 5, 4, generator=draw, dtype=torch.float64)
    target = (torch.rand(size, 5, 4, generator=draw) < 0.5).double()
    return Batch({"image": image}, target, torch.ones(size).double(), torch.arange(size))


def random_multilabel_batch(size: int, seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(size, 5, generator=draw, dtype=torch.float64)
    target = (torch.rand(size, 3, generator=draw) < 0.5).double()
    return Batch({"features": features}, target, torch.ones(size).double(), torch.arange(size))


def random_tagging_batch(size: int, seed: int = 0, length: int = 4) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, length + 1, (size,), generator=draw)
    lengths[0] = length
    mask = torch.arange(length) < lengths[:, None]
    ids = torch.randint(1, 13, (size, length, 3), generator=draw) * mask.unsqueeze(-1)
    target = torch.randint(0, 3, (size, length), generator=draw) * mask
    inputs = {"features": ids, "mask": mask}
    return Batch(inputs, target, torch.ones(size).double(), torch.arange(size))


def random_pretrained_batch(size: int, seed: int = 0, length: int = 4) -> Batch:
    """Tagged tokens, the first ones of two sub-words as far as six places reach."""
    batch = random_tagging_batch(size, seed, length)
    draw = torch.Generator().manual_seed(seed)
    places = torch.tensor([1, 3, 4, 5]).expand(size, -1)
    counts = torch.where(batch.inputs["mask"], places + 1, 0).amax(-1)
    mask = torch.arange(6) < counts[:, None]
    ids = torch.randint(1, 5, (size, 6), generator=draw) * mask
    starts = torch.where(batch.inputs["mask"], places, 0)
    return replace(
        batch, inputs=batch.inputs | {"subwords": ids, "subword_mask": mask, "starts": starts}
    )


def random_phi(players: Players, seed: int = 3) -> Tree:
    """Energy parameters away from their initial zeros, so that every path carries gradient."""
    draw = torch.Generator().manual_seed(seed)
    return {
        k: v.detach() + 0.3 * torch.randn(v.shape, generator=draw, dtype=v.dtype)
        for k, v in players.phi.items()
    }


def with_ridge(loss: ComposedLoss, weight: float) -> Callable:
    """Add weight/2 |theta|^2 per example: strong convexity for tiny problems."""

    def ridged(theta: Tree, phi: Tree) -> tuple[Tensor, Tensor]:
        total, count = loss(theta, phi)
        square = torch.stack([(v**2).sum() for v in theta.values()]).sum()
        return total + 0.5 * weight * square * count, count

    return ridged


def build_problem(
    task: str,
    inner_batch: Batch,
    outer_batch: Batch,
    fixed: Literal["mle", "mle_task"] = "mle",
    **outer: object,
) -> Problem:
    """The trainer's own losses of a tiny run, float64, without ridge."""
    config = config_of(task, **outer)
    config = replace(config, inner=replace(config.inner, fixed=fixed))
    players = build_players(config, codec_of(task), CPU)

    losses = Losses(players, replicated(players))

    def outer_loss(theta: Tree, phi: Tree) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(5)
        return losses.outer_graph(outer_batch, generator)(theta, phi)

    theta = {k: v.detach() for k, v in players.theta.items()}
    return Problem(losses.inner_graph(inner_batch), outer_loss, theta, random_phi(players))


def random_batch(task: str, size: int, seed: int) -> Batch:
    if task == "multilabel":
        return random_multilabel_batch(size, seed)
    if task in IMAGES:
        return random_segmentation_batch(size, seed)
    if task == "pretrained":
        return random_pretrained_batch(size, seed)
    return random_tagging_batch(size, seed)


IMAGES = ("fcn", "efficientnet_lite0")
TASKS = ("multilabel", "bilstm", "transformer", "pretrained", "token_mlp", *IMAGES)
TAGGING_ENERGIES = ("linear_chain", "skip_chain", "high_order", "tag_language_model")
