"""The run of the soak, asked to stop at random moments and started again until it is done."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from soak_kills import NUM_RANKS, Start, compare, published

from ispen_dist.exits import Exit
from ispen_dist.stopping import STOP_SIGNALS

_REQUESTS = tuple(number for number in STOP_SIGNALS if number != signal.SIGINT)


def stop_again(
    start: Callable[[list[str], Path], Start],
    folder: Path,
    num_stops: int,
    seed: int,
    report: Callable[[str], None],
) -> list[float]:
    """Stop and continue the run whose settings and undisturbed results a soak left in a folder.

    Returns:
        Seconds from each signal to the marker, which is written when everything is saved.
    """
    output, log = folder / "stopped", folder / "log.txt"
    arguments = ["--config", str(folder / "soak.yaml"), "--output", str(output)]
    draw = random.Random(seed)
    seconds: list[float] = []
    while len(seconds) < num_stops:
        run = start(arguments, log)
        reached = published(output) + draw.randint(1, 5)
        while published(output) < reached and not run.is_over():
            time.sleep(0.002)
        process = run.ranks().get(draw.randrange(NUM_RANKS))
        assert process is not None, f"the run was over before its stops were\n{log.read_text()}"
        asked = time.time()
        os.kill(process, draw.choice(_REQUESTS))
        code = run.code()
        assert code in (Exit.REQUEUE, 1), log.read_text()[-3000:]  # 1 is the elastic launcher's
        marker = output / "requeue.json"
        seconds.append(marker.stat().st_mtime - asked)
        step = json.loads(marker.read_text())["round"]
        assert step == published(output), "expected the marker's round to be saved"
        assert run.num_left() == 0, "a process was left"
        report(f"stop {len(seconds)}: round {step}, {seconds[-1]:.2f} s")
    assert start(arguments, log).code() == 0, log.read_text()[-3000:]
    assert not (output / "requeue.json").exists()
    compare(folder / "whole", output)
    return seconds
