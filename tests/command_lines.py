"""The shortest settings, command lines with them, and what is said of one that is wrong."""

import pytest

from ispen_dist.command_line import parse_train

MINIMAL = {"data": {"train": ["x.conll"]}}


def parsed(path, *flags):
    return parse_train(["--config", str(path), *flags])


def error_of(capsys, *arguments):
    """Return the one line on stderr that a refused command line leaves."""
    with pytest.raises(SystemExit) as end:
        parse_train(arguments)
    assert end.value.code == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error.removeprefix("error: ")
