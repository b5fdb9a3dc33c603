"""Sampling: against transformers' own greedy search, against the training path's log-probs, and its independence."""

from __future__ import annotations

import math

import pytest
import torch
from small import LLAMA, small

from leyden.batch import Tree, pack
from leyden.models import CausalLM
from leyden.models.generate import choose, truncate
from leyden.policy import Response, Sampling

PROMPTS = [[5, 9, 2, 40, 7], [11], [3, 3, 8], [60, 61, 62, 63, 64, 65, 66, 67, 68]]
MODELS = {
    "llama": ("LlamaConfig", None),
    "gemma3": (
        "Gemma3TextConfig",
        LLAMA | dict(head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
    ),
    "gpt2": ("GPT2Config", dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "cohere": ("CohereConfig", LLAMA | dict(logit_scale=0.3)),
    "mamba": ("MambaConfig", dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=8)),
}


@pytest.fixture(scope="module", params=[*MODELS])
def policy(request: pytest.FixtureRequest) -> CausalLM:
    configuration, options = MODELS[request.param]
    return small(request.param, configuration, options)


def tokens(groups: list[list[Response]]) -> list[list[list[int]]]:
    return [[response.tokens for response in group] for group in groups]


def test_greedy_equals_transformers(policy: CausalLM) -> None:
    ours = policy.generate(PROMPTS, 1, Sampling(max_new_tokens=12, temperature=0))
    for prompt, (response,) in zip(PROMPTS, ours, strict=True):
        with policy.native_attention():
            theirs = policy.model.generate(
                torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=0, pad_token_id=1
            )
        assert response.tokens == theirs[0, len(prompt) :].tolist()
        assert response.finished == (response.tokens[-1] == 0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_the_training_path(policy: CausalLM, temperature: float) -> None:
    groups = policy.generate(PROMPTS, 3, Sampling(max_new_tokens=10, temperature=temperature, seed=4))
    batch = pack([Tree(p, [r.tokens for r in group]) for p, group in zip(PROMPTS, groups, strict=True)])
    sampled = torch.tensor([lp for group in groups for r in group for lp in r.logp])
    assert (policy(batch, temperature=temperature).logp[batch.branch >= 0] - sampled).abs().max() < 1e-5


def test_a_sample_does_not_depend_on_its_batch_mates(policy: CausalLM) -> None:
    sampling = Sampling(max_new_tokens=10, seed=4)
    together = tokens(policy.generate(PROMPTS, 4, sampling))
    assert tokens(policy.generate(PROMPTS, 2, sampling)) == [group[:2] for group in together]
    assert tokens(policy.generate(PROMPTS[:1], 4, sampling)) == together[:1]
    assert tokens(policy.generate(PROMPTS, 4, Sampling(max_new_tokens=10, seed=5))) != together
    assert len({tuple(t) for t in together[0]}) > 1


def test_it_stops_at_every_stop_token_and_leaves_the_mode_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = small()
    free = policy.generate(PROMPTS, 1, Sampling(max_new_tokens=12, temperature=0))
    third = free[0][0].tokens[2]
    monkeypatch.setattr(type(policy), "stop", frozenset({third}))
    policy.model.model.layers[0].eval()
    (cut,) = policy.generate(PROMPTS[:1], 1, Sampling(max_new_tokens=12, temperature=0))
    first = free[0][0].tokens.index(third)
    assert cut[0].tokens == free[0][0].tokens[: first + 1] and cut[0].finished and len(cut[0].logp) == first + 1
    assert policy.training and not policy.model.model.layers[0].training and policy.model.model.layers[1].training


def test_samples_follow_the_distribution() -> None:
    """Frequencies of the first token over 4,000 samples against the model's probabilities, within 5 standard errors."""
    policy = small()
    groups = policy.generate([[5, 9, 2]], 4000, Sampling(max_new_tokens=1, seed=1))
    with torch.no_grad(), policy.native_attention():
        p = policy.model(torch.tensor([[5, 9, 2]])).logits[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor([r.tokens[0] for r in groups[0]]), minlength=97) / 4000
    assert ((counts - p).abs() < 5 * (p * (1 - p) / 4000).sqrt() + 1e-3).all()


def test_truncation() -> None:
    logp = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert truncate(logp, 2, 1.0).exp()[0].tolist() == pytest.approx([0.625, 0.375, 0, 0])
    assert truncate(logp, 0, 0.7).exp()[0].tolist() == pytest.approx([0.625, 0.375, 0, 0])
    assert truncate(logp, 0, 0.81).exp()[0].tolist() == pytest.approx([10 / 19, 6 / 19, 3 / 19, 0])
    assert truncate(logp, 0, 1e-6).exp()[0].tolist() == [1, 0, 0, 0]
    assert truncate(logp, 3, 0.5).exp()[0].tolist() == [1, 0, 0, 0]  # 0.526 already reaches 0.5


def test_choice_inverts_the_cumulative_distribution() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for noise, token in ((0.0, 0), (0.499, 0), (0.501, 1), (0.79, 1), (0.81, 2), (0.9999999, 3)):
        chosen, logp = choose(logits, torch.tensor([noise]), Sampling())
        assert int(chosen) == token and float(logp) == pytest.approx(math.log([0.5, 0.3, 0.15, 0.05][token]))
    chosen, logp = choose(logits, torch.tensor([0.9999999]), Sampling(top_k=2))
    assert int(chosen) == 1 and float(logp) == pytest.approx(math.log(0.375))


def test_sampling_is_checked() -> None:
    for bad in ({"temperature": -1.0}, {"top_p": 0.0}, {"max_new_tokens": 0}, {"top_k": -1}):
        with pytest.raises(ValueError):
            Sampling(**bad)
    with pytest.raises(ValueError):
        small().generate([[]])
