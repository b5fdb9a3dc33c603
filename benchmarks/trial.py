"""What the trials on generated data share: commands, figures of a run, and the KL between two models."""

from __future__ import annotations

import csv
import json
import math
import statistics
from pathlib import Path

from leyden.cli.demo import gain, scores
from leyden.cli.launcher import main as leyden


def run(*words: object) -> None:
    arguments = [str(word) for word in words]
    print("leyden", *arguments, flush=True)
    code = leyden(arguments)
    if code:
        raise SystemExit(code)


def last(metrics: Path, name: str) -> float:
    """The last value of a column of metrics.csv."""
    return column(metrics, name)[-1]


def divergence(policy: Path, reference: Path, answers: Path) -> tuple[float, float]:
    """KL of the policy from the reference, estimated on the policy's own answers, and its standard error."""
    import torch

    from leyden.batch.forest import Tree, pack
    from leyden.data.chat_template import ChatTemplate
    from leyden.example import Example, Message
    from leyden.models import CausalLM

    rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    models = [CausalLM(str(path)) for path in (policy, reference)]
    for model in models:
        model.build()
        model.eval()
    template = ChatTemplate(models[0].tokenizer)
    found: list[float] = []
    for row in rows:
        turn = Message(role="assistant", content=row["response"])
        tree: Tree = template.encode(Example(row["prompt"], [[turn]]))
        with torch.no_grad():
            batch = pack([tree])
            first, second = (batch.per_branch(model(batch).logp) for model in models)
        found.append(float(first - second))
    return statistics.fmean(found), statistics.stdev(found) / math.sqrt(len(found))


def improvement(policy: Path, reference: Path, answers: Path, reference_answers: Path) -> dict[str, float]:
    """Mean gold reward before and after, the gain and its standard error, and the KL from the reference (nats an
    answer) and its standard error, from files of answers to the same questions."""
    before, after = scores(reference_answers), scores(answers)
    difference, error = gain(before, after)
    kl, kl_error = divergence(policy, reference, answers)
    means = {"before": statistics.fmean(before), "after": statistics.fmean(after)}
    return means | {"gain": difference, "error": error, "kl": kl, "kl_error": kl_error}


def column(metrics: Path, name: str) -> list[float]:
    """All values of a column of metrics.csv."""
    with metrics.open(encoding="utf-8", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]
