"""The chunked head against the plain formula, values and gradients."""

import pytest
import torch
from torch import nn

from leyden.models import logprobs as module
from leyden.models.logprobs import Squash, logprobs

torch.manual_seed(0)
HIDDEN, TARGET = torch.randn(11, 6, dtype=torch.float32), torch.randint(0, 23, (11,))


def plain(head: nn.Module, hidden: torch.Tensor, squash: Squash, temperature: float) -> tuple[torch.Tensor, ...]:
    x = head(hidden) * squash.scale
    z = (squash.cap * torch.tanh(x / squash.cap) if squash.cap else x) / temperature
    logp = z.log_softmax(-1)
    return logp[torch.arange(len(hidden)), TARGET], -(logp.exp() * logp).sum(-1), logp.mean(-1)


class Wrapped(nn.Linear):
    """A head that is not a plain linear layer."""


@pytest.mark.parametrize("kind", [nn.Linear, Wrapped])
@pytest.mark.parametrize("squash", [Squash(), Squash(0.3), Squash(2.0, 1.5)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_equals_the_plain_formula(
    kind: type[nn.Linear], squash: Squash, temperature: float, extra: bool, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 23 * (11 if kept else 4))  # 11 rows leave a remainder
    monkeypatch.setattr(module, "BLOCK_BYTES", {"cpu": 4 * 23 * 3})
    torch.manual_seed(1)
    head = kind(6, 23)
    hidden = HIDDEN.clone().requires_grad_()
    mix = torch.randn(3, 11) * torch.tensor([1.0, float(extra), float(extra)])[:, None]
    ours_all = logprobs(head, hidden, TARGET, squash, temperature, extra, agree=True)
    outputs = [ours_all[:3], plain(head, hidden, squash, temperature)]
    z = (squash(head(hidden)) / temperature).detach().double()
    assert not ours_all[3].requires_grad
    torch.testing.assert_close(ours_all[3].double(), z.softmax(-1).square().sum(-1).log(), atol=2e-6, rtol=0)
    results = []
    for columns in outputs:
        loss = sum((m * c).sum() for m, c in zip(mix, columns, strict=True) if bool(m.any()))
        results.append(torch.autograd.grad(loss, [hidden, head.weight, head.bias]))
    for ours, theirs in zip(outputs[0][: 3 if extra else 1], outputs[1], strict=False):
        assert (ours - theirs).abs().max() < 2e-6
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() / theirs.norm() < 2e-6


def test_golden_values() -> None:
    """Logits (0, ln 2, ln 3) make probabilities 1/6, 2/6, 3/6; the entropy is 1.0114043 nats."""
    head = nn.Linear(1, 3, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0], [2.0], [3.0]]).log())
    head.requires_grad_(False)
    logp, entropy, mean, agreement = logprobs(head, torch.ones(1, 1), torch.tensor([2]), extra=True, agree=True)
    assert float(agreement.exp()) == pytest.approx((1 + 4 + 9) / 36)
    assert float(logp.exp()) == pytest.approx(0.5)
    assert float(entropy) == pytest.approx(1.0114043)
    assert float(mean.exp()) == pytest.approx((1 / 36) ** (1 / 3))


def test_memory_does_not_grow_with_tokens_times_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor made on the way, forward and backward, is one chunk however many tokens there are."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, f, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = f(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                if isinstance(x, torch.Tensor):
                    self.size = max(self.size, x.numel())
            return out

    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 500 * 16)
    head = nn.Linear(4, 500)
    sizes = []
    for tokens in (64, 512):
        hidden = torch.randn(tokens, 4, requires_grad=True)
        with Largest() as seen:
            logprobs(head, hidden, torch.zeros(tokens, dtype=torch.long))[0].sum().backward()
        sizes.append(seen.size)
    assert sizes == [16 * 500, 16 * 500]


def test_logits_of_a_small_batch_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *args: calls.append(0) or linear(*args))
    counts = []
    for rows in (10, 11):
        monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 23 * rows)
        calls.clear()
        logprobs(nn.Linear(6, 23), HIDDEN, TARGET)[0].sum().backward()
        counts.append(len(calls))
    assert counts == [4, 1]  # two chunks, forward and backward; one chunk, once


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_backward_pass_gives_the_same(dtype: torch.dtype) -> None:
    """Kept logits are overwritten by the first one."""
    head, hidden = nn.Linear(6, 23).to(dtype), HIDDEN.detach().to(dtype).requires_grad_()
    loss = (logprobs(head, hidden, TARGET)[0] * torch.arange(11)).sum()
    first, second = (torch.autograd.grad(loss, [hidden, head.weight], retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_and_bf16_keep_fp32_log_probs() -> None:
    head = nn.Linear(6, 23)
    with torch.autocast("cpu", torch.bfloat16):
        logp, *_ = logprobs(head, HIDDEN, TARGET)
    assert logp.dtype == torch.float32 and (logp - plain(head, HIDDEN, Squash(), 1.0)[0]).abs().max() < 0.05
    low, *_ = logprobs(head.bfloat16(), HIDDEN.bfloat16(), TARGET)
    assert low.dtype == torch.float32


def test_extreme_logits_stay_finite() -> None:
    head = nn.Linear(1, 3, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1e4], [0.0], [-1e4]]))
    hidden = torch.ones(3, 1, requires_grad=True)
    columns = logprobs(head, hidden, torch.tensor([0, 1, 2]), extra=True, agree=True)
    assert columns[3].tolist() == [0.0, 0.0, 0.0]
    torch.stack(columns).sum().backward()
    assert columns[0].tolist() == [0.0, -1e4, -2e4] and hidden.grad is not None and hidden.grad.isfinite().all()


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_in_bf16_are_those_of_fp32_to_its_precision(autocast: bool) -> None:
    """Also their dtypes: those of the tensors they belong to."""
    torch.manual_seed(2)
    head = nn.Linear(6, 23)
    exact = torch.autograd.grad(plain(head, HIDDEN.requires_grad_(), Squash(), 1.0)[0].sum(), [HIDDEN, head.weight])
    low = head if autocast else nn.Linear(6, 23).to(torch.bfloat16)
    if not autocast:
        low.load_state_dict(head.state_dict())
    hidden = HIDDEN.detach().to(low.weight.dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logp = logprobs(low, hidden, TARGET)[0]
    grads = torch.autograd.grad(logp.sum(), [hidden, low.weight])
    assert [g.dtype for g in grads] == [hidden.dtype, low.weight.dtype]
    for ours, theirs in zip(grads, exact, strict=True):
        assert (ours.float() - theirs).norm() / theirs.norm() < 0.02


def test_a_frozen_head_gets_no_gradient_and_passes_it_on() -> None:
    head = nn.Linear(6, 23)
    hidden = HIDDEN.detach().requires_grad_()
    expected = torch.autograd.grad(plain(head, hidden, Squash(), 1.0)[0].sum(), [hidden])[0]
    head.requires_grad_(False)
    logprobs(head, hidden, TARGET)[0].sum().backward()
    assert head.weight.grad is None and hidden.grad is not None
    assert (hidden.grad - expected).abs().max() < 1e-6
