"""Rows of hub data sets: `hf:NAME`, `hf:NAME:SPLIT`, `hf:NAME:CONFIG` and `hf:NAME:CONFIG:SPLIT`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from leyden.errors import UserError, first_line, nearest

FORM = "hf:NAME:CONFIG:SPLIT"


def read_hub(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows as (`NAME:number`, row). Raises `UserError`, which lists the configurations or the splits."""
    import datasets

    repository, *parts = re.split(r":(?![^\[]*\])", name.removeprefix("hf:"))  # not in a slice, train[:9]
    if len(parts) > 2 or not repository:
        raise UserError(f"{name}: give {FORM}, where configuration and split may be left out")
    with_names = f"check the name, {FORM}, and the network"
    configurations = _asked(name, lambda: datasets.get_dataset_config_names(repository), with_names)
    configuration, asked = _configuration_and_split(name, parts, configurations)
    splits = _asked(name, lambda: datasets.get_dataset_split_names(repository, configuration), with_names)
    split = asked or ""
    if asked is None:
        split = "train" if "train" in splits else splits[0] if len(splits) == 1 else ""
    if not all(part.partition("[")[0] in splits for part in split.split("+")):
        base = name.removesuffix(f":{split}") if split else name
        hint = nearest(split, splits) if split else ""
        raise UserError(
            f"{name}: {f'no split {split!r}' if split else 'several splits'}{hint}; name one: "
            f"{', '.join(f'{base}:{one}' for one in splits)}"
        )
    data = _asked(name, lambda: datasets.load_dataset(repository, configuration, split=split), with_names)
    for number, row in enumerate(data, start=1):
        yield f"{name}:{number}", dict(row)


def _configuration_and_split(name: str, parts: list[str], known: list[str]) -> tuple[str | None, str | None]:
    """What the parts behind a name mean: the one part may be either, and a configuration's name comes first."""
    configuration: str | None
    split: str | None
    if len(parts) == 1 and parts[0] not in known:
        configuration, split = None, parts[0]
    else:
        configuration, split = [*parts, None, None][:2]
    if configuration is None and len(known) > 1 and "default" not in known:
        repository = name.split(":")[1]
        choices = ", ".join(f"hf:{repository}:{one}" for one in known[:20])
        more = f" and {len(known) - 20} more" if len(known) > 20 else ""
        raise UserError(f"{name}: a data set of {len(known)} configurations; name one: {choices}{more}")
    if configuration is not None and configuration not in known:
        hint = nearest(configuration, known) or f"; use {', '.join(known[:20])}"
        raise UserError(f"{name}: no configuration '{configuration}'{hint}")
    return configuration, split


def _asked(name: str, ask: Any, advice: str) -> Any:
    try:
        return ask()
    except Exception as error:  # a dozen kinds, all about the name, access or the network
        reason = first_line(error)
        raise UserError(f"{name}: cannot be loaded ({reason}); {advice}") from None
