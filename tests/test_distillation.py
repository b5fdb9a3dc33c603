"""Distillation: it reaches its teacher on samples, on given answers and with another prompt; what it refuses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import enumerable
import pytest
import torch
from enumerable import LENGTH, START, WORDS, Prompts, Table
from peft import LoraConfig
from small import fit, saved, small, weights_of
from small import teacher as wider
from test_on_policy import SHORT, Questions, evens
from torch import Tensor

from leyden.algorithm.schedules import WarmupCosine
from leyden.algos import Distillation
from leyden.batch import Totals, Trajectory, Tree, pack
from leyden.data import Prompt, PromptLoader
from leyden.divergences import Divergence, ForwardKL, JensenShannon, ReverseKL, SampledReverseKL
from leyden.errors import UserError
from leyden.example import Example, Message
from leyden.losses import score_function
from leyden.models import CausalLM
from leyden.models.divergence import HeadPredictions
from leyden.policy.policy import Sampling, predictions_of

WHOLE = Sampling(max_new_tokens=LENGTH)
KINDS: list[Divergence] = [ReverseKL(), ForwardKL(), JensenShannon(), SampledReverseKL()]


def algorithm(teacher: Table | None, rate: float = 0.05, **options: Any) -> Any:
    given: dict[str, Any] = dict(sampling=WHOLE, keep_rollouts=False, optimizer=lambda p: torch.optim.Adam(p, lr=rate))
    given["lr_scheduler"] = lambda optimizer: WarmupCosine(optimizer, warmup=0)
    return Distillation(options.pop("policy", Table(0)), teacher=teacher, **(given | options))


def exact_kl(policy: Table, teacher: Table) -> float:
    """KL(π || p) of whole answers, exactly, in nats."""
    batch = enumerable.everything()
    with torch.no_grad():
        pi, p = (enumerable.log_probs(model, batch) for model in (policy, teacher))
    return float((pi.exp() * (pi - p)).sum())


# -- on the model that can be listed -----------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", KINDS[:3], ids=lambda d: type(d).__name__)
def test_the_student_reaches_its_teacher(divergence: Divergence) -> None:
    teacher = Table(1)
    found = algorithm(teacher, 0.2, divergence=divergence, samples=16, minibatches=8)
    before = exact_kl(found.policy, teacher)
    trainer = fit(found, Prompts(64), max_epochs=50)
    after = exact_kl(found.policy, teacher)
    print(f"{divergence}: {before:.3f} -> {after:.6f} nats")
    assert before > 1 and after < 1e-3
    assert float(trainer.callback_metrics["policy/divergence"]) < 1e-3


# -- gradients ---------------------------------------------------------------------------------------------------------


def weighted(policy: Table) -> Trajectory:
    """Every answer once, weighed by its probability: a mean over it is an expectation without sampling error."""
    words = torch.cartesian_prod(*[torch.arange(WORDS)] * LENGTH).tolist()
    batch = Trajectory.of([Tree([START], words)])
    with torch.no_grad():
        p = enumerable.log_probs(policy, batch).exp().float()
        batch.sampled_logp = policy(batch).logp
    batch.weight = torch.where(batch.branch >= 0, p[batch.branch.clamp_min(0)], 0.0)
    batch.totals = Totals(float(batch.weight.sum()), 1, 1)
    return batch


def slope(found: Any, batch: Trajectory) -> Tensor:
    (gradient,) = torch.autograd.grad(found.loss(batch), found.policy.logits)
    return gradient


def ready(teacher: Table, **options: Any) -> Any:
    """An algorithm whose loss can be asked without a Trainer."""
    found = algorithm(teacher, **options)
    found.teacher = enumerable.TableReference(teacher)
    return found


@pytest.mark.parametrize("divergence", KINDS[:3], ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_loss_is_the_mean_divergence_where_the_policy_goes(divergence: Divergence, temperature: float) -> None:
    """In value and gradient, of the table of all contexts: each counts by how often the policy comes there."""
    teacher, sampling = Table(1), Sampling(max_new_tokens=LENGTH, temperature=temperature)
    found = ready(teacher, divergence=divergence, sampling=sampling)
    batch = weighted(found.policy)
    on = batch.predicted()
    visits = torch.zeros(enumerable.CONTEXTS).index_add(0, found.policy.context(batch)[on], batch.weight[on])
    logits = found.policy.logits.detach().clone().requires_grad_()
    each = divergence((logits / temperature).log_softmax(-1), (teacher.logits.detach() / temperature).log_softmax(-1))
    expected = (visits * each).sum() / batch.totals.tokens
    torch.testing.assert_close(found.loss(batch), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(slope(found, batch), torch.autograd.grad(expected, logits)[0], atol=1e-7, rtol=1e-4)


def test_samples_have_the_gradient_of_the_whole_vocabulary_on_average() -> None:
    teacher = Table(1)
    sampled, whole = (ready(teacher, divergence=kind) for kind in (SampledReverseKL(), ReverseKL()))
    batch = weighted(sampled.policy)
    torch.testing.assert_close(sampled.loss(batch), whole.loss(batch), rtol=1e-5, atol=0)
    torch.testing.assert_close(slope(sampled, batch), slope(whole, batch), atol=1e-7, rtol=1e-4)


def test_samples_of_an_older_policy_are_weighed() -> None:
    """Where no token is more than twice as likely as it was, the mean gradient is exact again."""
    teacher, found = Table(1), ready(Table(1), divergence=SampledReverseKL())
    older = Table(0)
    with torch.no_grad():
        older.logits += 0.3 * torch.rand(older.logits.shape, generator=torch.Generator().manual_seed(2))
    whole = ready(teacher, divergence=ReverseKL(), policy=found.policy)
    batch = weighted(older)
    torch.testing.assert_close(slope(found, batch), slope(whole, batch), atol=1e-7, rtol=1e-4)
    batch.sampled_logp = found.policy(batch).logp.detach()  # as if they were its own
    assert (slope(found, batch) - slope(whole, batch)).abs().max() > 1e-4


def test_the_weight_of_a_token_has_a_cap() -> None:
    value, logp = torch.tensor([3.0, 3.0, 3.0]), torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    loss = score_function(value, logp, torch.tensor([-1.0, 0.0, -9.0]))
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    expected = [3.0, 3 * torch.tensor(-1.0).exp().item(), 6.0]
    assert loss.tolist() == pytest.approx(expected) and gradient.tolist() == pytest.approx(expected)


# -- given answers -----------------------------------------------------------------------------------------------------


class Answered(Prompts):
    """The one prompt, with answers that are sampled from a teacher and stand in the rows."""

    def __init__(self, size: int, teacher: Table, rows: int = 2048) -> None:
        super().__init__(size)
        groups = teacher.generate([[START]], rows, Sampling(LENGTH, seed=5))
        self.answers: list[Any] = [response.tokens for response in groups[0]]

    def train_dataloader(self) -> Any:
        prompts = [Prompt(i, Example([], source=f"a:{i}"), [START], answer) for i, answer in enumerate(self.answers)]
        return self._trainer().lightning_module.experience(PromptLoader(prompts, self.batch_size, self.seed))


class Counting(Table):
    asked = 0

    def generate(self, prompts: Any, n: int = 1, *args: Any, **kwargs: Any) -> Any:
        self.asked += len(prompts)
        return super().generate(prompts, n, *args, **kwargs)


def test_on_given_answers_alone_nothing_is_sampled_and_the_teacher_is_reached_where_they_lead() -> None:
    teacher, policy = Table(1), Counting(0)
    found = algorithm(teacher, 0.2, divergence=ForwardKL(), given=1.0, policy=policy, minibatches=4)
    trainer = fit(found, Answered(1024, teacher), max_epochs=60)
    assert policy.asked == 0 and not any(name.startswith("rollout/") for name in trainer.callback_metrics)
    assert float(trainer.callback_metrics["policy/divergence"]) < 1e-3
    assert exact_kl(policy, teacher) < 0.1 * exact_kl(Table(0), teacher)  # no given answer goes through some contexts


def test_a_share_of_prompts_has_given_answers_whatever_process_draws_them() -> None:
    teacher, policy = Table(1), Counting(0)
    found = algorithm(teacher, given=0.25, policy=policy, samples=2)
    seen: list[Trajectory] = []
    whole = found.loss
    found.loss = lambda batch: seen.append(batch) or whole(batch)
    fit(found, Answered(64, teacher), max_epochs=4)
    given = [draw for draw in range(256) if found.is_given(draw)]
    assert 40 < len(given) < 90 and policy.asked == 256 - len(given)
    one = {int(draw): batch for batch in seen for draw in batch.draw}
    for batch in seen:
        responses = [len(span.responses) for span in batch.structure()]
        assert responses == [1 if draw in given else 2 for draw in batch.draw.tolist()]
    assert sorted(one) == list(range(256))


def test_rows_without_an_answer_are_named() -> None:
    data = Answered(64, Table(1))
    data.answers[7] = None
    with pytest.raises(UserError, match=r"prompts:7: no answer, and --model.given 0.5 trains on it"):
        fit(algorithm(Table(1), given=0.5), data)


# -- another prompt for the teacher ------------------------------------------------------------------------------------


def test_responses_after_other_prompts() -> None:
    trees = [Tree([1, 2], [[3], [4, 5]], weights=[[1.0], [0.0, 1.0]], row=7), Tree([9], [[8, 8]], row=8)]
    batch = pack([trees[0], Tree([6, 6], []), trees[1]])
    seen = batch.with_prompts([[11, 12, 13], [14]])
    assert seen.tokens.tolist() == [11, 12, 13, 3, 4, 5, 14, 8, 8] and seen.totals == batch.totals
    assert seen.tokens[seen.predicted()].tolist() == batch.tokens[batch.predicted()].tolist() == [3, 5, 8, 8]
    numbers = torch.arange(float(len(seen)))
    carried = seen.carried_to(batch, numbers)
    assert carried[batch.predicted()].tolist() == numbers[seen.predicted()].tolist()
    assert carried.sum() == numbers[seen.predicted()].sum()
    blank = batch.blank()
    assert blank.with_prompts([]) is blank


class Spoken(Questions):
    """Prompts of numbers, with a template that puts what a system turn says first."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.template = SimpleNamespace(prompt=self.asked)
        for at, prompt in enumerate(self.prompts):
            said = Message(role="user", content=" ".join(map(str, prompt.tokens)))
            own = [Message(role="system", content="90")] if at % 3 == 0 else []
            example = Example([*own, said], source=f"q.jsonl:{at + 1}")
            self.prompts[at] = prompt._replace(example=example, tokens=self.asked(example.messages))

    @staticmethod
    def asked(messages: list[Message], tools: Any = ()) -> list[int]:
        return [int(number) for turn in messages for number in turn["content"].split()]


class Seen(Distillation):
    """Keeps the batches that it is trained on."""

    def loss(self, batch: Any) -> Tensor:
        self.batches = [*getattr(self, "batches", []), batch]
        self.losses = [*getattr(self, "losses", []), super().loss(batch)]
        return self.losses[-1]


def spoken(divergence: Divergence | None = None, **options: Any) -> Any:
    given: dict[str, Any] = dict(sampling=SHORT, keep_rollouts=False, lr_scheduler=None, divergence=divergence)
    given |= dict(optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), teacher_system="91 92 93")
    return Seen(small(), **(given | options))


@pytest.mark.parametrize("divergence", KINDS, ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("own", [True, False])
def test_the_teacher_alone_sees_its_system_prompt(divergence: Divergence, own: bool) -> None:
    """In the first step, against the divergence of every answer by itself, after the two prompts."""
    found = spoken(divergence, samples=2, **({} if own else {"teacher": wider()}))
    fit(found, Spoken(), max_epochs=1)
    (batch,), (loss,) = found.batches, found.losses
    start, other, data, total = small(), small() if own else wider(), Spoken(), 0.0
    for row, span in zip(batch.row.tolist(), batch.structure(), strict=True):
        turns = data.prompts[row].example.messages
        plain = turns[1:] if turns[0]["role"] == "system" else turns
        prompt = [91, 92, 93, *data.asked(plain)]
        for _, at, stop in span.responses:
            answer = batch.tokens[at:stop].tolist()
            here, there = pack([Tree(data.prompts[row].tokens, [answer])]), pack([Tree(prompt, [answer])])
            with torch.no_grad():
                if divergence.sampled:
                    logs = [p(b, {"logp"}, 0.7).logp[b.predicted()] for p, b in ((start, here), (other, there))]
                    total += float(divergence(*logs).sum())
                else:
                    mine, theirs = (
                        predictions_of(p, p(b, {"predictions"}, 0.7)) for p, b in ((start, here), (other, there))
                    )
                    total += float(mine.divergence(theirs, divergence).sum())
    assert float(loss.detach()) == pytest.approx(total / batch.totals.tokens, rel=1e-4)
    assert abs(total) > 1e-2


def test_a_policy_learns_to_do_without_a_system_prompt() -> None:
    found = spoken(samples=4, optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3))
    fit(found, Spoken(), max_epochs=20)
    far = [float(loss.detach()) for loss in found.losses]
    assert max(far[-3:]) < 0.3 * far[0]


def test_a_micro_batch_has_room_for_the_prompts_of_the_teacher() -> None:
    """Its system prompt stands before every prompt of a batch, and the policy's do not."""
    ends, seen = [], []
    for budget in (4096, 90):
        found, data = spoken(samples=2, teacher_system=" ".join(["91"] * 40)), Spoken()
        data.max_tokens = budget
        fit(found, data, max_epochs=1)
        ends.append(weights_of(found.policy))
        seen.append([found.teacher_prompts.seen(batch).size for batch in found.batches])
    assert max(seen[0]) > 350 and max(seen[1]) <= 90
    torch.testing.assert_close(ends[0], ends[1], atol=2e-5, rtol=0)
    found, data = spoken(samples=2, teacher_system=" ".join(["91"] * 40)), Spoken()
    data.max_tokens = 50
    with pytest.raises(UserError, match="with --model.teacher_system a prompt with its answers may have"):
        fit(found, data, max_epochs=1)


def test_prompts_of_another_file_are_refused_in_the_middle_of_a_rollout() -> None:
    found, data = spoken(), Spoken()
    fit(found, data, max_epochs=1)
    for change in (lambda prompt: prompt._replace(tokens=[5]), lambda prompt: prompt._replace(row=99)):
        found.teacher_prompts._prompts = {p.row: p for p in map(change, data.prompts)}
        with pytest.raises(UserError, match="resume with the same --data.path"):
            found.loss(found.batches[0])


def test_a_prompt_too_long_for_the_teacher_and_data_without_a_template_are_refused() -> None:
    with pytest.raises(UserError, match="leaves the teacher no room to answer, 58 would"):
        fit(spoken(teacher_system=" ".join(["91"] * 60)), Spoken())
    with pytest.raises(UserError, match="set --data PromptData"):
        fit(spoken(), Questions())


# -- teachers ----------------------------------------------------------------------------------------------------------


class Others:
    """Another tokenizer."""

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0}


def test_a_teacher_of_another_vocabulary_is_refused() -> None:
    other = wider()
    other._tokenizer = Others()  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"the teacher teacher has another tokenizer than .*give --model.teacher.path"):
        fit(spoken(teacher=other), Spoken())


def test_a_teacher_with_too_few_positions_is_refused() -> None:
    other, data = wider(), Spoken()
    other.positions, data.longest_row = 12, 20  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"20 tokens but teacher has positions for 12; set --data.max_length 12"):
        fit(spoken(teacher=other), data)


def test_a_teacher_is_neither_trained_nor_saved() -> None:
    other = wider()
    before = weights_of(other)
    found = spoken(teacher=other)
    fit(found, Spoken(), max_epochs=2)
    assert torch.equal(weights_of(other), before) and not any(p.requires_grad for p in other.parameters())
    assert not any("teacher" in name for name in found.state_dict())


def adapted(folder: str, targets: Any, **options: Any) -> CausalLM:
    policy = CausalLM(folder, adapter=LoraConfig(r=4, target_modules=targets, **options))
    policy._tokenizer = small().tokenizer
    policy.build(dropout=False)
    return policy


def changed(policy: CausalLM) -> CausalLM:
    """With trained weights that are far from where they began."""
    with torch.no_grad():
        for parameter in (p for p in policy.parameters() if p.requires_grad):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return policy


def logits(predictions: Any) -> Tensor:
    with torch.no_grad():
        return predictions.logits(slice(0, 1000))  # type: ignore[no-any-return]


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
def test_the_base_of_an_adapter_is_the_model_without_it(targets: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", noise=0.1)
    batch, policy = pack([Tree([3, 4], [[5, 6], [7]])]), adapted(folder, targets)
    reference = policy.reference()
    start = logits(reference.predictions(batch, 0.7))
    changed(policy)
    base = CausalLM(folder)
    base._tokenizer = policy.tokenizer
    base.build()
    for found in (start, logits(reference.predictions(batch, 0.7))):
        torch.testing.assert_close(found, logits(predictions_of(base, base(batch, {"predictions"}, 0.7))))
    own = logits(predictions_of(policy, policy(batch, {"predictions"}, 0.7)))
    assert reference.kind == "adapter_off" and (own - start).abs().max() > 0.01


def test_a_copy_keeps_the_head_that_it_began_with() -> None:
    batch, policy = pack([Tree([3, 4], [[5, 6], [7]])]), small()
    reference = policy.reference("copy")
    start = logits(reference.predictions(batch))
    later = reference.predictions(batch)
    changed(policy)
    assert torch.equal(logits(later), start) and torch.equal(logits(reference.predictions(batch)), start)


def test_a_copied_adapter_of_the_head_cannot_teach(tmp_path: Path) -> None:
    policy = adapted(saved(tmp_path / "model"), ["q_proj", "lm_head"])
    with pytest.raises(UserError, match="the adapter changes the head .* give --model.teacher.path"):
        policy.reference("snapshot").predictions(pack([Tree([3], [[5]])]))


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["q_proj"]])
def test_an_adapted_head_learns_and_teaches(targets: Any, tmp_path: Path) -> None:
    """The gradient of an adapter on the head, with a teacher that has one: that of all logits."""
    torch.manual_seed(3)
    folder = saved(tmp_path / "model", noise=0.1)
    policy, other = changed(adapted(folder, targets)), changed(adapted(folder, ["v_proj", "lm_head"]))
    batch = pack([Tree([3, 4], [[5, 6], [7]])])
    here, there = (predictions_of(p, p(batch, {"predictions"})) for p in (policy, other))
    assert isinstance(here, HeadPredictions) and here.plain is (targets == ["q_proj"])
    trained = [p for p in policy.parameters() if p.requires_grad]
    ours = torch.autograd.grad(here.divergence(there, ReverseKL()).sum(), trained)
    here = predictions_of(policy, policy(batch, {"predictions"}))
    log_pi, log_p = here.logits(slice(0, 9)).log_softmax(-1), logits(there).log_softmax(-1)
    expected = torch.autograd.grad(ReverseKL()(log_pi, log_p).sum(), trained)
    for mine, plain in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-6)


def test_without_a_reward_nothing_of_one_is_logged(tmp_path: Path) -> None:
    found = spoken(teacher=wider(), keep_rollouts=True)
    trainer = fit(found, Spoken(held=3), max_epochs=1, default_root_dir=tmp_path)
    names = {"rollout/length", "rollout/kl", "policy/divergence", "val/length", "val/kl"}
    assert names <= set(trainer.callback_metrics)
    assert not any("reward" in name or "spread" in name for name in trainer.callback_metrics)
    assert '"scores": null' in (tmp_path / "rollouts.jsonl").read_text()
    found = spoken(teacher=wider(), reward=evens)
    trainer = fit(found, Spoken(held=3), max_epochs=1)
    assert {"rollout/reward", "rollout/spread", "val/reward"} <= set(trainer.callback_metrics)
