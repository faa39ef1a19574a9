"""The benchmark of kernels runs, writes its rows, and refuses to time a wrong kernel."""

import csv

import pytest
import torch

pytest.importorskip("triton")

import bench_kernels
import kernel_timings

from ispen_kernels import gelu_passes

COLUMNS = (
    "system,what,problem,device,threads,median_s,p20_s,p80_s,ratio_to_gradient,error,peak_bytes,"
    "versions,commit"
)
ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="tiny shapes are those of a CPU")


@pytest.fixture
def bench(monkeypatch):
    """The program, without the waiting for generated code."""
    monkeypatch.setattr(kernel_timings, "BACKEND", "aot_eager")
    monkeypatch.setattr(kernel_timings, "REPETITIONS", {"cuda": 3, "cpu": 3})
    monkeypatch.setattr(kernel_timings, "COPY_ELEMENTS", {"cuda": 2**20, "cpu": 2**12})
    return bench_kernels


def run(bench, tmp_path, *flags):
    output = tmp_path / "rows.csv"
    bench.main(["--output", str(output), *flags])
    with output.open(newline="", encoding="utf-8") as file:
        assert file.readline().strip() == COLUMNS
        file.seek(0)
        return list(csv.DictReader(file))


@ON_CPU
def test_references_are_timed_and_kernels_checked(bench, tmp_path, capsys):
    rows = run(bench, tmp_path, "--only", "forward_tangent")
    printed = capsys.readouterr().out
    assert "checked and not timed" in printed
    assert printed.count("checked, not timed: no GPU") == 4
    assert {row["system"] for row in rows} == {"reference", "compiled", "limit"}
    kernels = {row["what"] for row in rows if row["system"] == "compiled"}
    assert kernels == {
        "attention_forward_tangent",
        "layer_norm_forward_tangent",
        "gelu_forward_tangent",
    }
    for row in rows:
        assert float(row["p20_s"]) <= float(row["median_s"]) <= float(row["p80_s"])
        assert row["system"] == "limit" or float(row["ratio_to_gradient"]) > 0
        if row["system"] == "reference":
            assert float(row["error"]) < (1e-2 if "bfloat16" in row["problem"] else 1e-6)


@ON_CPU
@pytest.mark.parametrize("kernel", ["label_interaction", "skip_chain", "cg_update", "dots"])
def test_compiled_references_are_exact(bench, tmp_path, kernel):
    rows = run(bench, tmp_path, "--only", kernel)
    compiled = [row for row in rows if row["system"] == "compiled"]
    assert len(compiled) == 1
    assert float(compiled[0]["error"]) < 1e-6


def test_a_wrong_kernel_is_refused_before_anything_is_timed(bench, monkeypatch, tmp_path):
    right = gelu_passes.forward
    monkeypatch.setattr(gelu_passes, "forward", lambda x: right(x) * (1 + 1e-5))
    with pytest.raises(SystemExit) as exit_:
        run(bench, tmp_path, "--only", "gelu_forward")
    assert "gelu_forward" in str(exit_.value.code)
    assert "twice eager's" in str(exit_.value.code)
    assert not (tmp_path / "rows.csv").exists()


def test_a_kernel_that_is_not_finite_is_refused(bench, monkeypatch, tmp_path):
    right = gelu_passes.forward
    monkeypatch.setattr(gelu_passes, "forward", lambda x: right(x) * float("nan"))
    with pytest.raises(SystemExit, match="inf"):
        run(bench, tmp_path, "--only", "gelu_forward")


def test_an_unknown_kernel_is_named(bench, capsys):
    with pytest.raises(SystemExit) as exit_:
        bench.main(["--only", "softmax"])
    assert exit_.value.code == 2
    assert "expected part of one of" in capsys.readouterr().err


def test_every_kernel_has_a_case(bench):
    names = {case.what for case in bench.build_cases(bench.TINY, "")}
    passes = ("forward", "forward_tangent", "backward", "backward_tangent")
    assert names == {
        *(f"{what}_{each}" for what in ("attention", "layer_norm", "gelu") for each in passes),
        *("label_interaction_all", "skip_chain_all", "dots"),
        *("cg_update", "direction_update", "single_reduction_update"),
    }


def test_verdicts(bench):
    case = bench.build_cases(bench.TINY, "dots")[0]

    def measured(system, seconds):
        return bench.Measured(system, case.what, case.problem, [seconds] * 3)

    fast = [measured("ispen_dist", 1.0), measured("compiled", 2.0)]
    slow = [measured("ispen_dist", 2.0), measured("compiled", 1.0)]
    assert bench.verdict(case, fast, {}).endswith(": use")
    assert bench.verdict(case, slow, {}).endswith(": slower than compiled: not used")
    assert "out of memory" in bench.verdict(case, slow[:1], {"compiled": "out of memory"})
