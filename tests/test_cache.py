"""The cache of tokenised rows: whatever a tree depends on makes another entry, and nothing else does."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prepared import prepared, write

from leyden.data.tokenizer import load_tokenizer
from leyden.datamodules import InstructionData, PreferenceData, PromptData
from leyden.datamodules.storage.cache_key import own_code, tokenizer_facts
from leyden.errors import UserError

ROWS = [{"prompt": f"{i}는?", "response": f"{i}입니다.", "label": i % 2 == 0} for i in range(6)]
OWN = """
from leyden.datamodules import InstructionData
from {base} import Base
class Labelled(Base):
    def __init__(self, path, good=1.0, **options):
        super().__init__(path, **options)
        self._good = good
    def encode(self, example):
        import own_helper
        (tree,) = super().encode(example)
        tree.scores = [own_helper.score(example.row["label"]) * self._good]
        return [tree]
"""
BASE = "from leyden.datamodules import InstructionData\nclass Base(InstructionData):\n    about = 'nothing'\n"
HELPER = "def score(label):\n    return float(label)\n"


def scores(data: Any, tmp_path: Path) -> list[Any]:
    trees = prepared(data, tmp_path).train_trees
    return [trees[i].scores for i in range(len(trees))]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes modules of a user's own and gives the class `Labelled` of them as a new process would see it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    names = {"own_data": OWN.format(base="own_base"), "own_base": BASE, "own_helper": HELPER}

    def load(**changed: str) -> Any:
        for name, text in (names | changed).items():
            (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
        try:
            return importlib.import_module("own_data").Labelled
        finally:
            sys.dont_write_bytecode = before

    yield load
    for name in names:
        sys.modules.pop(name, None)


def test_a_class_of_ones_own_never_reads_the_rows_of_its_base(tmp_path: Path, own: Any) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    assert scores(InstructionData(path, val_fraction=0), tmp_path) == [None] * 3, "bad answers are no instructions"
    assert scores(own()(path, val_fraction=0), tmp_path) == [[1.0], [0.0]] * 3
    assert scores(own()(path, val_fraction=0, good=3.0), tmp_path) == [[3.0], [0.0]] * 3, "an option kept privately"
    changed = own(own_helper=HELPER.replace("float", "2.0 * "))
    assert scores(changed(path, val_fraction=0), tmp_path) == [[2.0], [0.0]] * 3, "a module that the class imports"


def test_code_counts_whole_and_with_its_bases(own: Any) -> None:
    codes = [own_code([own()]), own_code([own()])]
    assert codes[0] == codes[1] and {"own_data", "own_base", "own_helper"} <= set(codes[0])
    for module, text in (("own_base", BASE + "limit = 3\n"), ("own_data", OWN.format(base="own_base") + "# more\n")):
        assert own_code([own(**{module: text})]) != codes[0]
    made = [type("Data", (InstructionData,), {"encode": lambda self, example, n=n: [n]}) for n in (1, 2)]
    here = [own_code([kind]) for kind in made]
    assert list(here[0]) == list(here[1]), "classes of one module that has a file are told apart by its text"


@pytest.mark.parametrize("value", [2, 3])
def test_a_class_without_a_file_is_told_by_what_it_does(value: int) -> None:
    def made(number: int) -> type:
        space: dict[str, Any] = {"__name__": "notebook_cell", "InstructionData": InstructionData}
        exec(f"class Own(InstructionData):\n    def encode(self, example):\n        return [{number}]\n", space)
        return space["Own"]  # type: ignore[no-any-return]

    assert own_code([made(1)]) == own_code([made(1)]) != own_code([made(value)])


def test_options_without_effect_share_an_entry(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    for options in ({}, {"batch_size": 2, "seed": 5, "val_fraction": 0.5}, {"tokenizer": "tiny", "max_tokens": 999}):
        prepared(InstructionData(path, **options), tmp_path)
    assert len(list(Path(os.environ["LEYDEN_CACHE"]).glob("*.arrow"))) == 1


def test_a_tokenizer_counts_with_its_special_tokens() -> None:
    plain, other = load_tokenizer("tiny"), load_tokenizer("tiny")
    assert tokenizer_facts(plain) == tokenizer_facts(other)
    other.unk_token = plain.eos_token  # a template may write it, though no token id is another
    assert tokenizer_facts(other) != tokenizer_facts(plain)


# -- whose tokenizer ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def others() -> Any:
    """A policy whose tokenizer is not the embedded one."""
    tokenizer = load_tokenizer("tiny")
    tokenizer.add_tokens(["수도"])
    return SimpleNamespace(path="other", tokenizer=tokenizer)


@pytest.mark.parametrize("kind", [InstructionData, PreferenceData, PromptData])
@pytest.mark.parametrize("stage", ["fit", "predict"])
def test_data_without_a_tokenizer_follow_the_policy(kind: Any, stage: str, others: Any, tmp_path: Path) -> None:
    row = {"prompt": "수도는?", "response": "서울", "chosen": "서울", "rejected": "부산"}
    sampling = SimpleNamespace(max_new_tokens=4)
    module = SimpleNamespace(experience=lambda loader: loader, predicts="answers", policy=others, sampling=sampling)
    path = write(tmp_path / "a.jsonl", [row] * 2 + [row | {"prompt": "수도?"}] * 2)
    data = prepared(kind(path, val_fraction=0), tmp_path, stage, lightning_module=module)
    assert data.template.tokenizer is others.tokenizer
    with pytest.raises(UserError, match="--data.tokenizer tiny: its token ids are not those of the policy, other"):
        prepared(kind(path, tokenizer="tiny"), tmp_path, stage, lightning_module=module).predict_dataloader()
