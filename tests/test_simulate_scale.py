"""The counted collectives of one solver iteration are those that the stages imply."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS, WIDTH = 3, 64
NUM_STAGES = BLOCKS + 4  # embedding, projection, final norm, output


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    output = tmp_path_factory.mktemp("simulate") / "rows.csv"
    script = ROOT / "profiling" / "simulate_scale.py"
    flags = {
        "--ranks": ["4", "64"],
        "--blocks": [str(BLOCKS)],
        "--width": [str(WIDTH)],
        "--vocabulary": ["256"],
        "--output": [str(output)],
    }
    command = [sys.executable, str(script)]
    command += [word for name, values in flags.items() for word in (name, *values)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    with output.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_stage_is_gathered_twice_and_reduced_once_or_twice(rows):
    assert len(rows) == 8
    for row in rows:
        assert int(row["all_gathers"]) == 2 * NUM_STAGES
        scatters = 2 if row["curvature"] == "hessian" else 1
        assert int(row["reduce_scatters"]) == scatters * NUM_STAGES


def test_an_iteration_needs_two_all_reduces_or_one(rows):
    for row in rows:
        assert int(row["all_reduces"]) == {"cg": 2, "cg_single_reduction": 1}[row["solver"]]


def test_bytes_are_those_of_the_formula(rows):
    """On 4 ranks rows divide but for 25 tags; a product sends 3 + 2 or 3 + 1 trees."""
    for row in rows:
        if row["ranks"] != "4":
            continue
        padding = 4 * (3 * (WIDTH * 2) + 3)  # 25 rows of the output are cut as 28
        tree = 4 * int(row["parameters"]) + padding
        trees = 5 if row["curvature"] == "hessian" else 4
        dots = 4 * {"cg": 2, "cg_single_reduction": 4}[row["solver"]]
        assert int(row["sent_bytes"]) == round(0.75 * (trees * tree + 2 * dots))


def test_memory_falls_with_the_number_of_ranks(rows):
    at = {row["ranks"]: int(row["parameter_bytes"]) for row in rows}
    assert at["4"] < 4 * int(rows[0]["parameters"]) / 4 * 1.01
    assert at["64"] < at["4"] / 10
