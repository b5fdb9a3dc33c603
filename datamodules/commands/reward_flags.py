"""A reward from flags, `--reward CLASS --reward.KEY VALUE …`, read as `leyden fit` reads `--model.reward`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from leyden.cli import class_names
from leyden.cli.config_keys import flag_keys, flags, render
from leyden.errors import UserError

if TYPE_CHECKING:
    from leyden.rewards.reward import Reward


def asked(argv: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """The arguments that are not about the reward, and those that are as [name, value], the class first."""
    rest: list[str] = []
    own: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, _ = word.partition("=")
        mine = name == "--reward" or name.startswith("--reward.")
        (own if mine else rest).append(word)
        if mine and not equals and words and not words[0].startswith("--"):
            own.append(words.pop(0))
    return rest, sorted(flags(own), key=lambda pair: pair[0] != "reward")


def reward_from(pairs: Sequence[list[str]]) -> Callable[[], Reward]:
    """What builds the reward that the flags name. Here only its class is looked up, without importing anything heavy.

    Raises:
        UserError: no class is named, or there is none of this name.
    """
    if not pairs or pairs[0][0] != "reward":
        raise UserError(f"--reward: missing; add --reward CLASS (such as {' or '.join(sorted(_known()))})")
    path = class_names.class_path("model.reward", pairs[0][1], "--reward")
    return lambda: _build([["reward", path], *pairs[1:]])


def described(pairs: Sequence[list[str]]) -> str:
    """The reward in words: `Gold (polite 0.25)`."""
    options = ", ".join(f"{name.removeprefix('reward.')} {value}" for name, value in sorted(pairs[1:]))
    return pairs[0][1] + (f" ({options})" if options else "")


def _known() -> dict[str, str]:
    return class_names.of_kind("model.reward")


def _build(pairs: list[list[Any]]) -> Reward:
    """The reward, after the checks that `leyden fit` makes of its keys."""
    import argparse

    from jsonargparse import ArgumentParser

    from leyden.cli.check_keys import explain, vet
    from leyden.rewards.reward import Reward

    typed = flag_keys(pairs)
    keys = [replace(key, path=("model", *key.path), is_class=key.is_class or len(key.path) == 1) for key in typed]

    def holder(reward: Any) -> None:
        """Takes a reward as algorithms do."""

    holder.__annotations__["reward"] = Reward
    vet(keys, {"model": holder}, ())
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=Reward)
    try:
        config = parser.parse_args([render(pair) for pair in pairs])
        reward: Reward = parser.instantiate_classes(config).reward
    except argparse.ArgumentError as error:
        raise UserError(explain(str(error), typed)) from error
    except ValueError as error:  # what a constructor said, in the parser's own error
        root: BaseException = error
        while root.__cause__ is not None and not isinstance(root, UserError):
            root = root.__cause__
        raise UserError(str(root).splitlines()[0]) from error
    return reward
