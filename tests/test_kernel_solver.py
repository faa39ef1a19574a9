"""The fused vector updates against their references; whatever cannot be right is refused."""

import os

import pytest
import torch
from exactness import DEVICE, assert_as_exact
from torch.autograd import forward_ad

CUDA = torch.cuda.is_available()
if not CUDA:  # read by Triton when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from ispen_kernels import solver  # noqa: E402
from ispen_kernels.trees import CHUNK  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.float64]
# One element, odd sizes, an empty tensor, a whole chunk, one more than a chunk, several chunks.
SHAPES = [(1,), (3, 17), (0, 4), (33,), (2, CHUNK // 2), (CHUNK + 1,), (), (257, 33)]

UPDATES = {
    "cg": (solver.cg_update_, solver.cg_update_reference, 4, 1),
    "direction": (solver.direction_update_, solver.direction_update_reference, 2, 1),
    "single_reduction": (
        solver.single_reduction_update_,
        solver.single_reduction_update_reference,
        5,
        2,
    ),
}


def tree(dtype, seed, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
        for shape in shapes
    ]


def copies(tensors, dtype=None):
    return [tensor.to(dtype or tensor.dtype, copy=True) for tensor in tensors]


def scalars(num, dtype):
    return [torch.tensor(value, dtype=dtype, device=DEVICE) for value in (0.37, -1.3)[:num]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", UPDATES)
def test_updates_are_as_exact_as_eager(name, dtype):
    update, reference, num_trees, num_scalars = UPDATES[name]
    got = [tree(dtype, seed) for seed in range(num_trees)]
    eager = [copies(t) for t in got]
    exact = [copies(t, torch.float64) for t in got]
    coefficients = scalars(num_scalars, dtype)
    results = [
        f(*trees, *(c.to(trees[0][0].dtype) for c in coefficients))
        for f, trees in ((update, got), (reference, eager), (reference, exact))
    ]
    for trio in zip(got, eager, exact, strict=True):
        assert_as_exact(*(torch.cat([t.flatten() for t in tensors]) for tensors in trio), floor=2)
    if name == "cg":
        assert_as_exact(*results, floor=8)
    else:
        assert results == [None, None, None]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dots_are_as_exact_as_eager(dtype):
    a, b = tree(dtype, 0), tree(dtype, 1)
    pairs = [(a, a), (a, b), (b, b)]
    exact = solver.dots_reference([(copies(x, torch.float64), copies(y, torch.float64))
                                   for x, y in pairs])  # fmt: skip
    got, eager = solver.dots(pairs), solver.dots_reference(pairs)
    # The products cancel in <a, b>: the floor is in units of <a, a>, the size of its terms.
    assert_as_exact(got, eager, exact, floor=8)
    assert torch.equal(got, solver.dots(pairs)), "expected the same bits from the same call"


@pytest.mark.parametrize("dtype", DTYPES)
def test_conjugate_gradients_of_kernels_solve_a_system(dtype):
    torch.manual_seed(0)
    root = torch.randn(17, 17, dtype=dtype, device=DEVICE)
    A = root @ root.T / 17 + torch.eye(17, dtype=dtype, device=DEVICE)
    b = torch.randn(17, dtype=dtype, device=DEVICE)
    x, r, p = [torch.zeros_like(b)], [b.clone()], [b.clone()]
    rr = solver.dots([(r, r)])[0]
    for _ in range(17):
        Ap = [A @ p[0]]
        rr_next = solver.cg_update_(x, r, p, Ap, rr / solver.dots([(p, Ap)])[0])
        solver.direction_update_(p, r, rr_next / rr)
        rr = rr_next
    assert torch.linalg.norm(A @ x[0] - b) <= 100 * torch.finfo(dtype).eps * torch.linalg.norm(b)


def test_reads_strided_trees_and_refuses_to_write_them():
    shapes = [(17, 33), (3, 5)]
    x, r, p = (tree(torch.float64, seed, shapes) for seed in range(3))
    Ap = [tensor.T.contiguous().T for tensor in tree(torch.float64, 3, shapes)]
    x_2, r_2 = copies(x), copies(r)
    (alpha,) = scalars(1, torch.float64)
    rr = solver.cg_update_(x, r, p, Ap, alpha)
    torch.testing.assert_close(rr, solver.cg_update_reference(x_2, r_2, p, Ap, alpha))
    torch.testing.assert_close(x + r, x_2 + r_2)
    with pytest.raises(ValueError, match=r"x\[0\]: expected a contiguous"):
        solver.cg_update_(Ap, r, p, copies(p), alpha)


def test_views_at_odd_addresses_are_read_and_written():
    memory = torch.zeros(101, dtype=torch.float32, device=DEVICE)
    p, r = [memory[1:100]], [torch.ones(99, device=DEVICE)]
    solver.direction_update_(p, r, torch.tensor(2.0, device=DEVICE))
    assert memory.tolist() == [0.0, *[1.0] * 99, 0.0]


def test_empty_trees_have_empty_sums():
    (alpha,) = scalars(1, torch.float64)
    nothing = [torch.empty(0, 3, dtype=torch.float64, device=DEVICE)]
    assert solver.dots([]).shape == (0,)
    for empty in ([], nothing):
        assert solver.dots([(empty, empty)] * 2).tolist() == [0.0, 0.0]
        assert solver.cg_update_(empty, empty, empty, empty, alpha).item() == 0.0
        solver.direction_update_(empty, empty, alpha)
        solver.single_reduction_update_(empty, empty, empty, empty, empty, alpha, alpha)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scalars_that_are_not_finite_reach_every_result(bad):
    x, r, p, Ap = (tree(torch.float32, seed, [(33,)]) for seed in range(4))
    rr = solver.cg_update_(x, r, p, Ap, torch.tensor(bad, device=DEVICE))
    assert not torch.isfinite(torch.stack([rr, *x[0], *r[0]])).any()
    solver.direction_update_(p, [torch.ones(33, device=DEVICE)], torch.tensor(bad, device=DEVICE))
    assert not torch.isfinite(p[0]).any()


def test_a_scalar_of_the_other_precision_is_rounded_to_the_tree():
    p, r = (tree(torch.float32, seed) for seed in range(2))
    wide = torch.tensor(1.0 / 3.0, dtype=torch.float64, device=DEVICE)
    q = copies(p)
    solver.direction_update_(p, r, wide)
    solver.direction_update_(q, r, wide.float())
    assert all(torch.equal(a, b) for a, b in zip(p, q, strict=True))


def test_refuses_what_does_not_fit():
    a, b = tree(torch.float32, 0), tree(torch.float32, 1)
    one = torch.tensor(1.0, device=DEVICE)
    with pytest.raises(ValueError, match="expected 8 tensors as in p, got 7"):
        solver.direction_update_(a, b[1:], one)
    with pytest.raises(ValueError, match=r"r\[1\]: expected shape \(3, 17\), got \(17, 3\)"):
        solver.direction_update_(a, [b[0], b[1].T, *b[2:]], one)
    with pytest.raises(ValueError, match=r"r\[0\]: expected float32 or float64, one for all"):
        solver.direction_update_(a, [b[0].double(), *b[1:]], one)
    with pytest.raises(ValueError, match=r"r\[0\]: expected memory of its own"):
        solver.direction_update_(a, a, one)
    with pytest.raises(ValueError, match=r"beta: expected .* shape \(\)"):
        solver.direction_update_(a, b, one[None])
    with pytest.raises(ValueError, match="expected float32 or float64"):
        solver.dots([([one.half()], [one.half()])])


def test_refuses_to_be_differentiated():
    a, b = tree(torch.float64, 0, [(3,)]), tree(torch.float64, 1, [(3,)])
    one = torch.tensor(1.0, dtype=torch.float64, device=DEVICE)
    a[0].requires_grad_()
    for call in (lambda: solver.dots([(a, b)]), lambda: solver.direction_update_(b, a, one)):
        with pytest.raises(RuntimeError, match="no autograd"):
            call()
    with torch.no_grad():
        solver.direction_update_(b, a, one)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no autograd"):
        solver.dots([([forward_ad.make_dual(b[0], b[0])], b)])


def test_the_reference_can_be_differentiated():
    a = torch.randn(3, dtype=torch.float64, requires_grad=True)
    dots = solver.dots_reference([([a], [a])])
    assert torch.autograd.gradgradcheck(lambda x: solver.dots_reference([([x], [x])]), (a,))
    torch.testing.assert_close(torch.autograd.grad(dots[0], a)[0], 2 * a.detach())


@pytest.mark.skipif(not CUDA, reason="counts launches and synchronisations of a GPU")
def test_an_update_never_waits_for_the_host():
    x, r, p, Ap = (tree(torch.float32, seed) for seed in range(4))
    one = torch.tensor(1.0, device=DEVICE)
    solver.cg_update_(x, r, p, Ap, one)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        solver.cg_update_(x, r, p, copies(Ap), one)
    finally:
        torch.cuda.set_sync_debug_mode("default")
