"""Rewards from flags, `--reward CLASS --reward.KEY VALUE …`, read as `leyden fit` reads `--model.reward`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from leyden.cli import class_names
from leyden.cli.config_keys import flag_keys, flags, render
from leyden.errors import UserError, first_line

if TYPE_CHECKING:
    from leyden.rewards.reward import Reward


def split_flags(argv: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """The arguments that do not concern the reward, and those that do, as [name, value] with the class first."""
    rest: list[str] = []
    reward_words: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, _ = word.partition("=")
        is_reward = name == "--reward" or name.startswith("--reward.")
        (reward_words if is_reward else rest).append(word)
        if is_reward and not equals and words and not words[0].startswith("--"):
            reward_words.append(words.pop(0))
    return rest, sorted(flags(reward_words), key=lambda pair: pair[0] != "reward")


def reward_from(pairs: Sequence[list[str]]) -> Callable[[], Reward]:
    """A function that builds the reward of the flags. Only its class is looked up here, and nothing heavy imported.

    Raises:
        UserError: no class is named, or there is none of this name.
    """
    if not pairs or pairs[0][0] != "reward":
        raise UserError(f"--reward: missing; add --reward CLASS (such as {' or '.join(sorted(_reward_classes()))})")
    path = class_names.class_path("model.reward", pairs[0][1], "--reward")
    return lambda: _build([["reward", path], *pairs[1:]])


def flags_as_text(pairs: Sequence[list[str]]) -> str:
    """The reward in words: `Gold (polite 0.25)`."""
    options = ", ".join(f"{name.removeprefix('reward.')} {value}" for name, value in sorted(pairs[1:]))
    return pairs[0][1] + (f" ({options})" if options else "")


def _reward_classes() -> dict[str, str]:
    return class_names.of_kind("model.reward")


def _build(pairs: list[list[Any]]) -> Reward:
    """The reward, after the checks that `leyden fit` makes of its keys."""
    import argparse

    from jsonargparse import ArgumentParser

    from leyden.cli.check_keys import check_keys, explain
    from leyden.rewards.reward import Reward

    typed = flag_keys(pairs)
    keys = [replace(key, path=("model", *key.path), is_class=key.is_class or len(key.path) == 1) for key in typed]

    def holder(reward: Any) -> None:
        """Takes a reward as algorithms do."""

    holder.__annotations__["reward"] = Reward
    check_keys(keys, {"model": holder}, ())
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=Reward)
    try:
        config = parser.parse_args([render(pair) for pair in pairs])
        reward: Reward = parser.instantiate_classes(config).reward
    except argparse.ArgumentError as error:
        raise UserError(explain(str(error), typed)) from error
    except ValueError as error:  # the error of a constructor, inside the parser's own
        root: BaseException = error
        while root.__cause__ is not None and not isinstance(root, UserError):
            root = root.__cause__
        raise UserError(first_line(root)) from error
    return reward
