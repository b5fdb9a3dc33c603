"""What to type where training goes wrong: a key of the configuration, and a value that follows from the present one."""

from __future__ import annotations

from typing import NamedTuple

from leyden.diagnostics.history import History


class Advice(NamedTuple):
    """A key, as it stands in the configuration, and what to try in words."""

    key: str
    text: str


def set_to(key: str, value: float | str) -> Advice:
    """`--model.kl_coef 0.1`"""
    return Advice(f"model.{key}", f"--model.{key} {value if isinstance(value, str) else f'{value:.3g}'}")


def slower(history: History) -> Advice:
    """A third of the learning rate."""
    rate = history.settings.get("lr")
    return set_to("optimizer.lr", rate / 3) if rate else Advice("model.optimizer.lr", "a smaller --model.optimizer.lr")


def nearer(history: History) -> Advice:
    """A higher price on KL, where the algorithm has one; it is steered where there is a target."""
    price, target = history.settings.get("kl_coef"), history.settings.get("kl_target")
    if price is None:
        return slower(history)
    first = set_to("kl_target", target / 2) if target else set_to("kl_coef", 2 * price if price else 0.05)
    return either(first, slower(history))


def livelier(history: History) -> Advice:
    """A bonus on entropy, where the algorithm has one."""
    bonus = history.settings.get("entropy_coef")
    return slower(history) if bonus is None else either(set_to("entropy_coef", 3 * bonus or 0.01), slower(history))


def either(first: Advice, second: Advice) -> Advice:
    """The first, or the second."""
    return Advice(first.key, f"{first.text} or {second.text}")
