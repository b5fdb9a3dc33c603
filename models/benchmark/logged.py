"""Results as `benchmark/TASK` in the last row of the run's metrics.csv, and in the trackers that the run logged to."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from leyden.atomic import write_whole
from leyden.errors import UserError, first_line
from leyden.models.restore import config_of
from leyden.run.folder import claim_folder
from leyden.run.metrics_csv import Tracker

log = logging.getLogger("leyden")


def log_results(folder: Path, measures: Mapping[str, float]) -> None:
    """Log measures by the name of their task, at the last step of the run.

    Nothing happens where the folder is no run's, or where a process trains in it, which writes the same file.
    """
    if not measures or not all((folder / name).is_file() for name in ("config.yaml", "metrics.csv")):
        return
    try:
        claimed = claim_folder(str(folder), "", resume=True, alone=True)
    except UserError:
        return
    try:
        named = {f"benchmark/{task}": value for task, value in measures.items()}
        step = _add_to_last_row(folder / "metrics.csv", named)
        for tracker in _trackers(config_of(folder / "config.yaml")) if step is not None else ():
            info = folder / "run.json"
            facts = json.loads(info.read_text(encoding="utf-8")) if info.is_file() else {}
            tracker.begin(folder, config_of(folder / "config.yaml"), {"algorithm": "benchmark"} | facts)
            tracker.log_metrics(named, step=(step or 1) - 1)
            tracker.finalize("success")
    except (OSError, ValueError) as error:  # the results themselves are in their own file
        log.warning("%s: its metrics.csv and trackers have no results (%s)", folder, first_line(error))
    finally:
        claimed.release()


def _add_to_last_row(file: Path, numbers: Mapping[str, float]) -> int | None:
    """Add numbers to the last row, and return its step; None where there is no whole row."""
    with file.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        rows, columns = list(reader), list(reader.fieldnames or [])
    if not rows or not (rows[-1].get("step") or "").isdigit():
        return None
    rows[-1] |= {name: repr(value) for name, value in numbers.items()}
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys([*columns, *numbers])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(file, text.getvalue())
    return int(rows[-1]["step"])


def _trackers(config: Mapping[str, Any]) -> Iterator[Tracker]:
    """The trackers that a run's configuration names."""
    from jsonargparse import ArgumentError, ArgumentParser

    named = (config.get("trainer") or {}).get("logger") or []
    for one in named if isinstance(named, list) else [named]:
        if not isinstance(one, dict) or "class_path" not in one:
            continue
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--logger", type=Logger)
        try:
            logger = parser.instantiate_classes(parser.parse_object({"logger": one})).logger
        except (ArgumentError, ValueError) as error:
            log.warning(
                "%s: it has no results, since it cannot be made (%s)", one["class_path"], first_line(error)[:160]
            )
            continue
        if isinstance(logger, Tracker):
            yield logger
