"""Saving in the background: the state at the save is written, and the last save is waited for."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ispen_dist import saver as saver_module
from ispen_dist.checkpoint import find_checkpoint, load_checkpoint
from ispen_dist.saver import Saver
from ispen_dist.write_failures import WriteFailures


class Gate:
    """Holds the writing thread until it is opened."""

    def __init__(self) -> None:
        self.open, self.reached = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self.open.wait(30)


@pytest.fixture
def lines() -> list[str]:
    return []


def build(
    folder: Path, lines: list[str], on_error: Any = "stop", sync: Callable[[], None] = lambda: None
) -> Saver:
    failures = WriteFailures(on_error, lines.append)
    return Saver(folder / "checkpoints", failures, is_main=True, keep=2, sync=sync)


def save(saver: Saver, step: int, parameter: torch.Tensor, state: dict | None = None) -> dict:
    recorded: dict[str, float | None] = {}
    saver.save(
        step,
        lambda: {"theta": {"w": parameter.to("cpu", copy=True)}},
        state or {"step": step},
        recorded.update,
        None,
    )
    return recorded


def test_training_goes_on_while_the_state_at_the_save_is_written(tmp_path, lines):
    gate, parameter, state = Gate(), torch.ones(3), {"damping": 0.5, "dev": {"f1": 0.25}}
    saver = build(tmp_path, lines, sync=gate)
    save(saver, 1, parameter, state)
    assert gate.reached.wait(30)
    parameter.fill_(7.0)
    state["dev"]["f1"] = 0.75  # type: ignore[index]
    assert find_checkpoint(tmp_path / "checkpoints") is None
    gate.open.set()
    saver.wait()
    found = find_checkpoint(tmp_path / "checkpoints")
    assert found is not None
    loaded = load_checkpoint(found)
    assert loaded.trees["theta"]["w"].tolist() == [1.0] * 3
    assert loaded.state == {"damping": 0.5, "dev": {"f1": 0.25}}


def test_one_save_is_under_way_at_a_time(tmp_path, lines, monkeypatch):
    under_way = []

    def slow(*arguments: Any) -> None:
        under_way.append(arguments[1])
        assert len(under_way) == 1
        time.sleep(0.05)
        under_way.clear()

    monkeypatch.setattr(saver_module, "save_checkpoint", slow)
    with build(tmp_path, lines) as saver:
        figures = [save(saver, step, torch.ones(1)) for step in range(4)]
    assert saver.num_saved == 4
    assert figures[0]["previous_write_seconds"] is None
    assert all(f["wait_seconds"] > 0.02 and f["previous_write_seconds"] > 0.04 for f in figures[1:])
    assert saver.summary(10.0)["waited_share"] == pytest.approx(saver.waited_seconds / 10, abs=1e-5)
    assert saver.write_seconds > 0.19


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ValueError])
def test_the_end_and_an_error_wait_for_the_last_save(tmp_path, lines, error):
    gate = Gate()
    timer = threading.Timer(0.1, gate.open.set)

    def run() -> None:
        with build(tmp_path, lines, sync=gate) as saver:
            save(saver, 5, torch.ones(1))
            timer.start()
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(error):
            run()
    assert find_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step_00000005"


def test_records_come_before_the_write(tmp_path, lines):
    order = []
    with build(tmp_path, lines, sync=lambda: order.append("sync")) as saver:
        saver.save(1, lambda: order.append("copy") or {}, {}, lambda _: order.append("row"), None)
    assert order == ["copy", "row", "sync"]


def test_a_rank_that_does_not_write_only_takes_part_in_the_copy(tmp_path, lines):
    copied = []
    failures = WriteFailures("stop", lines.append)
    folder = tmp_path / "checkpoints"
    with Saver(folder, failures, is_main=False, keep=1, sync=lambda: None) as saver:
        saver.save(1, lambda: copied.append(1) or {}, {}, lambda _: pytest.fail("a row"), None)
    assert copied == [1]
    assert not folder.exists()


# -- failures ----------------------------------------------------------------------------------


def test_a_save_that_failed_is_noticed_without_waiting(tmp_path, lines):
    gate = Gate()
    saver = build(tmp_path / "gone", lines, sync=gate)
    save(saver, 1, torch.ones(1))
    saver.look()
    assert saver._failures.must_stop == 0
    gate.open.set()
    while not saver._failures.must_stop:
        saver.look()
    assert "warning: checkpoint: expected to be written, got [Errno 2]" in lines[0]
    assert "the run stops" in lines[0]
    assert "checkpoint: [Errno 2]" in str(saver._failures.error())


def test_going_on_tries_again_at_the_next_save(tmp_path, lines):
    with build(tmp_path / "late", lines, "continue") as saver:
        for step in (1, 2):
            save(saver, step, torch.ones(1))
            saver.wait()
            assert saver._failures.must_stop == 0
        (tmp_path / "late").mkdir()
        save(saver, 3, torch.ones(1))
    assert saver._failures.num == 2
    assert saver._failures.unwritten == {}
    assert len(lines) == 2, "one warning, however often it fails, and the news that it works again"
    assert "the run goes on and tries again" in lines[0]
    assert lines[1] == "checkpoint: written again"
    assert find_checkpoint(tmp_path / "late" / "checkpoints") is not None
