"""The passes of a solver over its vectors, one pass of memory each."""

import importlib.util
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from ispen_dist.graphs.compiler import Compiler, spec_of
from ispen_dist.linalg.vectors import Local, Parts, PlainLocal
from ispen_dist.ops.choice import chosen


def local_vectors(device: torch.device, compiler: Compiler | None) -> Local:
    """Return the arithmetic of own parts for a device.

    The kernel of `ispen_kernels.solver` on a GPU; compiled loops where there is a compiler;
    otherwise plain PyTorch.
    """
    on_gpu = device.type == "cuda"
    has_triton = importlib.util.find_spec("triton") is not None
    if chosen(can_run=has_triton and (on_gpu or _interpreted()), is_better=on_gpu):
        return KernelLocal()
    return PlainLocal() if compiler is None else CompiledLocal(compiler)


def _interpreted() -> bool:
    from ispen_kernels.attention import INTERPRETED

    return INTERPRETED


class KernelLocal:
    """The passes as Triton kernels, see `Local`."""

    def dots(self, pairs: Sequence[tuple[Parts, Parts]]) -> Tensor:
        """See `Local.dots`."""
        from ispen_kernels import solver

        return solver.dots(pairs)

    def curvature(self, p: Parts, Hp: Parts, shift: Tensor) -> Tensor:
        """See `Local.curvature`."""
        pHp, pp = self.dots([(p, Hp), (p, p)]).unbind()
        return pHp + shift * pp

    def cg_update(
        self, q: Parts, r: Parts, p: Parts, Hp: Parts, alpha: Tensor, shift: Tensor
    ) -> Tensor:
        """See `Local.cg_update`."""
        from ispen_kernels import solver

        return solver.cg_update_(q, r, p, Hp, alpha, shift)

    def direction_update(self, p: Parts, r: Parts, beta: Tensor) -> None:
        """See `Local.direction_update`."""
        from ispen_kernels import solver

        solver.direction_update_(p, r, beta)

    def single_reduction_update(
        self, q: Parts, r: Parts, p: Parts, s: Parts, Ar: Parts, alpha: Tensor, beta: Tensor
    ) -> None:
        """See `Local.single_reduction_update`."""
        from ispen_kernels import solver

        solver.single_reduction_update_(q, r, p, s, Ar, alpha, beta)


class CompiledLocal:
    """The passes of `PlainLocal`, each compiled for the shapes of the tree.

    Args:
        compiler: remembers them.
    """

    def __init__(self, compiler: Compiler) -> None:
        self._compiler = compiler

    def dots(self, pairs: Sequence[tuple[Parts, Parts]]) -> Tensor:
        """See `Local.dots`; by the library, which reads each pair once."""
        return PlainLocal().dots(pairs)

    def curvature(self, p: Parts, Hp: Parts, shift: Tensor) -> Tensor:
        """See `Local.curvature`."""
        return self._run(_curvature, [p, Hp], (shift,))[0]

    def cg_update(
        self, q: Parts, r: Parts, p: Parts, Hp: Parts, alpha: Tensor, shift: Tensor
    ) -> Tensor:
        """See `Local.cg_update`."""
        return self._run(_cg_update, [q, r, p, Hp], (alpha, shift))[0]

    def direction_update(self, p: Parts, r: Parts, beta: Tensor) -> None:
        """See `Local.direction_update`."""
        self._run(_direction_update, [p, r], (beta,))

    def single_reduction_update(
        self, q: Parts, r: Parts, p: Parts, s: Parts, Ar: Parts, alpha: Tensor, beta: Tensor
    ) -> None:
        """See `Local.single_reduction_update`."""
        self._run(_single_reduction_update, [q, r, p, s, Ar], (alpha, beta))

    def _run(
        self, function: Callable[..., Sequence[Tensor]], trees: list[Parts], scalars: Parts
    ) -> Sequence[Tensor]:
        tensors = [x for tree in trees for x in tree] + list(scalars)
        size = len(trees[0])

        def build() -> Callable[..., Sequence[Tensor]]:
            def flat(*inputs: Tensor) -> Sequence[Tensor]:
                groups = [inputs[i * size : (i + 1) * size] for i in range(len(trees))]
                return function(*groups, *inputs[len(trees) * size :])

            name = f"solver{function.__name__}"
            return self._compiler.compile(make_fx(flat)(*(x.clone() for x in tensors)), name)

        key = ("vectors", function.__name__, len(trees), spec_of(tensors))
        return self._compiler.once(key, build)(*tensors)


def _curvature(p: Parts, Hp: Parts, shift: Tensor) -> Parts:
    return [_sum(p_i * (Hp_i + shift * p_i) for p_i, Hp_i in zip(p, Hp, strict=True))]


def _cg_update(
    q: Parts, r: Parts, p: Parts, Hp: Parts, alpha: Tensor, shift: Tensor
) -> Parts:
    for q_i, r_i, p_i, Hp_i in zip(q, r, p, Hp, strict=True):
        q_i.add_(alpha * p_i)
        r_i.sub_(alpha * (Hp_i + shift * p_i))
    return [_sum(x * x for x in r)]


def _direction_update(p: Parts, r: Parts, beta: Tensor) -> Parts:
    for p_i, r_i in zip(p, r, strict=True):
        p_i.copy_(r_i + beta * p_i)
    return []


def _single_reduction_update(
    q: Parts, r: Parts, p: Parts, s: Parts, Ar: Parts, alpha: Tensor, beta: Tensor
) -> Parts:
    _direction_update(p, r, beta)
    _direction_update(s, Ar, beta)
    for q_i, r_i, p_i, s_i in zip(q, r, p, s, strict=True):
        q_i.add_(alpha * p_i)
        r_i.sub_(alpha * s_i)
    return []


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack([x.sum() for x in terms]).sum()
