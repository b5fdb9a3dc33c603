"""Multiple-choice questions, side by side with lm-eval's own Hugging Face model.

    python benchmarks/choices.py --model MODEL_FOLDER

Both get the same requests of lm-eval: questions of the sample world with four choices each. First, all questions are
scored by both, and log-probabilities and accuracy are compared. Then both take turns on the first of them, in rounds,
for every batch size of the peer; of each round the seconds of the clock and of the processor are kept, the latter
since they do not grow where other programs run. Needs the extra `benchmark`.
"""

from __future__ import annotations

import argparse
import json
import operator
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import baseline
import contest

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
OURS = "leyden"
CLOSE, RELATIVE = 1e-4, 1e-5
"""How far log-probabilities may be apart, in nats and of their size: fp32 rounds otherwise in another batch. Where the
two were furthest apart on SmolLM2-135M, fp64 was 1e-5 from Leyden's and 9e-5 from lm-eval's."""
PACKAGES = ("leyden", "lm-eval", "torch", "transformers")
Scorer = Callable[[list[Any]], list[tuple[float, bool]]]


def requests(options: argparse.Namespace) -> tuple[Any, list[Any]]:
    """The task and its requests, as lm-eval makes them."""
    import tasks

    from leyden.models.benchmark.evaluate import Settings, prepare, seeded
    from leyden.models.benchmark.tasks import load

    seeded(1234)
    with tempfile.TemporaryDirectory() as folder:
        file = tasks.choice_task(Path(folder), "world", options.questions, options.language)
        (task,) = load([str(file)]).tasks.values()
        prepare(task, Settings(shots=options.shots))
        task.build_all_requests()
    return task, task.instances


def scorers(options: argparse.Namespace) -> dict[str, Scorer]:
    """Who scores, by name: ours, and the peer once for every batch size, over one and the same model."""
    import torch
    from lm_eval.models.huggingface import HFLM

    from leyden.models import CausalLM
    from leyden.models.benchmark.lm import PolicyLM

    dtype = options.dtype
    policy = CausalLM(options.model, dtype)
    policy.build()
    policy.to(options.device)
    peer = HFLM(options.model, device=options.device, dtype=dtype, batch_size=1)

    def with_batch(size: int) -> Scorer:
        def score(asked: list[Any]) -> list[tuple[float, bool]]:
            peer.batch_size_per_gpu = size
            return peer.loglikelihood(asked, disable_tqdm=True)

        return score

    def finished(score: Scorer) -> Scorer:
        def wait(asked: list[Any]) -> list[tuple[float, bool]]:
            found = score(asked)
            if options.device != "cpu":
                torch.cuda.synchronize()
            return found

        return wait

    ours = {f"{OURS}, {budget} tokens": PolicyLM(policy, budget).loglikelihood for budget in options.batch_tokens}
    theirs = {f"lm-eval, batch {size}": with_batch(size) for size in options.batches}
    return {name: finished(score) for name, score in (ours | theirs).items()}


def prove(task: Any, asked: list[Any], everyone: dict[str, Scorer]) -> dict[str, Any]:
    """Score all questions by the first of both sides, and compare."""
    import numpy as np

    mine = next(score for name, score in everyone.items() if name.startswith(OURS))(asked)
    theirs = [score for name, score in everyone.items() if not name.startswith(OURS)][-1](asked)
    apart = [abs(a[0] - b[0]) for a, b in zip(mine, theirs, strict=True)]
    by_question: dict[int, list[int]] = {}
    for number, one in enumerate(asked):
        by_question.setdefault(one.doc_id, []).append(number)
    right = [
        [
            int(np.argmax([found[i][0] for i in numbers])) == asked[numbers[0]].doc["answer"]
            for numbers in by_question.values()
        ]
        for found in (mine, theirs)
    ]
    rounded = [CLOSE + RELATIVE * abs(b[0]) for b in theirs]
    found: dict[str, Any] = {
        "questions": len(by_question),
        "requests": len(asked),
        "largest_difference": max(apart),
        "same_greedy": all(a[1] == b[1] for a, b in zip(mine, theirs, strict=True)),
        "accuracy": [sum(one) / len(one) for one in right],
    }
    print(
        f"{found['questions']} questions, {found['requests']} choices: log-probabilities differ by at most "
        f"{found['largest_difference']:.1e} nats; accuracy {found['accuracy'][0]:.4f} and {found['accuracy'][1]:.4f}",
        flush=True,
    )
    if any(map(operator.gt, apart, rounded)) or right[0] != right[1] or not found["same_greedy"]:
        sys.exit("the two do not compute the same")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--timed", type=int, default=100, help="questions of a round")
    parser.add_argument("--language", default="en")
    parser.add_argument("--shots", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--batch-tokens", type=int, nargs="+", default=[2048])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output")
    options = parser.parse_args()
    print(contest.machine(PACKAGES), flush=True)
    task, asked = requests(options)
    everyone = scorers(options)
    found: dict[str, Any] = {"proof": prove(task, asked, everyone), "rounds": {name: [] for name in everyone}}
    few = [one for one in asked if one.doc_id < options.timed]
    sizes = [score(few) for name, score in everyone.items() if not name.startswith(OURS)]
    found["peer_alone"] = max(abs(a[0] - b[0]) for a, b in zip(sizes[0], sizes[-1], strict=True))
    print(f"lm-eval's own batch sizes differ by at most {found['peer_alone']:.1e} nats", flush=True)
    for _ in range(options.rounds):
        for name, score in everyone.items():
            wall, processor = time.perf_counter(), time.process_time()
            score(few)
            found["rounds"][name].append([time.perf_counter() - wall, time.process_time() - processor])
    ours = min((n for n in everyone if n.startswith(OURS)), key=lambda n: sum(c for _, c in found["rounds"][n]))
    for name, rounds in found["rounds"].items():
        ratios = [
            [other / mine for other, mine in zip(a, b, strict=True)]
            for a, b in zip(rounds, found["rounds"][ours], strict=True)
        ]
        found.setdefault("times_as_long", {})[name] = {
            "wall": baseline.summary([one for one, _ in ratios]),
            "processor": baseline.summary([one for _, one in ratios]),
        }
        wall, processor = (contest.spread([one[i] for one in rounds]) for i in (0, 1))
        longer, worked = (contest.spread([one[i] for one in ratios]) for i in (0, 1))
        print(
            f"{name:24} {wall} s, {processor} s of processor; {longer} and {worked} times those of {ours}", flush=True
        )
    if options.output:
        Path(options.output).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
