"""Masks averaged over views against a loop over pixels, and settings that cannot work."""

from dataclasses import replace

import numpy as np
import problems
import pytest
import torch

from ispen_dist.config import ConfigError, InferenceConfig
from ispen_dist.data.loading import load_splits
from ispen_dist.inference import predict
from ispen_dist.players import build_players, replicated
from ispen_dist.views import averaged

SHIFTS = [0, -2, 1]


def reference(logits, image, shifts, mirrored, stride):
    """The mean, pixel by pixel of the mask, over the views that show it."""
    tall, wide = image.shape[-2:]
    height, width = tall // stride, wide // stride
    sums, counts = np.zeros((2, len(image), height, width))
    for flip in (False, True) if mirrored else (False,):
        picture = image[..., ::-1] if flip else image
        for down in shifts:
            for right in shifts:
                rows = [mirrored_index(i - down, tall) for i in range(tall)]
                columns = [mirrored_index(j - right, wide) for j in range(wide)]
                view = picture[:, :, rows][..., columns]
                inputs = {"image": torch.from_numpy(view.copy())}
                probabilities = torch.sigmoid(logits(inputs)).numpy()
                for i in range(height):
                    for j in range(width):
                        row, across = i + down // stride, j + right // stride
                        if 0 <= row < height and 0 <= across < width:
                            column = width - 1 - j if flip else j
                            sums[:, i, column] += probabilities[:, row, across]
                            counts[:, i, column] += 1
    return sums / counts


def mirrored_index(i, size):
    i = abs(i)
    return i if i < size else 2 * (size - 1) - i


@pytest.mark.parametrize("shifts", [[0], SHIFTS])
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
@torch.no_grad()
def test_the_mean_is_that_of_a_loop_over_pixels(shifts, mirrored, stride):
    shifts = [stride * shift for shift in shifts]
    config = problems.segmentation_config()
    codec = problems.segmentation_codec(stride)
    inference = InferenceConfig(view_shifts=shifts, view_mirrored=mirrored)
    players = build_players(replace(config, inference=inference), codec, torch.device("cpu"))
    engines = replicated(players)
    image = np.random.default_rng(0).normal(size=(3, 2, *codec.size[:2]))

    def logits(inputs):
        return engines.inference_net.staged(inputs, keep_states=False).value()

    got = torch.sigmoid(predict(players, engines, {"image": torch.from_numpy(image)})).numpy()
    np.testing.assert_allclose(got, reference(logits, image, shifts, mirrored, stride), rtol=1e-12)
    assert got.shape == (3, 5, 4)
    if shifts != [0] or mirrored:
        alone = torch.sigmoid(logits({"image": torch.from_numpy(image)})).numpy()
        assert np.abs(got - alone).max() > 1e-6


def test_certain_predictions_stay_finite_and_ordered():
    certain = torch.tensor([[[90.0, -90.0, 40.0]]])

    def logits(inputs):
        return certain + 0.0 * inputs["image"][:, 0]

    mean = averaged(logits, InferenceConfig(view_mirrored=True))
    got = mean({"image": torch.zeros(1, 1, 1, 3)})[0, 0]
    assert torch.isfinite(got).all()
    # One view shows the first pixel with logit 90, the other with 40: half as uncertain as there.
    np.testing.assert_allclose(got[[0, 2]], 40.0 + np.log(2.0), rtol=1e-6)
    assert got[1] == -90.0


@pytest.mark.parametrize("shifts", [[], [1], [0, 2, 2]])
def test_views_that_leave_pixels_out_or_repeat_are_refused(shifts):
    with pytest.raises(ConfigError, match=r"inference\.view_shifts: expected .*one of them 0"):
        InferenceConfig(view_shifts=shifts)


@pytest.mark.parametrize("change", [{"view_mirrored": True}, {"view_shifts": [0, 1]}])
def test_only_images_have_views(change):
    config = problems.multilabel_config()
    (setting,) = change
    with pytest.raises(ConfigError, match=rf"inference\.{setting}: .*data\.task=multilabel"):
        replace(config, inference=InferenceConfig(**change))


@pytest.mark.parametrize(
    ("setting", "change"),
    [
        ("inference.view_shifts", {"inference": InferenceConfig(view_shifts=[0, -4])}),
        ("data.shift", {}),
    ],
)
def test_shifts_as_large_as_the_image_are_refused(setting, change, tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, images=np.zeros((9, 5, 4, 2)), masks=np.zeros((9, 5, 4)))
    config = problems.segmentation_config()
    shift = 0 if change else 4
    data = replace(config.data, root=str(tmp_path), train=["a.npz"], shift=shift)
    with pytest.raises(ConfigError, match=rf"{setting}: expected less than 4.*got 4"):
        load_splits(replace(config, data=data, **change))


@pytest.mark.parametrize(
    ("setting", "change"),
    [
        ("inference.view_shifts", {"inference": InferenceConfig(view_shifts=[0, 1])}),
        ("data.shift", {}),
    ],
)
def test_shifts_by_parts_of_a_pixel_of_the_mask_are_refused(setting, change, tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((9, 10, 8, 2)), masks=np.zeros((9, 5, 4)))
    config = problems.segmentation_config()
    shift = 0 if change else 1
    data = replace(config.data, root=str(tmp_path), train=["a.npz"], shift=shift)
    with pytest.raises(ConfigError, match=rf"{setting}: expected a multiple of 2.*got .*1"):
        load_splits(replace(config, data=data, **change))
