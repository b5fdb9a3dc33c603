"""Answers that were cut at a length limit: nothing is trained to end where they were cut, whatever reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from prepared import write

from leyden.data.chat_template import ChatTemplate
from leyden.data.tokenizer import load_tokenizer
from leyden.datamodules.formats.formats import detect, parse

ROW = {"prompt": "2 + 3?", "responses": ["It is", "It is 5.", "Wel"], "scores": [0.1, 0.9, 0.5]}


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate(load_tokenizer("tiny"))


@pytest.mark.parametrize("kind", ["preference", "candidates", "unpaired", "instruction"])
def test_a_cut_answer_has_no_end(kind: str, template: ChatTemplate) -> None:
    """Each as it is encoded by itself, whole or cut, in the order of the scores."""
    finished = dict(zip(ROW["responses"], (False, True, False), strict=True))
    if kind == "instruction":
        row = {"prompt": ROW["prompt"], "response": "It is", "finished": False}
    else:
        row = ROW | {"finished": list(finished.values())}
    example = parse(row, detect([row], kind if kind != "candidates" else "preference"), kind)
    tree = template.encode(example)
    assert example.responses and "finished" not in example.not_read
    for turns, tokens in zip(example.responses, tree.responses, strict=True):
        text = turns[0]["content"]
        alone = parse({"prompt": ROW["prompt"], "response": text}, "prompt-response", "instruction")
        assert tokens == template.encode(alone, finished=finished[text]).responses[0], text
    plain = template.encode(parse(ROW, "scored", "preference")).responses
    assert all(len(tokens) > len(template.tokenizer("It is 5.").input_ids) for tokens in plain[:1])


@pytest.mark.parametrize("said", [[True, False], "no", 1, [1, 0, 1], False])
def test_a_column_that_says_something_else_is_named_and_not_read(said: Any, template: ChatTemplate) -> None:
    example = parse(ROW | {"finished": said}, "scored", "preference")
    assert "finished" in example.not_read
    assert template.encode(example).responses == template.encode(parse(ROW, "scored", "preference")).responses


def test_scores_of_cut_answers_keep_what_was_cut(leyden: Any, workplace: Path) -> None:
    """Labelled, scored by a reward model as `ModelReward` does, and labelled again from what that wrote."""
    from leyden.example import Sample
    from leyden.models import CausalLM, ModelReward
    from leyden.rewards import score

    policy = CausalLM("tiny")
    policy.build(("score",), dropout=False)
    policy.save(workplace / "reward")
    write(workplace / "rows.jsonl", [ROW | {"finished": [False, True, False]}])
    words = "predict --config reward_model --model.policy.path reward --data.path rows.jsonl --output scored.jsonl"
    code, _, err = leyden(*words.split(), "--trainer.accelerator", "cpu")
    assert code == 0, err
    (row,) = (json.loads(line) for line in (workplace / "scored.jsonl").read_text(encoding="utf-8").splitlines())
    assert row["responses"] == ROW["responses"] and row["finished"] == [False, True, False]
    samples = [
        Sample(row["prompt"], text, finished=ended)
        for text, ended in zip(row["responses"], row["finished"], strict=True)
    ]
    assert row["scores"] == pytest.approx(score(ModelReward("reward"), samples).tolist(), abs=1e-4)
    whole = score(ModelReward("reward"), [Sample(row["prompt"], ROW["responses"][0])]).tolist()
    assert abs(whole[0] - row["scores"][0]) > 1e-3
    code, _, err = leyden(
        "data", "label", "scored.jsonl", "again.jsonl", "--reward", "ModelReward", "--reward.path", "reward"
    )
    assert code == 0, err
    code, _, err = leyden(
        "data", "label", "scored.jsonl", "pair.jsonl", "--reward", "ModelReward", "--reward.path", "reward", "--pairs"
    )
    assert code == 0, err
    pair = json.loads((workplace / "pair.jsonl").read_text(encoding="utf-8"))
    example = parse(pair, detect([pair], "preference"), "preference")
    for turns in example.responses:
        assert turns[0].get("finished", True) is (turns[0]["content"] == "It is 5.")
    (again,) = (json.loads(line) for line in (workplace / "again.jsonl").read_text(encoding="utf-8").splitlines())
    assert dict(zip(again["responses"], again["finished"], strict=True)) == dict(
        zip(ROW["responses"], (False, True, False), strict=True)
    )
