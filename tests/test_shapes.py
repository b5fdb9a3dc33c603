"""Shapes and kinds of numbers are checked on entry to losses, surrogates, corrections, advantages and objectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from leyden import advantages, corrections, losses, objectives, surrogates
from leyden.shapes import check_shapes

F, INT, B = torch.zeros, lambda *n: torch.zeros(*n, dtype=torch.long), lambda *n: torch.ones(*n, dtype=torch.bool)


def test_letters_are_sizes_and_words_are_kinds() -> None:
    check_shapes(
        x=(F(3), "T"), y=(F(2, 3), "N T"), mask=(B(2, 3), "bool N T"), group=(INT(2), "int N"), none=(None, "T")
    )
    check_shapes(loss=(F(()), ""))
    for wrong, message in (
        ({"x": (F(3), "T"), "y": (F(4), "T")}, r"y: shape \[4\], but T is 3 in x"),
        ({"x": (F(3, 1), "T")}, r"x: shape \[3, 1\], not \[T\]"),
        ({"x": (INT(3), "T")}, "x: int64, not floating point"),
        ({"mask": (F(3), "bool T")}, "mask: float32, not bool"),
        ({"group": (F(3), "int N")}, "group: float32, not int"),
    ):
        with pytest.raises(ValueError, match=message):
            check_shapes(**wrong)  # type: ignore[arg-type]


WRONG: list[tuple[Callable[..., Any], list[Any]]] = [
    (losses.negative_log_likelihood, [F(3), F(4), 0.1]),
    (losses.bradley_terry, [F(3, 1)]),
    (losses.bradley_terry, [F(3), F(1)]),
    (losses.plackett_luce, [F(2, 3), B(2, 2)]),
    (losses.plackett_luce, [F(2, 3), F(2, 3)]),
    (losses.clipped_value, [F(3), F(3), F(1), 0.2]),
    (losses.kl_estimate, [F(())]),
    (surrogates.clipped_surrogate, [F(3), F(3, 1), 0.2]),
    (corrections.truncated_weight, [F(3, 1), 2.0]),
    (corrections.masked_weight, [INT(3), 0.5, 5.0]),
    (advantages.gae, [F(2, 3), F(2, 4), B(2, 3)]),
    (advantages.gae, [F(2, 3), F(2, 3), F(2, 3)]),
    (advantages.whiten, [F(3), F(2)]),
    (advantages.explained_variance, [F(3), F(3), F(2)]),
    (advantages.group_relative, [F(3), F(3)]),
    (advantages.leave_one_out, [F(3), INT(2)]),
    (objectives.Sigmoid(), [F(3), F(1)]),  # would broadcast, and compare every pair with one response
    (objectives.Robust(), [F(3), F(3, 1)]),
    (objectives.Hinge(), [INT(3), INT(3)]),
    (objectives.IPO(), [F(()), F(())]),
]


@pytest.mark.parametrize(("function", "arguments"), WRONG, ids=lambda x: getattr(x, "__name__", None))
def test_what_would_broadcast_is_an_error(function: Callable[..., Any], arguments: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"shape \[|not (floating point|bool|int)"):
        function(*arguments)
