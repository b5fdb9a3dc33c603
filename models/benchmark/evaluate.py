"""One task at a time by lm-eval's evaluator, and what is kept of it."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lm_eval.api.task
import numpy as np
import torch
from jinja2.exceptions import SecurityError
from lm_eval import evaluator
from lm_eval.api.group import Group
from lm_eval.api.metrics import bits_per_byte, mean, weighted_perplexity
from lm_eval.api.task import Task

from leyden.compare.influence import Kind, error_of
from leyden.errors import UserError
from leyden.fingerprint import fingerprint_text
from leyden.models.benchmark.lm import PolicyLM
from leyden.models.benchmark.results import Record
from leyden.models.benchmark.templates import stopped

DRAWS = 200
"""Resamples of the questions, for the standard error of a measure that is no mean."""
NOT_THE_TASK = ("metadata", "dataset_kwargs", "num_fewshot", "task", "task_alias", "tag")
"""What a task's configuration says that does not change its questions, or is compared by itself."""


@dataclass(frozen=True)
class Settings:
    """How tasks are asked.

    Args:
        limit: only the first so many questions of each task.
        shots: examples before each question; None is what the task says.
        chat: write questions by the chat template.
        multiturn: give examples as turns of their own.
        system: system instruction.
        seed: of the examples and of sampled answers.
        allow_code: run what tasks would run.
    """

    limit: int | None = None
    shots: int | None = None
    chat: bool = False
    multiturn: bool = True
    system: str | None = None
    seed: int = 1234
    allow_code: bool = False


def seeded(seed: int) -> None:
    """The generators as lm-eval sets them, before tasks are loaded and before each is asked."""
    random.seed(0)
    np.random.seed(seed)
    torch.manual_seed(seed)


def prepare(task: Task, settings: Settings) -> None:
    """Set the examples of a task.

    Raises:
        UserError: the task fixes how many there are.
    """
    own = task.get_config("num_fewshot")
    if settings.shots is not None:
        if own == 0 and settings.shots > 0:
            raise UserError(
                f"--num_fewshot {settings.shots}: {task.task_name} is asked without examples, as its file says; leave "
                "it out"
            )
        task.set_config(key="num_fewshot", value=settings.shots)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=settings.seed)


def facts(task: Task, lm: PolicyLM, settings: Settings) -> dict[str, Any]:
    """What two results of a task must share to be compared, as far as it is known before it is asked."""
    config = {name: value for name, value in task.dump_config().items() if name not in NOT_THE_TASK}
    template = ""
    if settings.chat or settings.system:
        shape = lm.chat_template(True) if settings.chat else ""
        template = fingerprint_text(repr((shape, settings.system, settings.chat and settings.multiturn)))
    return {
        "version": str(task.VERSION),
        "task": fingerprint_text(re.sub(r" at 0x[0-9a-f]+", "", repr(sorted(config.items())))),  # of functions
        "template": template,
        "shots": int(task.get_config("num_fewshot") or 0),
        "seed": settings.seed,
        "limit": settings.limit,
    }


def run(task: Task, lm: PolicyLM, settings: Settings) -> Record:
    """Ask all questions of a prepared task, and return its record without what is known of the model."""
    name, known = task.task_name, facts(task, lm, settings)
    seeded(settings.seed)
    try:
        with _without_bars():
            found = evaluator.evaluate(
                lm=lm,
                task_dict={"tasks": {name: task}},
                limit=settings.limit,
                bootstrap_iters=0,
                log_samples=True,
                system_instruction=settings.system,
                apply_chat_template=settings.chat,
                fewshot_as_multiturn=settings.chat and settings.multiturn,
                confirm_run_unsafe_code=settings.allow_code,
            )
    except SecurityError as error:  # of a template that runs Python for some questions only
        raise stopped(name, error) from None
    samples, better = found["samples"][name], found["higher_is_better"][name]
    values = {key: value for key, value in found["results"][name].items() if "," in key and "_stderr," not in key}
    record: Record = known | {
        "questions": int(found["results"][name]["sample_len"]),
        "documents": fingerprint_text(repr([one["doc_hash"] for one in samples])),
        "prompts": fingerprint_text(repr([one["prompt_hash"] for one in samples])),
        "lm_eval": lm_eval.__version__,
        "metrics": {},
        "outcomes": {},
    }
    for key, value in values.items():
        metric, chosen = key.split(",", 1)
        items = [one[metric] for one in samples if one["filter"] == chosen and metric in one]
        kind, deviation, outcomes = _spread(task.aggregation().get(metric, mean), items)
        best = "least" if better.get(metric) is False else "most"
        named = metric if chosen == "none" else f"{metric}:{chosen}"
        record["metrics"][named] = {"value": float(value), "error": deviation, "best": best, "kind": kind}
        if outcomes is not None:
            record["outcomes"][named] = outcomes
    record["metric"] = next(iter(record["metrics"]))
    return record


def _spread(aggregate: Callable[[Sequence[Any]], float], items: Sequence[Any]) -> tuple[Kind, float | None, Any]:
    """Kind and standard error over questions of a measure, and its outcomes where it has one on each question."""
    if aggregate is mean and all(isinstance(one, int | float | np.number) for one in items):
        outcomes = [float(one) for one in items]
        return "mean", error_of("mean", outcomes), [int(x) if x == int(x) else x for x in outcomes]
    if aggregate in (bits_per_byte, weighted_perplexity):
        kind: Kind = "bits" if aggregate is bits_per_byte else "perplexity"
        pairs = [[float(x), float(w)] for x, w in items]
        return kind, error_of(kind, pairs), pairs
    draw = random.Random(0)
    try:
        drawn = [float(aggregate(draw.choices(items, k=len(items)))) for _ in range(DRAWS)]
    except (ValueError, TypeError, ZeroDivisionError):  # a measure that some samples do not have
        return "other", None, None
    return "other", float(np.std(drawn, ddof=1)) if len(items) > 1 else None, None


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hide lm-eval's bar of questions that are written, since the command has its own progress."""
    module: Any = lm_eval.api.task
    bar, module.tqdm = module.tqdm, lambda items, **kwargs: items
    try:
        yield
    finally:
        module.tqdm = bar


def aggregated(group: Group, records: Mapping[str, Record]) -> Record | None:
    """The record of a group of which all tasks have one; None where it has no measure of its own."""
    leaves = [task.task_name for task in group.get_all_tasks()]
    if not group.has_aggregation or not all(name in records for name in leaves):
        return None
    flat = {name: _as_lm_eval(records[name]) for name in leaves}
    found = group.aggregate(flat)
    record: Record = {
        "version": group.version,
        "tasks": leaves,
        "questions": sum(records[name]["questions"] for name in leaves),
        "metrics": {},
        "outcomes": {},
    }
    for config in group.aggregate_metric_list or ():
        for key, value in found.items():
            if "," not in key or key.split(",")[0] != config.metric:
                continue
            named = config.metric if key.endswith(",none") else key.replace(",", ":", 1)
            best = next(r["metrics"][named]["best"] for r in records.values() if named in r["metrics"])
            error = found.get(key.replace(",", "_stderr,", 1))
            error = None if error in (None, "N/A") else float(error)
            kind = "weighted" if config.weight_by_size else "unweighted"
            record["metrics"][named] = {"value": float(value), "error": error, "best": best, "kind": kind}
    if not record["metrics"]:
        return None
    record["metric"] = next(iter(record["metrics"]))
    return record


def _as_lm_eval(record: Record) -> dict[str, Any]:
    """A task's record as lm-eval's groups read it."""
    flat: dict[str, Any] = {"sample_len": record["questions"]}
    for named, one in record["metrics"].items():
        metric, _, chosen = named.partition(":")
        flat[f"{metric},{chosen or 'none'}"] = one["value"]
        flat[f"{metric}_stderr,{chosen or 'none'}"] = "N/A" if one["error"] is None else one["error"]
    return flat
