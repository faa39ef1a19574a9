"""The console: lines in a log, a bar on a terminal, nothing on other ranks."""

import io
import os
import subprocess
import sys

import pytest

from ispen_dist.recording.console import Console, compact

NAN, INF = float("nan"), float("inf")


def run_console(console: Console, total: int = 12, completed: int = 0) -> None:
    with console:
        console.message("read [data.train] :smile: " + "x" * 150)
        console.start(total, "training", completed)
        for step in range(completed + 1, total + 1):
            console.update(step, {"inner loss": 1 / step, "solver": "converged", "dev": None})
        console.table("Result [final]", ["metric", "dev"], [["F1", 0.43012], ["none", None]])


def test_a_log_gets_plain_lines() -> None:
    stream = io.StringIO()
    run_console(Console(True, every=5, stream=stream))
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    assert "\x1b" not in stream.getvalue()
    assert "\r" not in stream.getvalue()
    assert lines[0] == "read [data.train] :smile: " + "x" * 150
    assert lines[1] == "training: 12 steps"
    rows = [line for line in lines if line.startswith("step ")]
    assert [row.split()[1] for row in rows] == ["1/12", "5/12", "10/12", "12/12"]
    assert rows[1].startswith("step 5/12  inner loss 0.2  solver converged  dev -  ")
    assert rows[1].endswith(" s")
    assert lines[-7:] == [
        "Result [final]",
        "+--------+--------+",
        "| metric |    dev |",
        "+--------+--------+",
        "| F1     | 0.4301 |",
        "| none   |      - |",
        "+--------+--------+",
    ]


def test_a_resumed_log_says_where_it_begins() -> None:
    stream = io.StringIO()
    run_console(Console(True, every=100, stream=stream), total=9, completed=6)
    lines = stream.getvalue().splitlines()
    assert lines[1] == "training: 9 steps from step 6"
    assert [line.split()[1] for line in lines if line.startswith("step ")] == ["7/9", "9/9"]


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    run_console(Console(False, every=1, stream=stream))
    run_console(Console(False, every=1))
    assert stream.getvalue() == ""
    assert capsys.readouterr() == ("", "")


def test_a_command_in_a_pipe_prints_plain_lines() -> None:
    code = (
        "from ispen_dist.recording.console import Console\n"
        "with Console(True, every=2) as console:\n"
        "    console.start(4, 'training')\n"
        "    for step in range(1, 5): console.update(step, {'loss': 0.5})\n"
    )
    environment = os.environ | {"FORCE_COLOR": "1", "TERM": "xterm"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert [line[:8] for line in done.stdout.splitlines()] == [
        "training", "step 1/4", "step 2/4", "step 4/4"
    ]  # fmt: skip


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_with_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    run_console(Console(True, stream=stream))
    output = stream.getvalue()
    assert "12/12" in output
    assert "converged" in output
    assert "step 12/12" not in output
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h") == 1, "the cursor is shown again"


def test_the_terminal_is_restored_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()

    def fail() -> None:
        with Console(True, stream=stream) as console:
            console.start(3, "training")
            console.update(1, {"loss": 1.0})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    run_console(Console(True, stream=stream))
    assert "step 12/12" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (-0.0, "-0"), (1.0, "1"), (0.001, "0.001"), (0.00099, "9.90e-04"),
        (-3.14159, "-3.142"), (999.94, "999.9"), (1234.5, "1,234"), (5e7, "5.00e+07"),
        (NAN, "nan"), (INF, "inf"), (-INF, "-inf"), (12345678, "12345678"), ("cg", "cg"),
        (None, "-"), (True, "True"),
    ],
)  # fmt: skip
def test_figures_are_compact(value: float | str | None, text: str) -> None:
    assert compact(value) == text
