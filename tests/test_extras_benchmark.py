"""`leyden benchmark` beside lm-eval's own Hugging Face model: the same numbers, from the same requests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import tiny_config
from small import save_llama
from tasks import answer_task, choice_task, text_task

pytest.importorskip("lm_eval", reason="needs lm-eval: make test-extras")

from lm_eval import evaluator  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from leyden.cli.launcher import main  # noqa: E402
from leyden.data.tokenizer import load_tokenizer  # noqa: E402
from leyden.errors import UserError  # noqa: E402
from leyden.models import CausalLM  # noqa: E402
from leyden.models.benchmark.evaluate import Settings, prepare, seeded  # noqa: E402
from leyden.models.benchmark.lm import PolicyLM  # noqa: E402
from leyden.models.benchmark.tasks import load  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of lm-eval's and its libraries' making
CLOSE = 1e-4


def save(folder: Path, kind: str, positions: int = 512) -> str:
    """A small model of random weights with the embedded tokenizer."""
    if kind == "llama":
        save_llama(folder, 0.1)
        return str(folder)
    tokenizer: Any = load_tokenizer("tiny")
    torch.manual_seed(0)
    config = tiny_config("llama" if kind == "short" else kind)
    config.vocab_size, config.eos_token_id = len(tokenizer), tokenizer.eos_token_id
    config.bos_token_id, config.pad_token_id = None, tokenizer.pad_token_id
    config.max_position_embeddings = 96 if kind == "short" else positions
    if kind == "gemma2":
        config.attn_logit_softcapping, config.final_logit_softcapping = 5.0, 3.0
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Local tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    choice_task(folder, "world", 10)
    choice_task(folder, "shots", 6, "ko", num_fewshot=3)
    choice_task(folder, "letters", 8, doc_to_text="{{question}}\n{% for one in choices %}{{'ABCD'[loop.index0]}}. "
                "{{one}}\n{% endfor %}Answer:", doc_to_choice=["A", "B", "C", "D"])  # fmt: skip
    choice_task(folder, "mutual", 4, metric_list=[{"metric": "acc_mutual_info", "aggregation": "mean",
                                                   "higher_is_better": True}])  # fmt: skip
    text_task(folder, count=4)
    answer_task(folder, count=6)
    return folder


def responses(lm: Any, folder: Path, name: str, **how: Any) -> dict[str, Any]:
    """Everything that a model said to a task's questions, and the measures."""
    seeded(1234)
    task = load([str(folder / f"{name}.yaml")]).tasks[name]
    prepare(task, Settings())
    found = evaluator.evaluate(lm=lm, task_dict={"tasks": {name: task}}, bootstrap_iters=0, **how)
    samples = found["samples"][name]
    numbers = {key: value for key, value in found["results"][name].items() if "," in key and "stderr" not in key}
    return {"said": [one["resps"] for one in samples], "asked": [one["arguments"] for one in samples], "results": numbers}


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours["asked"] == theirs["asked"]
    for mine, other in zip(ours["said"], theirs["said"], strict=True):
        for (one,), (two,) in zip(mine, other, strict=True):
            if isinstance(one, tuple):
                assert one[0] == pytest.approx(two[0], abs=CLOSE)
                assert one[1] == two[1]
            elif isinstance(one, float):
                assert one == pytest.approx(two, rel=1e-6, abs=CLOSE)
            else:
                assert one == two
    for key, value in theirs["results"].items():
        assert ours["results"][key] == pytest.approx(value, abs=CLOSE), key


KINDS = ("llama", "gpt2", "gemma2", "short", "rows")


@pytest.fixture(scope="module", params=KINDS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PolicyLM, HFLM]:
    path = save(tmp_path_factory.mktemp("model"), "llama" if request.param == "rows" else request.param)
    policy = CausalLM(path, attention="rows" if request.param == "rows" else "auto")
    policy.build()
    more = {"attn_implementation": "eager"} if request.param == "gemma2" else {}  # others leave the cap out
    theirs = HFLM(pretrained=path, device="cpu", dtype="float32", batch_size=4, **more)
    return PolicyLM(policy, batch_tokens=256), theirs


@pytest.mark.parametrize("name", ["world", "shots", "letters", "mutual", "texts", "sums"])
def test_numbers_are_those_of_lm_eval(both: tuple[PolicyLM, HFLM], folder: Path, name: str) -> None:
    ours, theirs = both
    assert ours.max_length == theirs.max_length
    same(responses(ours, folder, name), responses(theirs, folder, name))


@pytest.mark.parametrize("multiturn", [True, False])
def test_a_chat_template_is_applied_as_lm_eval_does(both: Any, folder: Path, multiturn: bool) -> None:
    ours, theirs = both
    how = dict(apply_chat_template=True, fewshot_as_multiturn=multiturn, system_instruction="Be brief.")
    for name in ("shots", "sums"):
        same(responses(ours, folder, name, **how), responses(theirs, folder, name, **how))
    assert ours.tokenizer_name == theirs.tokenizer_name
    assert ours.chat_template(True) == theirs.chat_template(True)


@pytest.mark.parametrize("bos", [None, True, False])
def test_bos_stands_where_lm_eval_puts_it(tmp_path: Path, bos: bool | None) -> None:
    path = save(tmp_path, "llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(5)
    tokenizer.save_pretrained(path)
    policy = CausalLM(path)
    policy.build()
    ours, theirs = PolicyLM(policy, add_bos_token=bos), HFLM(path, device="cpu", dtype="float32", add_bos_token=bos)
    begun = f"{tokenizer.bos_token}Good day"
    pairs = [("Good day", " friend"), ("Good day  ", "friend"), (begun, " friend"), ("", " friend"), ("\n", "x")]
    asked = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    for mine, other in zip(ours.loglikelihood(asked), theirs.loglikelihood(asked), strict=True):
        assert mine == (pytest.approx(other[0], abs=CLOSE), other[1])
    for text in ("Good day", begun, " x ", ""):
        for special in (None, True, False):
            assert ours.tok_encode(text, special) == theirs.tok_encode(text, special)
    answers = [Instance("generate_until", {}, (text, {"until": [], "max_gen_toks": 6}), 0) for text in ("Hi", begun)]
    assert ours.generate_until(answers) == [theirs.generate_until([one])[0] for one in answers]


def test_a_choice_that_is_most_probable_is_greedy(tmp_path: Path) -> None:
    policy = CausalLM("tiny")
    policy.build()
    ours, theirs = PolicyLM(policy), HFLM(policy.tokenizer.name_or_path, device="cpu", dtype="float32")
    (text,) = ours.generate_until([Instance("generate_until", {}, ("한국의 수도는", {"until": [], "max_gen_toks": 3}), 0)])
    asked = [Instance("loglikelihood", {}, ("한국의 수도는", end), 0) for end in (text, "x")]
    assert [greedy for _, greedy in ours.loglikelihood(asked)] == [True, False]
    assert [greedy for _, greedy in theirs.loglikelihood(asked)] == [True, False]
