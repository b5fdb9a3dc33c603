"""An object from flags, `--reward CLASS --reward.KEY VALUE …`, read as `leyden fit` reads `--model.reward`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from inspect import Parameter, Signature
from typing import Any

from leyden.cli import class_names
from leyden.cli.config_keys import flag_keys, flags, render
from leyden.errors import UserError, first_line


def split_flags(argv: Sequence[str], name: str) -> tuple[list[str], list[list[str]]]:
    """The arguments that do not concern an object, and those that do, as [name, value] with its class first.

    Args:
        argv: as typed.
        name: of the flag without its dashes, such as `reward`.
    """
    rest: list[str] = []
    own: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        flag, equals, _ = word.partition("=")
        is_own = flag == f"--{name}" or flag.startswith(f"--{name}.")
        (own if is_own else rest).append(word)
        if is_own and not equals and words and not words[0].startswith("--"):
            own.append(words.pop(0))
    return rest, sorted(flags(own), key=lambda pair: pair[0] != name)


def maker(pairs: Sequence[list[str]], name: str, base: Callable[[], type]) -> Callable[[], Any]:
    """A function that builds the object of the flags. Only its class is looked up here, and nothing heavy imported.

    Args:
        pairs: from `split_flags`.
        name: of the flag; `--model.NAME` of `leyden fit` takes the same.
        base: imports and returns the class that the object's own derives from.

    Raises:
        UserError: no class is named, or there is none of this name.
    """
    if not pairs or pairs[0][0] != name:
        known = " or ".join(sorted(class_names.of_kind(f"model.{name}")))
        raise UserError(f"--{name}: missing; add --{name} CLASS (such as {known})")
    path = class_names.class_path(f"model.{name}", pairs[0][1], f"--{name}")
    return lambda: _build([[name, path], *pairs[1:]], name, base())


def flags_as_text(pairs: Sequence[list[str]]) -> str:
    """The object in words: `Gold (polite 0.25)`."""
    name = pairs[0][0]
    options = ", ".join(f"{key.removeprefix(f'{name}.')} {value}" for key, value in sorted(pairs[1:]))
    return pairs[0][1] + (f" ({options})" if options else "")


def _build(pairs: list[list[Any]], name: str, base: type) -> Any:
    """The object, after the checks that `leyden fit` makes of its keys."""
    import argparse

    from jsonargparse import ArgumentParser

    from leyden.cli.check_keys import check_keys, explain

    typed = flag_keys(pairs)
    keys = [replace(key, path=("model", *key.path), is_class=key.is_class or len(key.path) == 1) for key in typed]

    def holder(**taken: Any) -> None:
        """Takes the object as algorithms do."""

    holder.__signature__ = Signature([Parameter(name, Parameter.KEYWORD_ONLY, annotation=base)])  # type: ignore[attr-defined]
    check_keys(keys, {"model": holder}, ())
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{name}", type=base)
    try:
        config = parser.parse_args([render(pair) for pair in pairs])
        return getattr(parser.instantiate_classes(config), name)
    except argparse.ArgumentError as error:
        raise UserError(explain(str(error), typed)) from error
    except ValueError as error:  # the error of a constructor, inside the parser's own
        root: BaseException = error
        while root.__cause__ is not None and not isinstance(root, UserError):
            root = root.__cause__
        raise UserError(first_line(root)) from error
