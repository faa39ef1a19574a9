"""The soak in small: a few kills and a few hundred damages; `soak.py` says what is claimed."""

import csv
import subprocess
import sys
from pathlib import Path

from soak import COLUMNS

SOAK = Path(__file__).parent / "soak.py"


def test_neither_kills_nor_stops_lose_anything_and_no_damage_goes_unnoticed(tmp_path):
    # In a process of its own, which has no threads when it forks its ranks.
    command = [
        sys.executable, str(SOAK), "--start", "fork", "--kills", "3", "--stops", "2",
        "--damages", "200", "--minutes", "2", "--folder", str(tmp_path / "soak"),
        "--output", str(tmp_path / "out.csv"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    counts = {row["what"]: (int(row["count"]), int(row["of"])) for row in rows}
    assert counts["kills survived (fork, 2 ranks)"] == (3, 3)
    assert counts["stops continued (fork)"] == (2, 2)
    num_in_write, _ = counts["kills inside a checkpoint write (fork)"]
    assert num_in_write >= 1
    num_found = sum(counts[f"{kind} found"][0] for kind in ("flips", "truncations"))
    num_harmless = sum(
        counts[f"{kind} harmless in a manifest"][0] for kind in ("flips", "truncations")
    )
    assert num_found + num_harmless == 200
