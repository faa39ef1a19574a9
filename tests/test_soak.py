"""The soak in small: a few kills and a few hundred damages; `soak.py` says what is claimed."""

import csv

import soak


def test_neither_kills_nor_stops_lose_anything_and_no_damage_goes_unnoticed(tmp_path, monkeypatch):
    monkeypatch.setenv("ISPEN_DATA", str(tmp_path))  # What saving costs is not for here.
    flags = ["--start", "fork", "--kills", "3", "--stops", "2", "--damages", "200"]
    flags += ["--folder", str(tmp_path / "soak"), "--output", str(tmp_path / "out.csv")]
    assert soak.main(flags) == 0
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == soak.COLUMNS
    assert all(row["command"].startswith("python tests/soak.py --start fork") for row in rows)
    counts = {row["what"]: (int(row["count"]), int(row["of"])) for row in rows}
    assert counts["kills survived (fork, 2 ranks)"] == (3, 3)
    assert counts["requeues done (fork, 2 ranks)"] == (2, 2)
    assert {"signal to saved, median (fork)", "signal to saved, slowest (fork)"} <= counts.keys()
    num_in_write, _ = counts["kills inside a checkpoint write (fork)"]
    assert num_in_write >= 1
    num_found = sum(counts[f"{kind} found"][0] for kind in ("flips", "truncations"))
    num_harmless = sum(
        counts[f"{kind} harmless in a manifest"][0] for kind in ("flips", "truncations")
    )
    assert num_found + num_harmless == 200
