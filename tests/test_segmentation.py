"""Images with masks: reader, augmentation, costs and metrics against brute force, prediction."""

import io
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import problems
import pytest
import torch
from malformed import check_error
from sklearn.metrics import jaccard_score

from ispen_dist.command_line import load_config
from ispen_dist.config import ConfigError, DataConfig
from ispen_dist.data.datasets import Subset, whole_of
from ispen_dist.data.errors import DataError
from ispen_dist.data.images import ImageTable, read_images
from ispen_dist.data.loading import load_splits
from ispen_dist.data.segmentation import (
    Augmentation,
    SegmentationCodec,
    SegmentationDataset,
    augmentation,
    turned,
)
from ispen_dist.metrics import SegmentationMetrics
from ispen_dist.models.output_spaces import BinaryImages
from ispen_dist.players import build_players
from ispen_dist.prediction_files import predict_file
from ispen_dist.predictor import Predictor

ROOT = Path(__file__).parent.parent
DRAW = np.random.default_rng(0)
IMAGES = DRAW.integers(0, 256, (3, 5, 4, 2), dtype=np.uint8)
MASKS = (DRAW.random((3, 5, 4)) < 0.5).astype(np.uint8)


def archive(**arrays) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def with_value(array, value):
    changed = array.astype(np.float64)
    changed[1, 2, 3] = value
    return changed


MALFORMED = {
    "no images": (archive(pixels=IMAGES), "an array 'images'", "pixels"),
    "no channels": (archive(images=IMAGES[..., 0]), "image row column channel", "(3, 5, 4)"),
    "text": (archive(images=IMAGES.astype(str), masks=MASKS), "images: expected numbers", "<U3"),
    "fewer masks": (archive(images=IMAGES, masks=MASKS[:2]), "(3, 5, 4)", "(2, 5, 4)"),
    "masks of another shape": (
        archive(images=IMAGES, masks=MASKS[:, :1, :2]),
        "(3, 5, 4)",
        "(3, 1, 2)",
    ),
    "NaN": (archive(images=with_value(IMAGES, np.nan)), "images[1, 2, 3, 0]", "nan"),
    "grey mask": (archive(images=IMAGES, masks=with_value(MASKS, 2)), "masks[1, 2, 3]", "2"),
    "objects": (archive(images=np.array([[[[None]]]])), "numbers under 'images'", "pickled"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_images(case, write):
    content, expected, got = MALFORMED[case]
    path = write(content, "horses.npz")
    check_error(lambda: read_images(path), path, None, expected, got)


def test_images_beyond_float32_are_refused(write):
    images = np.zeros((2, 4, 4, 1))
    images[1, 2, 3, 0] = 1e300
    path = write(archive(images=images, masks=np.zeros((2, 4, 4))))
    expected = r"images\[1, 2, 3, 0\]: expected a finite number, got 1e\+300"
    with pytest.raises(DataError, match=expected):
        read_images(path)


def test_images_of_another_size_or_without_masks_are_refused(write):
    table = read_images(write(archive(images=IMAGES, masks=MASKS), "a.npz"))
    other = read_images(write(archive(images=IMAGES[:, :4]), "b.npz"))
    with pytest.raises(DataError, match=r"b\.npz: images: expected .*\(5, 4, 2\).*got \(4, 4, 2\)"):
        table.concatenate([other])
    with pytest.raises(DataError, match=r"b\.npz: expected an array 'masks'"):
        other.require_masks()


def test_masks_may_be_smaller_and_in_a_file_of_their_own(write):
    large = IMAGES.repeat(2, 1).repeat(2, 2)
    images = write(archive(images=large, masks=large[..., 0] > 99), "large.npz")
    masks = write(archive(masks=MASKS), "masks.npz")
    table = read_images(images, masks)
    assert table.output_stride == 2
    assert (table.require_masks() == MASKS).all()
    with pytest.raises(DataError, match=r"large\.npz: masks: expected .*\(5, 4\).*got \(10, 8\)"):
        table.concatenate([read_images(images)])
    codec = SegmentationCodec.of(table)
    assert (codec.mask_size, codec.num_inputs, codec.num_outputs) == ((5, 4), 8, 20)
    unlabelled = SegmentationDataset(replace(table, masks=None), codec).collate([0])
    assert unlabelled.target.shape == (1, 5, 4)


def test_the_settings_name_files_of_masks_by_file_of_images(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((9, 10, 8, 2)), masks=np.zeros((9, 10, 8)))
    np.savez(tmp_path / "small.npz", masks=np.eye(5)[None, :, :4].repeat(9, 0))
    config = problems.segmentation_config()
    data = replace(config.data, root=str(tmp_path), train=["a.npz"], masks={"a.npz": "small.npz"})
    splits = load_splits(replace(config, data=data))
    assert (splits.dev.collate([0]).target[0].numpy() == np.eye(5)[:, :4]).all()
    own = load_splits(replace(config, data=replace(data, masks={})))
    assert own.dev.collate([0]).target.shape == (1, 10, 8)
    with pytest.raises(ConfigError, match=r"data\.masks: expected files .*a\.npz.*got 'b\.npz"):
        replace(data, masks={"b.npz": "small.npz"})
    with pytest.raises(ConfigError, match=r"data\.masks: .*data\.task=tagging"):
        DataConfig(train=["a.conll"], masks={"a.conll": "small.npz"})


@pytest.mark.parametrize(
    "settings", [{"flip": True, "shift": 2}, {"rotate": 40.0}], ids=["moved", "turned"]
)
def test_a_smaller_mask_moves_as_far_as_its_image(settings):
    target = torch.zeros(5, 12, 12, dtype=torch.float64)
    target[:, 3:6, 4:9] = 1.0
    batch = replace(problems.random_segmentation_batch(5), target=target)
    image = target.repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1)
    settings = {**settings, "shift": 4 * settings.get("shift", 0)}
    seen = Augmentation(seed=3, **settings)(replace(batch, inputs={"image": image}), 7)
    assert not torch.equal(seen.target, target)
    shrunk = torch.nn.functional.avg_pool2d(seen.inputs["image"], 4)[:, 0] > 0.5
    # Only where the outline is turned may a pixel of the mask be cut otherwise than its image.
    different = (shrunk != seen.target.bool()).double().mean()
    assert different == 0.0 if not settings.get("rotate") else different < 0.03


@pytest.mark.parametrize("factor", [1, 3])
def test_images_are_turned_at_the_size_of_their_originals_and_then_reduced(factor):
    draw = np.random.default_rng(1)
    large = draw.integers(0, 256, (3, 10 * factor, 8 * factor, 2), dtype=np.uint8)
    masks = (draw.random(large.shape[:3]) < 0.5).astype(np.uint8)
    small = draw.integers(0, 256, (3, 10, 8, 2), dtype=np.uint8)
    table = ImageTable(small, (draw.random((3, 5, 4)) < 0.5).astype(np.uint8))
    codec = SegmentationCodec.of(table)
    whole = SegmentationDataset(table, codec, ImageTable(large, masks))
    batch = Subset(whole, np.array([2, 1])).collate([0, 1])
    config = DataConfig(task="segmentation", format="npz", train=["a.npz"], zoom=0.5)
    augment = augmentation(config, 3, whole)
    assert augment is not None
    seen = augment(batch, 7)
    for i, row in enumerate([2, 1]):
        (zoom,) = np.random.default_rng([3, 7, row]).uniform(-1.0, 1.0, size=2)[1:] * 0.5
        image = turned(torch.from_numpy(large[row]).permute(2, 0, 1).double(), 0.0, math.exp(zoom))
        mean = image.unfold(1, factor, factor).unfold(2, factor, factor).mean((-2, -1))
        channels = [torch.tensor(c).view(2, 1, 1) for c in (codec.mean, codec.deviation)]
        expected = ((mean - channels[0]) / channels[1]).float()
        torch.testing.assert_close(seen.inputs["image"][i], expected, atol=1e-5, rtol=1e-5)
        mask = turned(torch.from_numpy(masks[row])[None].double(), 0.0, math.exp(zoom))[0]
        stride = 2 * factor
        share = mask.unfold(0, stride, stride).unfold(1, stride, stride).mean((-2, -1))
        assert (seen.target[i] == (share > 0.5)).all()
    still = augmentation(replace(config, zoom=0.0, flip=True), 3, whole)
    assert still is not None
    assert not torch.equal(seen.target, still(batch, 7).target)
    flipped = still(batch, 7).target
    assert all(
        torch.equal(new, old) or torch.equal(new, old.flip(-1))
        for new, old in zip(flipped, batch.target, strict=True)
    )


def test_originals_are_those_of_every_training_file_and_larger_by_a_whole_factor(tmp_path):
    def save(name, number, height, width, mask=1):
        masks = np.zeros((number, height // mask, width // mask))
        np.savez(tmp_path / name, images=np.zeros((number, height, width, 2)), masks=masks)

    save("a.npz", 9, 5, 4)
    save("b.npz", 3, 5, 4)
    save("large.npz", 9, 10, 8)
    save("large_b.npz", 3, 10, 8)
    save("other.npz", 9, 10, 9)
    save("fewer.npz", 8, 10, 8)
    save("coarse.npz", 9, 10, 8, mask=2)
    config = problems.segmentation_config()

    def load(train=("a.npz",), **originals):
        named = {f"{name}.npz": f"{file}.npz" for name, file in originals.items()}
        data = replace(config.data, root=str(tmp_path), train=list(train), originals=named)
        return load_splits(replace(config, data=data))

    both = whole_of(load(["a.npz", "b.npz"], a="large", b="large_b").train)
    assert isinstance(both, SegmentationDataset)
    assert both.original(11)[0].shape == (2, 10, 8)
    with pytest.raises(ConfigError, match=r"data\.originals: expected one of every .*b\.npz.*got"):
        load(["a.npz", "b.npz"], a="large")
    for wrong in ("other", "fewer"):
        with pytest.raises(DataError, match=rf"{wrong}\.npz: images: expected .*whole factor, got"):
            load(a=wrong)
    with pytest.raises(DataError, match=r"coarse\.npz: masks: expected .*\(10, 8\).*got \(5, 4\)"):
        load(a="coarse")
    with pytest.raises(ConfigError, match=r"data\.originals: expected files .*got 'c\.npz'"):
        load(c="large")


def test_a_batch_has_standardised_channels():
    table = ImageTable(IMAGES, MASKS)
    dataset = SegmentationDataset(table, SegmentationCodec.of(table))
    batch = dataset.collate([0, 1, 2])
    channels = batch.inputs["image"].transpose(0, 1).flatten(1)
    torch.testing.assert_close(channels.mean(1), torch.zeros(2), atol=1e-6, rtol=0.0)
    torch.testing.assert_close(channels.std(1, correction=0), torch.ones(2))
    assert (batch.target.numpy() == MASKS).all()


def test_augmentation_moves_image_and_mask_together_and_by_seed_step_and_example_alone():
    batch = problems.random_segmentation_batch(6)
    batch = replace(batch, inputs={"image": batch.target.unsqueeze(1)})
    augment = Augmentation(seed=3, flip=True, shift=2)
    seen = augment(batch, 7)
    assert torch.equal(seen.inputs["image"][:, 0], seen.target)
    assert not torch.equal(seen.target, batch.target)
    part = replace(
        batch,
        inputs={"image": batch.inputs["image"][4:]},
        target=batch.target[4:],
        index=batch.index[4:],
    )
    assert torch.equal(augment(part, 7).target, seen.target[4:])
    assert not torch.equal(augment(batch, 8).target, seen.target)
    flips = Augmentation(seed=3, flip=True)(batch, 7)
    assert all(
        torch.equal(new, old) or torch.equal(new, old.flip(-1))
        for new, old in zip(flips.target, batch.target, strict=True)
    )


@pytest.mark.parametrize("shape", [(9, 9), (9, 13), (13, 9)])
def test_turned_by_a_quarter_image_and_mask_are_those_of_numpy(shape):
    image = torch.rand(3, *shape, generator=torch.Generator().manual_seed(5)).double()
    middle = [slice((size - 9) // 2, (size + 9) // 2) for size in shape]
    square = image[:, *middle]
    moved = turned(image, math.pi / 2, 1.0)[:, *middle]
    torch.testing.assert_close(moved, torch.rot90(square, -1, (1, 2)))
    torch.testing.assert_close(turned(image, 0.0, 1.0), image)
    enlarged = turned(image, 0.0, 3.0)[:, *middle]
    torch.testing.assert_close(enlarged[:, 1::3, 1::3], square[:, 3:6, 3:6])


def test_moved_masks_stay_masks_and_colour_leaves_them_alone():
    batch = problems.random_segmentation_batch(6)
    moved = Augmentation(seed=3, rotate=20.0, zoom=0.3)(batch, 7)
    assert not torch.equal(moved.target, batch.target)
    assert ((moved.target == 0.0) | (moved.target == 1.0)).all()
    coloured = Augmentation(seed=3, colour=0.2)(batch, 7)
    assert torch.equal(coloured.target, batch.target)
    old, new = batch.inputs["image"][0, 0], coloured.inputs["image"][0, 0]
    slope, offset = np.polyfit(old.flatten(), new.flatten(), 1)
    torch.testing.assert_close(old * slope + offset, new)
    assert 0.0 < abs(slope - 1.0) <= 0.2
    assert 0.0 < abs(offset) <= 0.2


def test_without_settings_nothing_is_augmented():
    config = DataConfig(task="segmentation", format="npz", train=["a.npz"])
    assert augmentation(config, 0) is None
    assert augmentation(replace(config, zoom=0.1), 5) == Augmentation(5, zoom=0.1)


def test_the_metric_is_that_of_the_library_and_of_the_cost():
    batch = problems.random_segmentation_batch(5)
    batch.target[0] = 0.0
    ybar = torch.rand(batch.target.shape, generator=torch.Generator().manual_seed(4))
    ybar[0] = 0.0
    metrics = SegmentationMetrics()
    parts = metrics.zero()
    for rows in ([0], [1, 2, 3], [4]):
        part = replace(batch, target=batch.target[rows], weight=batch.weight[rows])
        parts += metrics.sums(ybar[rows], part)
    values = metrics.finish(parts, {})
    gold, predicted = batch.target.flatten(1).numpy(), (ybar > 0.5).flatten(1).numpy()
    each = [jaccard_score(g, p, zero_division=1.0) for g, p in zip(gold, predicted, strict=True)]
    assert values["mean_iou"] == pytest.approx(np.mean(each))
    assert values["global_iou"] == pytest.approx(jaccard_score(gold.ravel(), predicted.ravel()))
    filler = replace(batch, weight=torch.zeros(5))
    assert metrics.sums(ybar, filler).tolist() == [0.0] * 4


def test_the_relaxed_cost_is_one_minus_minimum_over_maximum():
    batch, space = problems.random_segmentation_batch(3), BinaryImages()
    ybar = torch.rand(2, *batch.target.shape, dtype=torch.float64)
    ratio = torch.minimum(ybar, batch.target).sum((-1, -2)) / torch.maximum(
        ybar, batch.target.expand_as(ybar)
    ).sum((-1, -2))
    torch.testing.assert_close(space.cost(ybar, batch.target), 1.0 - ratio)
    empty = torch.zeros(1, 5, 4)
    assert space.cost(empty, empty) == 0.0


def test_the_interaction_of_the_energy_is_its_mixed_second_derivative():
    players = build_players(
        problems.segmentation_config(), problems.segmentation_codec(), problems.CPU
    )
    with torch.no_grad():
        for name, value in problems.random_phi(players).items():
            players.phi[name].copy_(value)
    potentials = torch.zeros(1, 3, 5, 4, dtype=torch.float64)
    half = torch.full((1, 5, 4), 0.5, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(
        lambda y: players.energy.score(potentials, y).sum(), half
    )
    torch.testing.assert_close(players.energy.interaction(), hessian[0, 2, 2, 0])


@pytest.mark.parametrize("stride", [1, 2])
def test_a_model_predicts_masks_into_a_file(tmp_path, write, stride):
    codec = problems.segmentation_codec(stride)
    players = build_players(problems.segmentation_config(), codec, torch.device("cpu"))
    Predictor(players, codec).save_pretrained(tmp_path / "model")
    predictor = Predictor.from_pretrained(tmp_path / "model")
    source = write(archive(images=IMAGES.repeat(stride, 1).repeat(stride, 2)), "new.npz")
    predict_file(predictor, source, tmp_path / "out.npz", probabilities=True)
    with np.load(tmp_path / "out.npz") as written:
        assert (written["masks"] == (written["probabilities"] > 0.5)).all()
    assert read_images(tmp_path / "out.npz").require_masks().shape == (3, 5, 4)


@pytest.mark.parametrize(
    ("name", "side"), [("weizmann_horses", 32), ("weizmann_horses_efficientnet", 64)]
)
def test_the_horses_are_cut_as_their_split_file_says(name, side, shared_data, monkeypatch):
    if not (shared_data / "weizmann_horses").is_dir():
        pytest.skip(f"no weizmann_horses in {shared_data}")
    monkeypatch.setenv("ISPEN_DATA", str(shared_data))
    splits = load_splits(load_config(ROOT / "configs" / f"{name}.yaml"))
    assert splits.test is not None
    assert [len(splits.train), len(splits.dev), len(splits.test)] == [160, 40, 128]
    batch = splits.train.collate([0, 5])
    assert batch.inputs["image"].shape == (2, 3, side, side)
    assert batch.target.shape == (2, 32, 32)
    assert 0.02 < batch.target.mean() < 0.6
