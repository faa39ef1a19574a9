"""Things that go wrong on one rank, planted before it begins; see `forks.py`."""

import time

import torch


def _in_round(number: int):
    """Whether a trainer is in a round (from 0), as a function without arguments."""
    from ispen_dist.rounds import Rounds

    now = {"round": -1}
    take = Rounds.take

    def counted(self, number):
        now["round"] = number
        return take(self, number)

    Rounds.take = counted
    return lambda: now["round"] == number


def nan_everywhere() -> None:
    """NaN in the data in round 4, then in inner loss, outer loss and products of the solver."""
    _spoil_data(_in_round(3))
    _spoil_inner_loss(_in_round(4))
    _spoil_outer_loss(_in_round(5))
    _spoil_products(_in_round(6))


def always_nan() -> None:
    """The likelihood of the second example is NaN from the start."""
    _spoil_inner_loss(lambda: True)


def nan_products() -> None:
    """The products of the solver are NaN from the first solve."""
    _spoil_products(_in_round(2))


def _spoil_data(when) -> None:
    from ispen_dist.source import Source

    whole = Source.batch

    def batch(self, step):
        result = whole(self, step)
        if when():
            result.inputs["features"][1, 2] = torch.nan
        return result

    Source.batch = batch


def _second_is_nan(loss):
    return loss * torch.where(torch.arange(len(loss)) == 1, torch.nan, 1.0)


def _spoil_inner_loss(when) -> None:
    from ispen_dist import inner, objectives

    whole = objectives.mle

    def mle(view):
        return _second_is_nan(whole(view)) if when() else whole(view)

    objectives.mle = inner.mle = mle


def _spoil_outer_loss(when) -> None:
    from ispen_dist import objectives

    row = objectives.OUTER_OBJECTIVES["dvn"]

    def loss(view):
        return _second_is_nan(row.loss(view)) if when() else row.loss(view)

    objectives.OUTER_OBJECTIVES["dvn"] = objectives.OuterObjective(loss, row.depends_on_theta)


def _spoil_products(when) -> None:
    from ispen_dist.linalg.operators import HessianOperator
    from ispen_dist.linalg.staged_operators import StagedHessian

    def spoiled(matvec):
        def product(self, v):
            result = matvec(self, v)
            return {k: x * torch.nan for k, x in result.items()} if when() else result

        return product

    for kind in (HessianOperator, StagedHessian):
        kind.matvec = spoiled(kind.matvec)


def error_in_round() -> None:
    """Round 4 raises, as where memory runs out."""
    from ispen_dist.rounds import Rounds

    take = Rounds.take

    def failing(self, number):
        if number == 3:
            raise RuntimeError("planted: out of memory")
        return take(self, number)

    Rounds.take = failing


def no_file() -> None:
    """The data cannot be read."""
    from ispen_dist.data import loading
    from ispen_dist.data.errors import DataError

    def fail(config):
        raise DataError("planted.npz", None, "expected a file, found none")

    loading.load_splits = fail


def sleeping_reader() -> None:
    """In round 4 reading a batch does not come back."""
    from ispen_dist.source import Source

    when, whole = _in_round(3), Source.batch

    def batch(self, step):
        if when():
            time.sleep(3600)
        return whole(self, step)

    Source.batch = batch
