"""What is asked of rewards and what is made of their answers: checks, functions of the user, sums, the command line."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from leyden.cli import class_names
from leyden.errors import UserError
from leyden.example import Sample
from leyden.rewards import gold
from leyden.rewards.function import Ensemble, Function, Gold, Reward, WeightedSum, name_of, score


def samples(*responses: str) -> list[Sample]:
    asked: Any = [{"role": "user", "content": "안녕?"}]
    return [Sample(asked, text, source=f"rows.jsonl:{line}") for line, text in enumerate(responses, start=1)]


THREE = samples("네", "아니요, 그렇지 않습니다", "")


class Constant(nn.Module, Reward):
    """A reward with a weight."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, samples: Sequence[Sample]) -> Tensor:
        return self.value.expand(len(samples))


# -- score ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "found",
    [
        torch.tensor([1.0, 2.0, 0.0]),
        torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True),
        torch.tensor([1, 2, 0]),
        torch.tensor([1.0, 2.0, 0.0], dtype=torch.bfloat16),
        [1.0, 2, False],
        (1.0, 2.0, 0.0),
        [torch.tensor(1.0), np.float32(2), np.int64(0)],
        np.array([1.0, 2.0, 0.0]),
        range(3),
    ],
)
def test_numbers_of_any_kind_become_float32(found: Any) -> None:
    scores = score(lambda given: found, THREE)
    assert scores.dtype == torch.float32 and not scores.requires_grad
    assert scores.tolist() == ([0, 1, 2] if isinstance(found, range) else [1, 2, 0])


def test_generators_and_no_samples() -> None:
    assert score(lambda given: (float(len(sample.response)) for sample in given), THREE).tolist() == [1, 13, 0]
    assert score(lambda given: 1 / 0, []).shape == (0,)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([1.0, 2.0], "gave 2 scores for 3 samples; return one number for each"),
        (torch.zeros(2), r"gave shape \[2\] for 3 samples"),
        (torch.zeros(3, 1), r"gave shape \[3, 1\] for 3 samples"),
        (np.zeros((3, 2)), r"gave shape \[3, 2\] for 3 samples"),
        (0.5, "gave float for 3 samples"),
        (None, "gave NoneType for 3 samples"),
        ("abc", "gave str for 3 samples"),
        ({"a": 1.0, "b": 2.0, "c": 3.0}, "gave dict for 3 samples"),
        ({1.0, 2.0, 3.0}, "gave set for 3 samples"),
        (torch.zeros(3, dtype=torch.complex64), "complex"),
        (np.array(["a", "b", "c"]), "gave ndarray for 3 samples"),
        ([1.0, None, 2.0], r"^rows.jsonl:2 \(response '아니요, 그렇지 않습니다'\): mine gave None, not a number"),
        ([1.0, 2.0, "3"], r"^rows.jsonl:3 \(response ''\): mine gave '3', not a number"),
        ([1.0, [2.0], 3.0], r"^rows.jsonl:2 .*gave \[2.0\], not a number"),
        ([10**400, 1, 2], r"^rows.jsonl:1 "),
        ([1.0, math.nan, math.inf], r"^rows.jsonl:2 \(response '아니요, 그렇지 않습니다'\): mine gave nan"),
        (torch.tensor([1.0, 2.0, -math.inf]), r"^rows.jsonl:3 .*mine gave -inf"),
        (torch.tensor([1e300, 2.0, 3.0], dtype=torch.float64), r"^rows.jsonl:1 .*mine gave inf"),
    ],
)
def test_anything_else_is_an_error_that_says_what(found: Any, message: str) -> None:
    def mine(given: Sequence[Sample]) -> Any:
        return found

    with pytest.raises(UserError, match=message):
        score(mine, THREE)


def test_a_long_response_is_shortened_in_messages() -> None:
    with pytest.raises(UserError) as error:
        score(lambda given: [math.nan], samples("가\n나" * 200))
    assert len(str(error.value)) < 200 and "\n" not in str(error.value)


def test_an_error_of_a_reward_names_the_row_and_the_line_and_keeps_its_cause() -> None:
    def careless(given: Sequence[Sample]) -> list[float]:
        return [1 / len(sample.response) for sample in given]

    line = careless.__code__.co_firstlineno + 1
    with pytest.raises(UserError, match=r"^rows.jsonl:3 \(response ''\): careless failed with ZeroDiv") as error:
        score(careless, THREE)
    assert f"at test_rewards.py:{line}" in str(error.value) and "mend the reward or the row" in str(error.value)
    assert isinstance(error.value.__cause__, ZeroDivisionError)
    with pytest.raises(UserError, match=r"^rows.jsonl:3 .*ZeroDivisionError"):  # generators fail when they are read
        score(lambda given: (1 / len(sample.response) for sample in given), THREE)


def test_an_error_that_no_row_has_alone_names_all() -> None:
    def few(given: Sequence[Sample]) -> list[float]:
        if len(given) > 2:
            raise RuntimeError
        return [0.0] * len(given)

    with pytest.raises(UserError, match="^3 samples from rows.jsonl:1 to rows.jsonl:3: few failed with RuntimeError"):
        score(few, THREE)


def test_errors_for_the_user_and_interrupts_pass_as_they_are() -> None:
    def stops(error: BaseException) -> Callable[..., Any]:
        def reward(given: Any) -> Any:
            raise error

        return reward

    with pytest.raises(UserError, match="^as it is$"):
        score(stops(UserError("as it is")), THREE)
    with pytest.raises(KeyboardInterrupt):
        score(stops(KeyboardInterrupt()), THREE)


def test_what_counts_as_a_reward() -> None:
    class Mine:
        def __call__(self, given: Sequence[Sample]) -> list[float]:
            return [0.0] * len(given)

    class Silent:
        pass

    assert issubclass(Mine, Reward) and isinstance(Mine(), Reward) and isinstance(lambda given: given, Reward)
    assert isinstance(Constant(1.0), Reward) and issubclass(Gold, Reward)
    assert not issubclass(Silent, Reward) and not isinstance("a.b", Reward) and not isinstance(Mine, Reward)
    assert not isinstance(Gold, Reward)  # a class is a reward only once it is made
    assert not issubclass(Mine, Gold)
    assert Gold is gold.Gold and name_of(Gold()) == "Gold" and name_of(score) == "score"
    with pytest.raises(TypeError, match="abstract"):
        Reward()  # type: ignore[abstract]


# -- functions of the user --------------------------------------------------------------------------------------------

MODULE = """
import math
LIMIT = 5

def brevity(samples):
    return [-len(sample.response) for sample in samples]

def broken(samples):
    return [math.sqrt(-len(sample.response)) for sample in samples]

class Scorer:
    def __call__(self, samples):
        return [1.0] * len(samples)
"""


@pytest.fixture
def module(workplace: Path, request: pytest.FixtureRequest) -> str:
    """A module of its own for each test, since Python imports one only once."""
    name = f"rewards_of_{request.node.originalname}"
    (workplace / f"{name}.py").write_text(MODULE, encoding="utf-8")
    return name


def test_a_function_is_found_in_the_current_folder(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(Path.cwd())])
    reward = Function(f"{module}.brevity")
    assert reward(THREE).tolist() == [-1, -13, 0] and name_of(reward) == f"{module}.brevity"
    assert score(reward, THREE).dtype == torch.float32


def test_an_error_in_a_function_names_row_and_line(module: str) -> None:
    with pytest.raises(UserError, match=rf"^rows.jsonl:1 .*broken failed with ValueError.* at {module}.py:9; mend"):
        score(Function(f"{module}.broken"), THREE)


def test_functions_that_cannot_be_had(module: str, workplace: Path) -> None:
    (workplace / "half.py").write_text("import not_there_at_all\n")
    (workplace / "wrong.py").write_text("def f(:\n")
    cases = {
        "brevity": r"give MODULE.NAME, such as my_rewards.brevity",
        f"{module}x.brevity": rf"no module '{module}x' in this folder; did you mean '{module}'",
        f"{module}.brevty": rf"{module} has no 'brevty'; did you mean 'brevity'",
        f"{module}.Scorer": rf"Scorer is a class; give it as a reward itself, such as --model.reward {module}.Scorer",
        f"{module}.LIMIT": "LIMIT is no function but int",
        "half.f": r"half cannot be imported \(ModuleNotFoundError: No module named 'not_there_at_all'\)",
        "wrong.f": r"wrong cannot be imported \(SyntaxError: ",
    }
    for path, message in cases.items():
        with pytest.raises(UserError, match=message):
            Function(path)


# -- sums -------------------------------------------------------------------------------------------------------------


def lengths(given: Sequence[Sample]) -> list[int]:
    return [len(sample.response) for sample in given]


def test_a_weighted_sum_adds_up_and_keeps_its_parts() -> None:
    whole = WeightedSum([Constant(2.0), lengths, Constant(3.0)], [1.0, -0.5, 10])  # type: ignore[list-item]
    assert score(whole, THREE).tolist() == [31.5, 25.5, 32.0]
    assert {name: part.tolist() for name, part in whole.terms.items()} == {
        "Constant-1": [2, 2, 2],
        "lengths": [1, 13, 0],
        "Constant-2": [3, 3, 3],
    }
    assert score(WeightedSum([whole, Constant(1.0)]), THREE).tolist() == [32.5, 26.5, 33.0]
    assert not whole.terms["Constant-1"].requires_grad and dict(Gold().terms) == {}
    assert len(list(whole.parameters())) == 2
    assert all(p.dtype == torch.float64 for p in whole.to(torch.float64).parameters())  # as for a device


def test_weights_and_rewards_must_fit() -> None:
    with pytest.raises(UserError, match="2 rewards but 1 weights; give one weight for each"):
        WeightedSum([Constant(1.0), Constant(2.0)], [1.0])
    with pytest.raises(UserError, match="0 rewards"):
        WeightedSum([])
    with pytest.raises(UserError, match="finite"):
        WeightedSum([Constant(1.0)], [math.nan])
    with pytest.raises(UserError, match="rows.jsonl:1 .*Constant gave nan"):
        score(WeightedSum([Constant(math.nan)]), THREE)


# -- ensembles --------------------------------------------------------------------------------------------------------


def fixed(name: str, *values: float) -> Any:
    """A reward that gives these scores."""

    def reward(given: Sequence[Sample]) -> list[float]:
        return list(values[: len(given)])

    reward.__name__ = name
    return reward


A, B, C = fixed("a", 1.0, 2.0, 0.0), fixed("b", 3.0, 2.0, 0.0), fixed("c", 5.0, 2.0, -3.0)
APART = [math.sqrt(8 / 3), 0.0, math.sqrt(2)]
"""Deviations of (1, 3, 5), (2, 2, 2) and (0, 0, -3), by hand"""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"deviations": 0.0}, [3.0, 2.0, -1.0]),
        ({}, [3 - APART[0], 2.0, -1 - APART[2]]),
        ({"deviations": 2.5}, [3 - 2.5 * APART[0], 2.0, -1 - 2.5 * APART[2]]),
        ({"combine": "worst"}, [1.0, 2.0, -3.0]),
    ],
)
def test_an_ensemble_by_hand(options: dict[str, Any], expected: list[float]) -> None:
    whole = Ensemble([A, B, C], **options)
    assert score(whole, THREE).tolist() == pytest.approx(expected, abs=1e-6)
    assert {name: part.tolist() for name, part in whole.terms.items()} == {
        "a": [1, 2, 0],
        "b": [3, 2, 0],
        "c": [5, 2, -3],
        "spread": pytest.approx(APART, abs=1e-6),
    }


def test_members_on_scales_of_their_own() -> None:
    """A member that is 10 r + 7 agrees with r once its mean and scale are given, and not before."""
    far = fixed("far", 17.0, 27.0, 7.0)
    plain, scaled = Ensemble([A, far]), Ensemble([A, far], means=[0.0, 7.0], scales=[1.0, 10.0])
    assert score(scaled, THREE).tolist() == pytest.approx([1, 2, 0], abs=1e-6)
    assert scaled.terms["spread"].abs().max() < 1e-6 and scaled.terms["far"].tolist() == [1, 2, 0]
    score(plain, THREE)
    assert plain.terms["spread"].min() > 3


def test_ensembles_nest_and_keep_the_terms_of_their_members() -> None:
    inner = WeightedSum([A, B], [1.0, 0.0])
    whole = Ensemble([inner, Constant(1.0), Constant(1.0), fixed("spread", 1.0, 1.0, 1.0)], combine="worst")
    assert score(whole, THREE).tolist() == [1, 1, 0]
    names = ["WeightedSum", "WeightedSum.a", "WeightedSum.b", "Constant-1", "Constant-2", "spread-1", "spread"]
    assert list(whole.terms) == names and len(list(whole.parameters())) == 2
    outer = WeightedSum([whole, A], [1.0, 2.0])
    assert score(outer, THREE).tolist() == [3, 5, 0] and "Ensemble.spread" in outer.terms


def test_a_member_that_gets_worse_costs_more_where_the_others_stay() -> None:
    """What the mean loses is 1/M of it; with deviations the answer loses more, the more its members are apart."""
    values = []
    for apart in (0.0, 1.0, 2.0, 4.0):
        members = [fixed("a", 1.0), fixed("b", 1.0 - apart)]
        values.append([score(Ensemble(members, deviations=k), THREE[:1]).item() for k in (0.0, 1.0)])
    assert [mean - careful for mean, careful in values] == pytest.approx([0, 0.5, 1, 2])


@pytest.mark.parametrize(
    ("rewards", "options", "message"),
    [
        ([], {}, "0 rewards have no spread; give two or more"),
        ([A], {}, "1 rewards have no spread"),
        ([A, B], {"combine": "worst", "deviations": 1.0}, "deviations are those of combine mean; leave them out"),
        ([A, B], {"deviations": -1.0}, "deviations -1; give 0 or more"),
        ([A, B], {"deviations": math.nan}, "deviations nan; give 0 or more"),
        ([A, B], {"means": [1.0]}, "2 rewards but 1 means; give one for each"),
        ([A, B], {"scales": [1.0, 2.0, 3.0]}, "2 rewards but 3 scales; give one for each"),
        ([A, B], {"scales": [1.0, 0.0]}, "scales .* give numbers above 0"),
        ([A, B], {"means": [1.0, math.inf]}, "means .* give finite numbers"),
    ],
)
def test_ensembles_that_cannot_be(rewards: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^Ensemble: {message}"):
        Ensemble(rewards, **options)


# -- the command line -------------------------------------------------------------------------------------------------

ALGORITHM = """
from leyden.example import Sample
from leyden.policy.policy import Policy
from leyden.rewards.reward import Reward
from leyden.rewards.function import score
from toy import Toy

class Learner(Toy):
    def __init__(self, *args, reward: Reward, value_policy: Policy | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.reward = (reward,)

    def on_fit_start(self):
        print("scores", score(self.reward[0], [Sample([], "four", source="rows.jsonl:1")]).tolist())
"""
OWN = """
LIMIT = 5

class Own:  # no base class: whatever can be called will do
    def __init__(self, factor: float = 1.0):
        self.factor = factor

    def __call__(self, samples):
        return [self.factor * len(sample.response) for sample in samples]

def brevity(samples):
    return [-len(sample.response) for sample in samples]
"""
BASE = """\
model:
  class_path: learner.Learner
  init_args:
    policy: {class_path: toy.Bigrams}
data:
  class_path: toy.ToyData
  init_args: {path: rows.jsonl}
"""


@pytest.fixture
def learner(leyden: Any, workplace: Path) -> Any:
    """Run `leyden fit` with an algorithm that takes a reward."""
    (workplace / "learner.py").write_text(ALGORITHM)
    (workplace / "my_rewards.py").write_text(OWN)
    (workplace / "base.yaml").write_text(BASE)
    return lambda *args: leyden("fit", "--config", "base.yaml", *args)


def shown(learner: Any, *args: str) -> Any:
    """The reward in the resolved configuration."""
    code, out, err = learner(*args, "--print_config")
    assert code == 0, err
    return yaml.safe_load(out)["model"]["init_args"]["reward"]


SPECS: dict[str, tuple[str, dict[str, Any]]] = {
    # what is typed: the class it becomes, and some of its arguments
    "--model.reward Gold": ("leyden.rewards.Gold", {"polite": 0.5}),
    "--model.reward Gold --model.reward.polite 0.25": ("leyden.rewards.Gold", {"polite": 0.25}),
    "--model.reward.polite 0.25 --model.reward Gold": ("leyden.rewards.Gold", {"polite": 0.25}),
    "--model.reward leyden.rewards.function.Gold": ("leyden.rewards.function.Gold", {"brief": 0.5}),
    "--model.reward leyden.rewards.Function --model.reward.path my_rewards.brevity": (
        "leyden.rewards.Function",
        {"path": "my_rewards.brevity"},
    ),
    "--model.reward ModelReward --model.reward.path FOLDER": (
        "leyden.models.ModelReward",
        {"path": "FOLDER", "batch_tokens": 16384},
    ),
    "--model.reward HTTPJudge --model.reward.url http://h:1 --model.reward.model m --model.reward.scale [1,5]": (
        "leyden.rewards.HTTPJudge",
        {"model": "m", "scale": [1.0, 5.0], "key_env": "OPENAI_API_KEY"},
    ),
    "--model.reward my_rewards.Own --model.reward.factor 2": ("my_rewards.Own", {"factor": 2.0}),
}


@pytest.mark.parametrize("typed", SPECS)
def test_a_reward_by_name_or_class_path(typed: str, learner: Any) -> None:
    path, arguments = SPECS[typed]
    found = shown(learner, *typed.split())
    assert found["class_path"] == path
    assert {name: found["init_args"][name] for name in arguments} == arguments


def test_rewards_nest_in_a_file_and_the_resolved_file_says_the_same(learner: Any, workplace: Path) -> None:
    part = """\
model:
  init_args:
    reward:
      class_path: WeightedSum
      init_args:
        rewards:
        - class_path: Gold
          init_args: {polite: 0.0}
        - class_path: Function
          init_args: {path: my_rewards.brevity}
        - my_rewards.Own
        weights: [1.0, 0.5, 1]
"""
    (workplace / "part.yaml").write_text(part)
    found = shown(learner, "--config", "part.yaml")
    kinds = [inner["class_path"] for inner in found["init_args"]["rewards"]]
    assert found["class_path"] == "leyden.rewards.WeightedSum"
    assert kinds == ["leyden.rewards.Gold", "leyden.rewards.Function", "my_rewards.Own"]
    (workplace / "resolved.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"reward": found}}}))
    assert shown(learner, "--config", "resolved.yaml") == found


def test_an_ensemble_in_a_file_logs_its_members_and_its_spread(leyden: Any, workplace: Path) -> None:
    (workplace / "my_rewards.py").write_text(OWN)
    members = "[{class_path: my_rewards.Own, init_args: {factor: 2}}, my_rewards.Own]"
    arguments = f"{{rewards: {members}, deviations: 0.5}}"
    reward = f"model: {{init_args: {{reward: {{class_path: Ensemble, init_args: {arguments}}}}}}}"
    (workplace / "reward.yaml").write_text(reward)
    (workplace / "prompts.jsonl").write_text("".join(f'{{"prompt": "{n} + 1?"}}\n' for n in range(8)))
    words = "--data.path prompts.jsonl --data.val_fraction 0 --data.batch_size 2 --trainer.max_steps 1"
    more = "--model.samples 2 --model.minibatches 1 --model.sampling.max_new_tokens 8 --trainer.accelerator cpu"
    code, _, err = leyden(
        "fit", "--config", "grpo", "--config", "reward.yaml", *f"{words} {more}".split(),
        "--trainer.default_root_dir", "run",
    )  # fmt: skip
    assert code == 0, err
    rows = [json.loads(line) for line in (workplace / "run" / "rollouts.jsonl").read_text().splitlines()]
    for row in rows:
        lengths = [len(text) for text in row["responses"]]
        assert row["terms"]["Own-1"] == [2 * n for n in lengths] and row["terms"]["Own-2"] == lengths
        assert row["terms"]["spread"] == [n / 2 for n in lengths]
        assert row["scores"] == [1.5 * n - 0.25 * n for n in lengths]
    with (workplace / "run" / "metrics.csv").open(encoding="utf-8") as stream:
        logged = [row["rollout/reward_spread"] for row in csv.DictReader(stream) if row.get("rollout/reward_spread")]
    spreads = [value for row in rows for value in row["terms"]["spread"]]
    assert float(logged[0]) == pytest.approx(sum(spreads) / len(spreads), rel=1e-5)


@pytest.mark.parametrize(
    ("typed", "scores"),
    [
        ("my_rewards.Own --model.reward.factor 2", "[8.0]"),
        ("Function --model.reward.path my_rewards.brevity", "[-4.0]"),
        ("my_rewards.brevity", "[-4.0]"),
    ],
)
def test_rewards_of_the_user_are_made_and_run(typed: str, scores: str, learner: Any, workplace: Path) -> None:
    code, out, err = learner("--trainer.max_steps", "1", "--model.reward", *typed.split())
    assert code == 0, err
    assert f"scores {scores}" in out
    (config,) = workplace.glob("runs/*/config.yaml")
    again = learner("--config", str(config), "--trainer.default_root_dir", "runs/again")
    assert again[0] == 0 and f"scores {scores}" in again[1], again[2]


def test_a_value_policy_is_a_policy(learner: Any) -> None:
    code, out, err = learner("--model.reward", "Gold", "--model.value_policy.path", "tiny", "--print_config")
    assert code == 0, err
    value = yaml.safe_load(out)["model"]["init_args"]["value_policy"]
    assert value["class_path"] == "leyden.models.CausalLM" and value["init_args"]["path"] == "tiny"


@pytest.mark.parametrize(
    ("typed", "parts"),
    [
        ("--model.reward Gld", ["--model.reward", "no Reward is called 'Gld'", "did you mean 'Gold'"]),
        ("--model.reward RewardModel", ["did you mean 'ModelReward'"]),
        ("--model.reward Gold --model.reward.polit 1", ["Gold has no key 'polit'", "did you mean 'polite'"]),
        ("--model.reward my_rewards.Onw", ["my_rewards.py defines no class 'Onw'", "did you mean 'Own'"]),
        ("--model.reward Function", ["path", "missing"]),
        ("--model.reward Function --model.reward.path my_rewards.brevty", ["did you mean 'brevity'"]),
        ("--model.reward Function --model.reward.path bad.f", ["bad cannot be imported", "ZeroDivisionError"]),
        ("--model.reward HTTPJudge --model.reward.url here --model.reward.model m", ["url here: give the address"]),
        ("--model.reward toy.Rows --model.reward.x 1", ["Rows has no key 'x'"]),
        ("--model.reward toy.Rows", ["toy.Rows"]),
        ("--model.reward my_rewards.LIMIT", ["my_rewards.LIMIT is no class, but int"]),
    ],
)
def test_a_wrong_reward_is_one_line(typed: str, parts: list[str], learner: Any, workplace: Path) -> None:
    (workplace / "bad.py").write_text("1 / 0\n")
    code, out, err = learner(*typed.split())
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1, err
    assert [part for part in parts if part not in err] == [], err


def test_the_names_of_rewards() -> None:
    known = class_names.of_kind("model.reward")
    assert {"Classifier", "Ensemble", "Gold", "Function", "WeightedSum", "HTTPJudge", "ModelReward"} <= set(known)
    assert not {"Reward", "RewardModel", "Combined"} & set(known)
