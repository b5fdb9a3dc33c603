"""People's votes as columns of the runs whose answers they ranked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from leyden.compare.groups import grouped
from leyden.compare.run import RunFiles
from leyden.errors import UserError
from leyden.votes.bootstrap import Estimate
from leyden.votes.bradley_terry import Scores, bradley_terry
from leyden.votes.reward_agreement import reward_agreement
from leyden.votes.summary import conclusion
from leyden.votes.vote_file import read_votes


def add_votes(runs: Sequence[RunFiles], file: Path, ignored: Iterable[str] = ()) -> list[str]:
    """Give each run that people ranked the columns `people/…`, with intervals over items, and return notes.

    A model of the votes is the run of the same name, or in the folder of that name. Notes call it as the table does,
    whose groups leave out the settings in `ignored`.

    Raises:
        UserError: the file holds no votes, or none of its models is one of the runs.
    """
    items, votes = read_votes(file)
    scores = bradley_terry(items, votes)
    named = _by_name(runs)
    models = sorted({answer.model for item in items for answer in item.answers if answer.model})
    known = [name for name in models if name in named]
    if not known:
        answered = f"its models are {', '.join(models)}" if models else "it names no models"
        raise UserError(
            f"--votes {file}: none of the runs is in it ({answered}; the runs are "
            f"{', '.join(run.name for run in runs)}); compare runs that people ranked answers of"
        )
    for name in known:
        run = named[name]
        if name in scores.models:
            at = scores.models.index(name)
            _add(run, "people/score", scores.scores[at])
            _add(run, "people/win_rate", scores.win_rates[at])
        reward = reward_agreement(items, votes, name)
        if reward is not None:
            _add(run, "people/agreement", reward.share)
    others = [name for name in models if name not in named]
    notes = [f"{file}: models in the votes that are none of the runs: {', '.join(others)}"] if others else []
    shown = _shown(runs, ignored)
    without = [shown[run] for run in runs if run not in {named[name] for name in known}]
    notes += [f"{file}: no votes on {', '.join(without)}"] if without else []
    scores = _renamed(scores, {name: shown[named[name]] for name in known})
    said = [*conclusion(scores), *scores.notes()] if scores.models else []
    return [*(sentence.removesuffix(".") for sentence in said), *notes]


def _shown(runs: Sequence[RunFiles], ignored: Iterable[str]) -> dict[RunFiles, str]:
    """Run -> the name of its row in the table, and its own after it where it shares the row with other seeds."""
    return {
        run: group.name if len(group.runs) == 1 else f"{group.name} ({run.name})"
        for group in grouped(runs, ignored)
        for run in group.runs
    }


def _renamed(scores: Scores, names: Mapping[str, str]) -> Scores:
    models, apart = ([names.get(name, name) for name in some] for some in (scores.models, scores.apart))
    return replace(scores, models=models, apart=tuple(apart))


def _by_name(runs: Sequence[RunFiles]) -> dict[str, RunFiles]:
    """Name -> run: by its name in tables, and by that of its folder where only one has it."""
    folders = [run.folder.resolve().name for run in runs]
    by_folder = {name: run for name, run in zip(folders, runs, strict=True) if folders.count(name) == 1}
    return by_folder | {run.name: run for run in runs}


def _add(run: RunFiles, column: str, value: Estimate) -> None:
    if math.isnan(value.value):
        return
    run.series[column] = [(run.steps, value.value)]
    if value.low < value.high:
        run.series |= {f"{column}_low": [(run.steps, value.low)], f"{column}_high": [(run.steps, value.high)]}
