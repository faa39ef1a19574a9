"""What is written for TensorBoard, read back as events."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from ispen_dist.recording.tensorboard import TensorBoardRecorder

NAN = float("nan")


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(folder).Scalars(tag)]


def test_scalars_texts_and_pictures_are_read_back(tmp_path: Path) -> None:
    labels = ["a", "$", "c"]
    matrix = torch.randn(3, 3, dtype=torch.bfloat16, requires_grad=True)
    with TensorBoardRecorder(tmp_path) as recorder:
        recorder.scalars({"inner/loss": 0.5, "dev/f1": None, "solver/steps": 7}, 3)
        recorder.scalars({"inner/loss": NAN}, 4)
        recorder.text("config", "train:\n  seed: 1")
        recorder.heat_map("interaction", matrix, labels, labels, 3, value_name="score")
        recorder.heat_map("interaction", matrix, labels, labels, 6)
        recorder.curves("dev", {"f1": [(1, 0.1), (2, NAN), (3, 0.3)]}, 3, mark={2: "here"})
    accumulator = events(tmp_path)
    tags = accumulator.Tags()
    assert sorted(tags["scalars"]) == ["inner/loss", "solver/steps"]
    assert accumulator.Scalars("inner/loss")[0].value == 0.5
    assert np.isnan(accumulator.Scalars("inner/loss")[1].value)
    assert sorted(tags["images"]) == ["dev", "interaction"]
    assert [image.step for image in accumulator.Images("interaction")] == [3, 6]
    assert accumulator.Images("dev")[0].encoded_image_string.startswith(b"\x89PNG")
    assert (accumulator.Images("dev")[0].width, accumulator.Images("dev")[0].height) == (700, 400)
    text = accumulator.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    assert text == b"train:\n  seed: 1"


def test_a_resumed_run_shows_each_step_once(tmp_path: Path) -> None:
    with TensorBoardRecorder(tmp_path) as recorder:
        for step in range(1, 7):
            recorder.scalars({"loss": float(step)}, step)
    with TensorBoardRecorder(tmp_path, purge_step=4) as recorder:
        for step in range(4, 9):
            recorder.scalars({"loss": 10.0 * step}, step)
    assert scalars(tmp_path, "loss") == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0), (6, 60.0), (7, 70.0), (8, 80.0)
    ]  # fmt: skip


def test_settings_and_results_are_in_the_same_run(tmp_path: Path) -> None:
    settings = {"solver": {"name": "cg", "rtol": 1e-3}, "files": ["a", "b"], "on": True, "no": None}
    with TensorBoardRecorder(tmp_path) as recorder:
        recorder.hparams(settings, {"final/f1": 0.25}, 9)
    assert [path.is_file() for path in tmp_path.iterdir()] == [True], "no folder of a second run"
    assert scalars(tmp_path, "final/f1") == [(9, 0.25)]
    content = events(tmp_path).SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    start = metadata.parse_session_start_info_plugin_data(content).hparams
    assert {name: start[name].WhichOneof("kind") for name in start} == {
        "solver.name": "string_value",
        "solver.rtol": "number_value",
        "files": "string_value",
        "on": "string_value",
        "no": "string_value",
    }
    assert start["solver.rtol"].number_value == 1e-3
    assert start["files"].string_value == "['a', 'b']"
    assert start["on"].string_value == "True"


def test_drawing_needs_neither_pyplot_nor_a_display() -> None:
    code = (
        "import sys; from ispen_dist.recording import figures, tensorboard\n"
        "figures.pixels(figures.heat_map([[1.0]], ['a'], ['b'], 't'))\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
