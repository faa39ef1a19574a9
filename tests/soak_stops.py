"""The run of the soak, asked to stop at random moments and started again until it is done."""

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from soak_kills import compare, published
from soak_starts import NUM_RANKS, Start

from ispen_dist.exits import Exit
from ispen_dist.stopping import STOP_SIGNALS

_REQUESTS = tuple(number for number in STOP_SIGNALS if number != signal.SIGINT)


def stop_again(
    start: type[Start],
    folder: Path,
    num_stops: int,
    seed: int,
    report: Callable[[str], None],
) -> list[float]:
    """Stop and continue the run whose settings and undisturbed results a soak left in a folder.

    Returns:
        Seconds from each signal to the marker, which is written when everything is saved.
    """
    output = folder / "stopped"
    arguments = ["--config", str(folder / "soak.yaml"), "--output", str(output)]
    logs = folder / "logs"
    draw = random.Random(seed)
    seconds: list[float] = []
    while len(seconds) < num_stops:
        run = start(logs, *arguments)
        reached = published(output) + draw.randint(1, 5)
        while published(output) < reached and not run.is_over():
            time.sleep(0.002)
        assert not run.is_over(), f"the run was over before its stops were\n{run.text()}"
        rank, number = draw.randrange(NUM_RANKS), draw.choice(_REQUESTS)
        assert rank in run.ranks()  # found once, before the clock begins
        asked = time.time()
        run.send(number, rank)
        code = run.code()
        assert code in (Exit.REQUEUE, 1), run.text()  # 1 is the elastic launcher's
        marker = output / "requeue.json"
        seconds.append(marker.stat().st_mtime - asked)
        step = json.loads(marker.read_text())["round"]
        assert step == published(output), "expected the marker's round to be saved"
        report(f"stop {len(seconds)}: round {step}, {seconds[-1]:.2f} s")
    last = start(logs, *arguments)
    assert last.code() == 0, last.text()
    assert not (output / "requeue.json").exists()
    compare(folder / "whole", output)
    return seconds
