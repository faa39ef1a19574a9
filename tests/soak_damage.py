"""Random flips and cuts in the files of checkpoints: how many are found."""

import random
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from ispen_dist.checkpoint import Checkpoint, find_checkpoint, load_checkpoint
from ispen_dist.manifest import MANIFEST


@dataclass
class Damage:
    """Outcomes of one kind of damage: found by name, or harmless in a manifest's white space."""

    num: int = 0
    num_found: int = 0
    num_harmless: int = 0


def flipped(data: bytes, draw: random.Random) -> bytes:
    """Return the data with one bit changed."""
    changed = bytearray(data)
    changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(data: bytes, draw: random.Random) -> bytes:
    """Return the data without its end."""
    return data[: draw.randrange(len(data))]


def damage(folder: Path, num: int, seed: int) -> dict[str, Damage]:
    """Damage the newest checkpoint again and again; the one before must be used in its place.

    Args:
        folder: with at least two checkpoints, which are left as they were.
        num: how many damages.
        seed: of their kinds and places.
    """
    draw, outcomes = random.Random(seed), {"flips": Damage(), "truncations": Damage()}
    newest, older = sorted(folder.glob("step_*"), reverse=True)[:2]
    intact = load_checkpoint(newest)
    files = sorted(newest.iterdir())
    for _ in range(num):
        kind, change = draw.choice([("flips", flipped), ("truncations", cut)])
        file = draw.choice(files)
        data = file.read_bytes()
        file.write_bytes(change(data, draw))
        outcomes[kind].num += 1
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = find_checkpoint(folder)
        if found == older:
            # A changed sum or key in a manifest shows in the file that it is of.
            named = newest.name if file.name == MANIFEST else file.name
            assert named in str(caught[0].message), f"expected {named} to be named"
            outcomes[kind].num_found += 1
        elif file.name == MANIFEST and is_same(load_checkpoint(newest), intact):
            outcomes[kind].num_harmless += 1
        file.write_bytes(data)
    return outcomes


def is_same(first: Checkpoint, second: Checkpoint) -> bool:
    """Whether two checkpoints hold the same, NaN included."""
    if (first.step, first.state, first.trees.keys()) != (
        second.step,
        second.state,
        second.trees.keys(),
    ):
        return False
    pairs = ((tree, second.trees[name]) for name, tree in first.trees.items())
    return all(
        list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs
    )
