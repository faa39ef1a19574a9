"""The README's commands are the ones CI runs, and what it names is there."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```(?:bash|sh)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.strip()]


def test_ci_runs_the_readme_test_command():
    assert 'pip install -e ".[dev]" && pytest' in COMMANDS
    assert 'pip install -e ".[dev]" && pytest' in (ROOT / ".ci" / "run").read_text("utf-8")


def test_the_main_job_is_one_line():
    expected = (
        "pip install -e . && accelerate launch launcher/train.py --config configs/twitter_pos.yaml"
    )
    assert expected in COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_file_a_command_names_exists(command):
    for word in shlex.split(command):
        if re.fullmatch(r"(launcher|configs|profiling|tests)/\S+\.(py|yaml)", word):
            assert (ROOT / word).is_file(), word


def test_every_file_of_the_architecture_section_exists():
    tree = re.search(r"## Architecture.*?```text\n(.*?)```", README, re.DOTALL)
    assert tree is not None
    folder = ""
    for line in tree[1].splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
        path = ROOT / name if not line.startswith(" ") else ROOT / folder / name
        assert path.exists(), name


def test_the_embedded_data_is_packaged():
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)
    assert project["tool"]["setuptools"]["package-data"]["ispen_dist.data"] == ["embedded/*/*"]
    folder = ROOT / "ispen_dist" / "data" / "embedded" / "twitter_pos"
    assert "CC BY 3.0" in (folder / "ATTRIBUTION.md").read_text("utf-8")


def test_the_hypergradient_example_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (example,) = (block for block in blocks if "hypergradient(" in block)
    done = subprocess.run(
        [sys.executable, "-c", example], capture_output=True, text=True, timeout=120, check=True
    )
    assert "converged" in done.stdout
