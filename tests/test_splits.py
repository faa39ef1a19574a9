"""Split files and seeded splits."""

import json

import numpy as np
import pytest

from ispen_dist.data.errors import DataError
from ispen_dist.data.splits import read_split_file, seeded_split


@pytest.mark.parametrize("test", [None, [1]])
def test_split_file(test, tmp_path):
    path = tmp_path / "split.json"
    content = {"train": [4, 0], "dev": [2]} | ({"test": test} if test else {})
    path.write_text(json.dumps(content))
    rows = read_split_file(path, 5)
    assert {name: part.tolist() for name, part in rows.items()} == content
    assert all(part.dtype == np.int64 for part in rows.values())


@pytest.mark.parametrize(
    ("name", "num_rows", "sizes"),
    [("bibtex", 7395, (4437, 1479, 1479)), ("delicious", 16105, (9663, 3221, 3221))],
)
def test_real_split_files(shared_data, name, num_rows, sizes):
    rows = read_split_file(shared_data / name / "split-60-20-20.json", num_rows)
    assert tuple(len(rows[part]) for part in ("train", "dev", "test")) == sizes
    assert sorted(np.concatenate(list(rows.values()))) == list(range(num_rows))
    with pytest.raises(DataError, match=f"expected a row from 0 to {num_rows - 2}, got"):
        read_split_file(shared_data / name / "split-60-20-20.json", num_rows - 1)


@pytest.mark.parametrize(
    ("content", "line", "expected", "got"),
    [
        ('{"train": [0],\n"dev": [1', 2, "expected JSON", "Expecting ',' delimiter"),
        ("[" * 9999, None, "expected lists of row numbers", "maximum recursion depth"),
        ('{"train": [' + "9" * 5000 + "]}", None, "expected lists of row numbers", "Exceeds the"),
        ("[0, 1]", None, "expected an object with train, dev and test", "a list"),
        ("{}", None, "expected the names train and dev", "none; add train"),
        ('{"train": [0], "test": [1]}', None, "expected the names", "'train', 'test'; add dev"),
        ('{"train": [0], "dev": [1], "tset": [2]}', None, "train, dev and", "'tset'; the nea"),
        ('{"train": [0], "dev": [1], "dev": [2]}', None, "each name once", "'dev' twice"),
        ('{"train": "0", "dev": [1]}', None, "train: expected a list of row numbers", "a string"),
        ('{"train": [0], "dev": null}', None, "dev: expected a list of row numbers", "null"),
        ('{"train": [0], "dev": 5}', None, "dev: expected a list of row numbers", "a number"),
        ('{"train": [], "dev": [1]}', None, "train: expected a list", "an empty list"),
        ('{"train": [0, 1.0], "dev": [2]}', None, "train[1]: expected a whole number", "1.0"),
        ('{"train": [0, true], "dev": [2]}', None, "train[1]: expected a whole number", "true"),
        ('{"train": [0, "1"], "dev": [2]}', None, "train[1]: expected a whole number", '"1"'),
        ('{"train": [0], "dev": [5]}', None, "dev[0]: expected a row from 0 to 4", "5"),
        ('{"train": [0, -1], "dev": [1]}', None, "train[1]: expected a row from 0 to 4", "-1"),
        ('{"train": [0, 3, 3], "dev": [1]}', None, "train: expected each row once", "3 twice"),
        ('{"train": [0, 3], "dev": [1, 3]}', None, "dev: expected rows of no", "3, which train"),
        ('{"train": [0], "dev": [1], "test": [1]}', None, "test: expected rows", "1, which dev"),
        ("", None, "expected data", "an empty file"),
    ],
)  # fmt: skip
def test_malformed_split_file(content, line, expected, got, tmp_path):
    path = tmp_path / "split.json"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        read_split_file(path, 5)
    where = str(path) if line is None else f"{path}:{line}"
    assert str(caught.value).startswith(f"{where}: ")
    before, _, after = caught.value.problem.partition(", got")
    assert expected in before
    assert got in after


@pytest.mark.parametrize(
    ("num_rows", "fraction", "size"),
    [(10, 0.2, 2), (5, 0.5, 3), (7, 0.9, 6), (3, 0.01, 1), (2, 0.99, 1)],
)
def test_seeded_split_divides_all_rows(num_rows, fraction, size):
    kept, held_out = seeded_split(num_rows, fraction, seed=3)
    assert len(held_out) == size
    assert sorted([*kept, *held_out]) == list(range(num_rows))
    assert list(kept) == sorted(kept)
    assert list(held_out) == sorted(held_out)


def test_seeded_split_is_what_it_declares():
    _, held_out = seeded_split(20, 0.25, seed=7)
    order = np.random.Generator(np.random.PCG64(7)).permutation(20)
    assert held_out.tolist() == sorted(order[:5])
    # These numbers must not change with a version of NumPy, or runs could not be compared.
    assert held_out.tolist() == [3, 8, 12, 13, 14]
    assert seeded_split(20, 0.25, seed=8)[1].tolist() != held_out.tolist()


@pytest.mark.parametrize(
    ("num_rows", "fraction", "message"),
    [
        (1, 0.5, "num_rows: expected at least 2 rows to divide, got 1"),
        (10, 0.0, "fraction: expected a number between 0 and 1, got 0.0"),
        (10, 1.0, "fraction: expected a number between 0 and 1, got 1.0"),
        (10, float("nan"), "fraction: expected a number between 0 and 1, got nan"),
    ],
)
def test_seeded_split_refuses(num_rows, fraction, message):
    with pytest.raises(ValueError, match=message):
        seeded_split(num_rows, fraction, seed=0)
