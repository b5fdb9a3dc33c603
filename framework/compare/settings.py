"""Settings of runs as flags, and the settings that make no difference between runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from leyden.run.folder import flattened

Settings = Mapping[str, str]
"""Flag without its dashes (`model.kl_coef`) -> value as text; a class stands at the flag that names it (`model`)."""

OWN = ("trainer.default_root_dir", "checkpoint.dirpath", "ckpt_path", "trainer.logger", "verbose")
"""Keys, and beginnings of keys, of where a run writes and what it prints."""


def essential(config: Mapping[str, Any], ignored: Iterable[str] = ()) -> dict[str, str]:
    """The settings of a run without seeds, its own paths and the keys in `ignored` (with all keys under them)."""
    flat = flattened(config)
    folder = flat.get("trainer.default_root_dir", "")
    left_out = (*OWN, *ignored)
    return {
        key: value.replace(folder, "RUN") if folder and (value == folder or value.startswith(f"{folder}/")) else value
        for key, value in flat.items()
        if key.rpartition(".")[2] not in ("seed", "seed_everything")
        and not any(_under(key, start) for start in left_out)
    }


def _under(key: str, start: str) -> bool:
    return key == start or key.startswith(f"{start}.")


def seed(config: Mapping[str, Any]) -> str:
    """The seeds of a run in a few words: `1`, or each by its key where they differ."""
    flat = flattened(config)
    seeds = {key: value for key, value in flat.items() if key.rpartition(".")[2] in ("seed", "seed_everything")}
    main = seeds.get("seed_everything", "")
    others = {key: value for key, value in seeds.items() if value != main and not key.startswith("eval.")}
    changed = {key: value for key, value in others.items() if value != "0"}
    return ", ".join([main, *(f"{key} {value}" for key, value in changed.items())]).lstrip(", ")


def differing(all_settings: Sequence[Settings]) -> list[str]:
    """Keys that do not have the same value in all settings, in the order in which they first appear."""
    keys = dict.fromkeys(key for settings in all_settings for key in settings)
    return [key for key in keys if len({settings.get(key) for settings in all_settings}) > 1]


MATTER = ("model", "data")
"""Keys that say what is trained on what."""


def telling(all_settings: Sequence[Settings]) -> list[str]:
    """Keys that differ and say most: of the model, then of the data; where those are the same, of the rest. Keys that
    only some have come last, and those below a class that differs are left out, since its name says it."""
    keys = differing(all_settings)
    top = [key for key in keys if not any(_under(key, other) and key != other for other in keys)]
    chosen = [key for root in MATTER for key in top if _under(key, root)] or top
    return sorted(chosen, key=lambda key: any(key not in one for one in all_settings))


def brief(value: str | None, most: int = 18) -> str:
    """A value shortened to `most` letters; of paths and classes the last part."""
    if value is None or value == "null":
        return "none"
    last = value.rstrip("/").rpartition("/")[2]
    last = last.rpartition(".")[2] if last.startswith(("leyden.", "torch.", "peft.")) else last
    return last if len(last) <= most else f"{last[: most - 1]}…"
