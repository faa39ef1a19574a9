"""The problems that the hypergradient benchmarks are run on.

bibtex       the shapes of that data set (1836 sparse binary features, 159 labels, batch 256) with
             the networks of configs/bibtex.yaml.
transformer  a tagger of 6 blocks, d=384, 64 tokens, batch 16, with a linear-chain energy; the
             other settings of configs/twitter_pos.yaml.

Numbers are random and seeded, so no data is needed. There is no dropout and the outer loss is the
task cost, which draws nothing, so that every system and both types see one function. The energy
starts away from its initial zeros, or there would be no implicit part to measure.

Shapes: B batch, T tokens, F hashed features per token, K tags.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

import ispen_dist
from ispen_dist.command_line import load_config
from ispen_dist.config import Config, FeatureConfig, NetworkConfig
from ispen_dist.data.batch import Batch
from ispen_dist.data.datasets import Codec, MultiLabelCodec, TaggingCodec
from ispen_dist.data.token_features import HashedTokenFeatures
from ispen_dist.linalg import trees
from ispen_dist.linalg.operators import Loss
from ispen_dist.linalg.staged_operators import StagedLoss
from ispen_dist.linalg.trees import Tree
from ispen_dist.losses import Losses
from ispen_dist.players import Players, build_players, replicated

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@dataclass(frozen=True)
class Problem:
    """The inner and outer loss of one outer step on a random batch.

    Attributes:
        name: row of `PROBLEMS`.
        players: both networks; `theta` has the inference network's own values.
        batch: of both losses.
        theta: point of the solve.
        phi: learned parameters of the energy, away from zero; the network's own.
        damping: added to the diagonal of the Hessian, in units of the inner loss.
    """

    name: str
    players: Players
    batch: Batch
    theta: Tree
    phi: Tree
    damping: float

    @property
    def device(self) -> torch.device:
        """Where everything lies."""
        return self.batch.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of all floating-point values."""
        return self.batch.weight.dtype

    @cached_property
    def losses(self) -> Losses:
        """Both losses in all their forms."""
        return Losses(self.players, replicated(self.players))

    def inner(self) -> ispen_dist.ComposedLoss:
        """Return G, `(theta, phi) -> (sum, count)`."""
        return self.losses.inner_graph(self.batch)

    def outer(self) -> Loss:
        """Return L, `(theta, phi) -> (sum, count)`."""
        generator = torch.Generator(self.device).manual_seed(0)
        return self.losses.outer_graph(self.batch, generator)

    def inner_staged(self) -> StagedLoss:
        """Return G by stages, as the compiled path takes it."""
        return self.losses.inner_staged(self.batch)

    def outer_staged(self) -> StagedLoss:
        """Return L by stages."""
        generator = torch.Generator(self.device).manual_seed(0)
        return self.losses.outer_staged(self.batch, generator)

    def gradient(self) -> Tree:
        """Compute one eager first-order gradient of G in theta."""
        theta = trees.as_leaves(self.theta)
        total, count = self.inner()(theta, self.phi)
        grads = torch.autograd.grad(total / count, list(theta.values()))
        return dict(zip(theta, grads, strict=True))

    def hypergradient(self, num_steps: int) -> ispen_dist.Hypergradient:
        """Compute a whole hypergradient with a fixed number of solver steps."""
        return ispen_dist.hypergradient(
            self.inner(),
            self.outer(),
            self.theta,
            self.phi,
            solver=ispen_dist.CG(num_steps, 0.0),
            damping=self.damping,
        )

    def direction(self) -> Tree:
        """Return a seeded random direction like theta."""
        draw = torch.Generator().manual_seed(1)
        return {k: torch.randn(v.shape, generator=draw).to(v) for k, v in self.theta.items()}


@dataclass(frozen=True)
class BibtexSizes:
    """Sizes of the multi-label problem; the defaults are those of bibtex."""

    batch_size: int = 256
    num_features: int = 1836
    num_labels: int = 159
    hidden_size: int = 400
    mean_active: float = 69.0
    """Features of an example that are one, on average."""
    mean_gold: float = 2.4
    """Labels of an example, on average."""


@dataclass(frozen=True)
class TransformerSizes:
    """Sizes of the tagging problem; for a GPU take 12 blocks, width 768, 512 tokens."""

    batch_size: int = 16
    num_tokens: int = 64
    num_blocks: int = 6
    width: int = 384
    num_heads: int = 6
    embedding_size: int = 64
    num_buckets: int = 2048
    num_tags: int = 17
    energy_width: int = 64
    """Width of the one block that gives the energy its local potentials."""
    damping: float = 0.0
    """0 takes one from the other sizes, see `safe_damping`."""

    @property
    def safe_damping(self) -> float:
        """Damping that outweighs the negative eigenvalues of H at random weights.

        A rule, not a bound. The loss of an example is a sum over tokens, so H grows with them.
        Lowest and highest eigenvalue seen by 16 (10) steps of Lanczos: -0.9e3 and 5.8e3 for 6
        blocks, d=384, 64 tokens (damping 1.0e3), -1.7e3 and 1.1e4 for 128 tokens (2.0e3), -1.7e3
        and 2.0e4 for 12 blocks, d=768, 64 tokens (4.1e3).
        """
        return 16.0 * self.num_tokens * (self.width / 384) * (self.num_blocks / 6)


def build_bibtex(
    device: torch.device, dtype: torch.dtype, sizes: BibtexSizes | None = None
) -> Problem:
    """Build the multi-label problem.

    Args:
        device: where it lies.
        dtype: type of all floating-point values, which do not depend on it.
        sizes: in place of the defaults.
    """
    sizes = sizes or BibtexSizes()
    config = load_config(CONFIGS / "bibtex.yaml")
    net = replace(config.inference_net, hidden_size=sizes.hidden_size)
    features = replace(config.energy.features, hidden_size=sizes.hidden_size)
    config = _without_chance(config, net, features)
    names = tuple(map(str, range(max(sizes.num_features, sizes.num_labels))))
    codec = MultiLabelCodec(names[: sizes.num_labels], names[: sizes.num_features])
    draw = torch.Generator().manual_seed(0)
    return _build("bibtex", config, codec, _label_batch(sizes, draw), draw, 10.0, device, dtype)


def build_transformer(
    device: torch.device, dtype: torch.dtype, sizes: TransformerSizes | None = None
) -> Problem:
    """Build the tagging problem; see `build_bibtex`."""
    sizes = sizes or TransformerSizes()
    config = load_config(CONFIGS / "twitter_pos.yaml")
    net = NetworkConfig(
        name="transformer",
        hidden_size=sizes.width,
        num_layers=sizes.num_blocks,
        num_heads=sizes.num_heads,
        embedding_size=sizes.embedding_size,
    )
    features = replace(net, hidden_size=sizes.energy_width, num_layers=1, num_heads=1)
    config = _without_chance(config, net, features)
    config = replace(config, features=FeatureConfig(num_buckets=sizes.num_buckets))
    hashed = HashedTokenFeatures(sizes.num_buckets, config.features.max_affix)
    codec = TaggingCodec(tuple(map(str, range(sizes.num_tags))), hashed)
    draw = torch.Generator().manual_seed(0)
    batch = _tag_batch(sizes, hashed.num_features, draw)
    damping = sizes.damping or sizes.safe_damping
    return _build("transformer", config, codec, batch, draw, damping, device, dtype)


def _without_chance(config: Config, net: NetworkConfig, features: NetworkConfig) -> Config:
    return replace(
        config,
        inference_net=replace(net, dropout=0.0, feature_dropout=0.0),
        energy=replace(config.energy, features=features),
        outer=replace(config.outer, objective="task", task_weight=0.0),
        train=replace(config.train, dtype="float32"),
    )


def _label_batch(sizes: BibtexSizes, draw: torch.Generator) -> Batch:
    B, D, L = sizes.batch_size, sizes.num_features, sizes.num_labels
    features = torch.rand(B, D, generator=draw) < sizes.mean_active / D
    target = torch.rand(B, L, generator=draw) < sizes.mean_gold / L
    inputs = {"features": features.float()}
    return Batch(inputs, target.float(), torch.ones(B), torch.arange(B))


def _tag_batch(sizes: TransformerSizes, num_features: int, draw: torch.Generator) -> Batch:
    B, T = sizes.batch_size, sizes.num_tokens
    lengths = torch.full((B,), T)
    # A quarter of the sequences is padded, to between half and all of T.
    lengths[: B // 4] = torch.randint(T // 2, T, (B // 4,), generator=draw)
    mask = torch.arange(T) < lengths[:, None]
    ids = torch.randint(1, sizes.num_buckets, (B, T, num_features), generator=draw)
    target = torch.randint(0, sizes.num_tags, (B, T), generator=draw)
    inputs = {"features": ids * mask[..., None], "mask": mask}
    return Batch(inputs, target * mask, torch.ones(B), torch.arange(B))


def _build(
    name: str,
    config: Config,
    codec: Codec,
    batch: Batch,
    draw: torch.Generator,
    damping: float,
    device: torch.device,
    dtype: torch.dtype,
) -> Problem:
    # Values are made in float32 and then widened, so that both types see the same problem.
    players = build_players(config, codec, device)
    phi = {
        k: (v.detach() + 0.1 * torch.randn(v.shape, generator=draw).to(device)).to(dtype)
        for k, v in players.phi.items()
    }
    players.inference_net.to(dtype)
    players.energy.to(dtype)
    with torch.no_grad():
        for key, value in phi.items():
            players.phi[key].copy_(value)
    theta = trees.detached(players.theta)
    return Problem(name, players, batch.to(device, dtype), theta, phi, damping)


PROBLEMS: dict[str, Callable[..., Problem]] = {
    "bibtex": build_bibtex,
    "transformer": build_transformer,
}
"""Builders `(device, dtype, sizes) -> Problem` by name.

The dampings make `H + damping I` positive definite along 20 steps of conjugate gradients, so that
no system is judged where conjugate gradients do not apply.
"""


def build_problem(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    sizes: BibtexSizes | TransformerSizes | None = None,
) -> Problem:
    """Build the problem of the given name, a row of `PROBLEMS`; see `build_bibtex`."""
    return PROBLEMS[name](device, dtype, sizes)
