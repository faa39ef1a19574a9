"""How a run ends: the exit codes of `launcher/train.py`, in one place."""

from enum import IntEnum


class Exit(IntEnum):
    """Exit code of one process of a run. `code.help` says what it means and what to do.

    What is not here is a defect of the program or of the machine: 1 after a traceback, 130 after a
    second Ctrl-C, and 128 plus its number for a signal that cannot be handled.
    """

    DONE = 0
    CONFIGURATION = 2
    NOT_FINITE = 3
    HANG = 4
    DISK = 5
    REQUEUE = 75

    @property
    def help(self) -> str:
        """A sentence for the user."""
        return _HELP[self]


_HELP = {
    Exit.DONE: "done; the summary is written",
    Exit.CONFIGURATION: (
        "settings, data, network or checkpoint cannot work; the message says what to change"
    ),
    Exit.NOT_FINITE: (
        "NaN or infinity under train.on_not_finite=stop, or train.max_not_finite times in a row; "
        "or a failed solve under solver.on_failure=stop"
    ),
    Exit.HANG: "no progress for train.hang_timeout seconds; the stacks are in the log",
    Exit.DISK: "a checkpoint or record could not be written; make room and start again",
    Exit.REQUEUE: (
        "stopped by a signal with everything saved; start the same command again to go on"
    ),
}


def table() -> str:
    """Return the codes with their help, a line each, for `--help`."""
    return "\n".join(f"  {code.value:<3} {code.help}" for code in Exit)
