"""Divergences from a teacher: values and gradients by hand, and by the chunked head against the plain formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from small import LLAMA, small, some_trees
from torch import Tensor, nn

from leyden.batch.forest import pack
from leyden.divergences import Divergence, ForwardKL, JensenShannon, ReverseKL, SampledReverseKL
from leyden.models.divergence import HeadPredictions
from leyden.models.logprobs import Squash
from leyden.policy import predictions
from leyden.policy.policy import predictions_of
from leyden.policy.predictions import KnownPredictions

KINDS: list[Divergence] = [ForwardKL(), ReverseKL(), JensenShannon(), JensenShannon(0.1), JensenShannon(0.9)]


def logs(seed: int, rows: int = 7, size: int = 11, dtype: Any = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(rows, size, generator=generator, dtype=dtype)).log_softmax(-1)


class Plain(Divergence):
    """Another divergence, without a gradient of its own."""

    def __init__(self, other: Divergence) -> None:
        self.other = other

    def __call__(self, log_pi: Tensor, log_p: Tensor) -> Tensor:
        return self.other(log_pi, log_p)


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        # π = (1/2, 1/2) and p = (1/4, 3/4): Σ p log p/π and Σ π log π/p
        (ForwardKL(), 0.25 * math.log(0.5) + 0.75 * math.log(1.5)),
        (ReverseKL(), 0.5 * math.log(2) + 0.5 * math.log(2 / 3)),
        # m = (3/8, 5/8) halfway between
        (
            JensenShannon(),
            0.5 * (0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5)) + 0.5 * 0.5 * (math.log(4 / 3) + math.log(4 / 5)),
        ),
        # a tenth of p: m = (19/40, 21/40)
        (
            JensenShannon(0.1),
            0.1 * (0.25 * math.log(10 / 19) + 0.75 * math.log(10 / 7))
            + 0.9 * 0.5 * (math.log(20 / 19) + math.log(20 / 21)),
        ),
    ],
)
def test_values_by_hand(kind: Divergence, value: float) -> None:
    pi, p = (torch.tensor([x], dtype=torch.float64).log() for x in ([0.5, 0.5], [0.25, 0.75]))
    assert float(kind(pi, p)) == pytest.approx(value, abs=1e-12)
    assert float(kind(p, p)) == pytest.approx(0, abs=1e-12) and value > 0


def test_of_samples_it_is_the_ratio() -> None:
    found = SampledReverseKL()(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0]))
    assert found.tolist() == [0.5, -1.0]


def test_mean_over_samples_is_the_reverse_kl() -> None:
    pi, p = logs(0), logs(1)
    estimates = SampledReverseKL()(pi.flatten(), p.flatten()).reshape(pi.shape)
    torch.testing.assert_close((pi.exp() * estimates).sum(-1), ReverseKL()(pi, p))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_teacher_with_impossible_tokens_is_finite_where_it_can_be(kind: Divergence) -> None:
    """Probabilities of 1e-30 and logits far apart."""
    far = torch.tensor([[0.0, -70.0, 5.0]]).log_softmax(-1)
    near = torch.tensor([[0.0, 1.0, -60.0]]).log_softmax(-1)
    value = kind(near, far)
    assert value.isfinite().all() and kind.gradient(near, far, value).isfinite().all()


def test_limits_of_jensen_shannon_are_the_two_kl() -> None:
    pi, p = logs(0), logs(1)
    small, large = JensenShannon(1e-5), JensenShannon(1 - 1e-5)
    torch.testing.assert_close(small(pi, p) / 1e-5, ForwardKL()(pi, p), rtol=1e-3, atol=0)
    torch.testing.assert_close(large(pi, p) / 1e-5, ReverseKL()(pi, p), rtol=1e-3, atol=0)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1])
def test_a_mixture_of_one_alone_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match="at 0 take ForwardKL, at 1 ReverseKL"):
        JensenShannon(beta)


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradient_is_the_slope_of_the_value(kind: Divergence) -> None:
    """By finite differences of the logits, and by autograd of the formula."""
    z, p = 2 * torch.randn(3, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64), logs(4, 3, 5)

    def value(z: Tensor) -> Tensor:
        return kind(z.log_softmax(-1), p)

    found = kind.gradient(z.log_softmax(-1), p, value(z))
    step = 1e-6
    for v in range(5):
        moved = torch.zeros_like(z)
        moved[:, v] = step
        torch.testing.assert_close(
            found[:, v], (value(z + moved) - value(z - moved)) / (2 * step), rtol=1e-6, atol=1e-8
        )
    torch.testing.assert_close(found, Plain(kind).gradient(z.log_softmax(-1), p, value(z)))
    torch.testing.assert_close(found.sum(-1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_gradients_by_hand() -> None:
    """π = (1/2, 1/2), p = (1/4, 3/4)."""
    pi, p = (torch.tensor([x], dtype=torch.float64).log() for x in ([0.5, 0.5], [0.25, 0.75]))
    assert ForwardKL().gradient(pi, p, ForwardKL()(pi, p)).tolist()[0] == pytest.approx([0.25, -0.25])
    half = math.log(3) / 4  # π_1 (log π_1/p_1 - KL), with log π/p = (log 2, log 2/3), whose mean is the KL
    assert ReverseKL().gradient(pi, p, ReverseKL()(pi, p)).tolist()[0] == pytest.approx([half, -half])
    half = math.log(5 / 3) / 8  # half of π_1 (log π_1/m_1 - KL(π || m)), with log π/m = (log 4/3, log 4/5)
    assert JensenShannon().gradient(pi, p, JensenShannon()(pi, p)).tolist()[0] == pytest.approx([half, -half])


# -- the chunked head --------------------------------------------------------------------------------------------------


class Wrapped(nn.Linear):
    """A head that is not a plain linear layer."""


ROWS = pack(some_trees(4, responses=2))


def plain(
    states: list[Tensor], heads: list[nn.Linear], kind: Divergence, squash: Squash, temperature: float = 1.0
) -> Tensor:
    """The formula with all logits, of the policy and then of its teacher."""
    (hidden, other), (head, teacher) = states, heads
    at, size = ROWS.predicted(), min(head.out_features, teacher.out_features)

    def log_probs(states: Tensor, layer: nn.Linear) -> Tensor:
        x = layer(states[ROWS.parent[at]]) * squash.scale
        z = (squash.cap * torch.tanh(x / squash.cap) if squash.cap else x) / temperature
        return z[:, :size].log_softmax(-1)

    value = kind(log_probs(hidden, head), log_probs(other, teacher).detach())
    return torch.zeros(len(ROWS)).index_put((at,), value)


@pytest.mark.parametrize(
    "kind", [ForwardKL(), ReverseKL(), JensenShannon(0.3), Plain(ForwardKL())], ids=lambda k: type(k).__name__
)
@pytest.mark.parametrize("layer", [nn.Linear, Wrapped])
@pytest.mark.parametrize(("squash", "temperature"), [(Squash(), 1.0), (Squash(0.3), 0.7), (Squash(2.0, 1.5), 0.7)])
@pytest.mark.parametrize("sizes", [(23, 23), (23, 19), (19, 23)])
@pytest.mark.parametrize("kept", [False, True])
def test_equals_the_plain_formula(
    kind: Divergence,
    layer: type[nn.Linear],
    squash: Squash,
    temperature: float,
    sizes: tuple[int, int],
    kept: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With fewer rows than a chunk or more of them, and heads that are padded to different sizes."""
    monkeypatch.setattr(predictions, "CHUNK_BYTES", 4 * 23 * (1000 if kept else 4))
    monkeypatch.setattr("leyden.models.logprobs.BLOCK_BYTES", {"cpu": 4 * 23 * 3})
    torch.manual_seed(1)
    head, teacher = layer(6, sizes[0]), nn.Linear(4, sizes[1])
    hidden, other = torch.randn(len(ROWS), 6, requires_grad=True), torch.randn(len(ROWS), 4, requires_grad=True)
    mix = torch.randn(len(ROWS))
    mine = HeadPredictions(ROWS, hidden, head, squash, temperature)
    theirs = HeadPredictions(ROWS, other, teacher, squash, temperature)
    results, inputs = [], [hidden, head.weight, head.bias]
    for value in (mine.divergence(theirs, kind), plain([hidden, other], [head, teacher], kind, squash, temperature)):
        results.append([value.detach(), *torch.autograd.grad((mix * value).sum(), inputs)])
    for ours, formula in zip(*results, strict=True):
        assert (ours - formula).norm() / formula.norm() < 3e-6
    assert other.grad is None and teacher.weight.grad is None


def test_padding_of_a_head_gets_no_gradient() -> None:
    torch.manual_seed(1)
    head, teacher = nn.Linear(6, 23), nn.Linear(4, 19)
    mine = HeadPredictions(ROWS, torch.randn(len(ROWS), 6), head, Squash(), 1.0)
    mine.divergence(
        HeadPredictions(ROWS, torch.randn(len(ROWS), 4), teacher, Squash(), 1.0), ReverseKL()
    ).sum().backward()
    assert head.weight.grad is not None and head.weight.grad[:19].abs().min() > 0 and not head.weight.grad[19:].any()


@pytest.mark.parametrize("layer", [nn.Linear, Wrapped])
def test_memory_does_not_grow_with_tokens_times_vocabulary(layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor made on the way, forward and backward, is one chunk of one of the heads."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, f, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = f(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                self.size = max(self.size, x.numel() if isinstance(x, Tensor) else 0)
            return out

    monkeypatch.setattr(predictions, "CHUNK_BYTES", 4 * 500 * 16)
    batch = pack(some_trees(40, responses=4))
    assert len(batch.predicted()) > 16 * 16
    head, teacher, hidden = layer(4, 500), nn.Linear(4, 500), torch.randn(len(batch), 4, requires_grad=True)
    with Largest() as largest:
        mine, theirs = (HeadPredictions(batch, hidden, one, Squash(), 1.0) for one in (head, teacher))
        mine.divergence(theirs, JensenShannon()).sum().backward()
    assert largest.size == 500 * 16


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_policies_are_compared_where_responses_are_predicted(kind: Divergence) -> None:
    """With prompts that are shared, weights of 0 and a teacher of another width, against logits of whole rows."""
    student = small()
    torch.manual_seed(5)
    teacher = small("other", options=LLAMA | {"hidden_size": 64, "num_hidden_layers": 1})
    batch = pack(some_trees(5, responses=2))
    with torch.no_grad():
        theirs = predictions_of(teacher, teacher(batch, {"predictions"}, 0.8))
        found = predictions_of(student, student(batch, {"predictions"}, 0.8)).divergence(theirs, kind)
        rows, at = batch.rows(), batch.predicted()
        logs = []
        for policy in (student, teacher):
            with policy.backbone.native_attention():
                z = policy.model(input_ids=rows.tokens, attention_mask=rows.mask).logits
            logs.append((z.flatten(0, 1) / 0.8).log_softmax(-1))
    where = rows.source[batch.parent[at]]
    torch.testing.assert_close(found[at], kind(logs[0][where], logs[1][where]), rtol=1e-4, atol=1e-5)
    assert float(found.abs().sum()) == pytest.approx(float(found[at].abs().sum()))


def test_a_batch_without_a_response_gives_every_parameter_a_gradient_of_zero() -> None:
    student, batch = small(), pack(some_trees(2)).blank()
    mine, theirs = (predictions_of(student, student(batch, {"predictions"})) for _ in range(2))
    batch.token_mean(mine.divergence(theirs, ForwardKL())).backward()
    grads = [p.grad for p in student.parameters()]
    assert all(grad is not None and not grad.any() for grad in grads)


def test_half_precision_is_close_and_everything_after_the_head_is_fp32() -> None:
    torch.manual_seed(2)
    head, teacher = nn.Linear(64, 301).bfloat16(), nn.Linear(64, 301).bfloat16()
    hidden = torch.randn(len(ROWS), 64, dtype=torch.bfloat16, requires_grad=True)
    other = torch.randn(len(ROWS), 64).bfloat16()
    whole = hidden.detach().float().requires_grad_()
    value = HeadPredictions(ROWS, hidden, head, Squash(), 1.0).divergence(
        HeadPredictions(ROWS, other, teacher, Squash(), 1.0), ReverseKL()
    )
    exact = plain([whole, other.float()], [head.float(), teacher.float()], ReverseKL(), Squash())
    grads = [torch.autograd.grad(x.sum(), h)[0].float() for x, h in ((value, hidden), (exact, whole))]
    assert value.dtype == torch.float32 and (value - exact).norm() / exact.norm() < 0.02
    assert (grads[0] - grads[1]).norm() / grads[1].norm() < 0.05


def test_other_numbers_of_tokens_are_refused() -> None:
    mine, theirs = (KnownPredictions(pack(some_trees(n)), torch.zeros(200, 5)) for n in (1, 4))
    with pytest.raises(ValueError, match="tokens are predicted here and"):
        mine.divergence(theirs, ForwardKL())


@pytest.mark.parametrize("kind", [ForwardKL(), ReverseKL(), JensenShannon(0.3)], ids=lambda d: type(d).__name__)
def test_tokens_that_neither_can_say_count_for_nothing(kind: Divergence) -> None:
    """Heads may give entries beyond their vocabulary -inf."""
    never = torch.tensor([-torch.inf])
    pi, p = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    short = [x.log_softmax(-1)[None] for x in (pi, p)]
    long = [torch.cat([x, never]).log_softmax(-1)[None] for x in (pi, p)]
    torch.testing.assert_close(kind(*long), kind(*short))
    slope = kind.gradient(*long, kind(*long))
    torch.testing.assert_close(slope[:, :2], kind.gradient(*short, kind(*short)))
    assert slope[0, 2] == 0
