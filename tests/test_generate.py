"""Sampling: against transformers' own greedy search, against the training path's log-probs, and its independence."""

from __future__ import annotations

import math
import random

import pytest
import torch
from small import LLAMA, small

from leyden.batch.forest import Tree, pack
from leyden.errors import UserError
from leyden.models import CausalLM
from leyden.models.attention import kv_cache
from leyden.models.attention.cached import DecodeStep
from leyden.models.attention.forest import AttentionArgs
from leyden.models.attention.kv_cache import Cache, close
from leyden.models.attention.partial import join, partial
from leyden.models.generation import decoder as decode
from leyden.models.generation import packed_weights
from leyden.models.generation.generate import generate
from leyden.models.generation.packed_weights import WORTH, _usable
from leyden.models.generation.sampling import BLOCK, choose, truncate
from leyden.policy.policy import Response, Sampling

PROMPTS = [[5, 9, 2, 40, 7], [11], [3, 3, 8], [60, 61, 62, 63, 64, 65, 66, 67, 68]]
MODELS = {
    "llama": ("LlamaConfig", None),
    "gemma3": (
        "Gemma3TextConfig",
        LLAMA | dict(head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
    ),
    "gemma2": (
        "Gemma2Config",
        LLAMA
        | dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=4, attn_logit_softcapping=3.0)
        | dict(final_logit_softcapping=8.0, layer_types=["sliding_attention", "full_attention"]),
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


def greedy(policy: CausalLM, prompt: list[int], tokens: int) -> list[int]:
    """What transformers' own search gives."""
    with policy.backbone.native_attention():
        out = policy.model.generate(
            input_ids=torch.tensor([prompt]),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=sorted(policy.stop),
            pad_token_id=1,
        )
    return out[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("rows", [64, 3])
def test_greedy_equals_transformers(policy: CausalLM, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where few rows fit, so that samples enter while others go on, and for longer than a window or a ring."""
    monkeypatch.setitem(decode.ROWS, "cpu", rows)
    ours = policy.generate(PROMPTS, 2, Sampling(max_new_tokens=45, temperature=0))
    for prompt, group in zip(PROMPTS, ours, strict=True):
        expected = greedy(policy, prompt, 45)
        for response in group:
            assert response.tokens == expected
            assert response.finished == (response.tokens[-1] in policy.stop)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_attention_of_other_devices_gives_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leyden.models.attention.partial.FUSED", None)
    policy = small(name, *MODELS[name])
    ours = policy.generate(PROMPTS, 2, Sampling(max_new_tokens=20, temperature=0))
    assert [group[1].tokens for group in ours] == [greedy(policy, prompt, 20) for prompt in PROMPTS]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", [*MODELS])
def test_on_a_gpu(name: str) -> None:
    policy, sampling = small(name, *MODELS[name]), Sampling(max_new_tokens=20, seed=4)
    expected = tokens(policy.generate(PROMPTS, 4, sampling))
    assert tokens(policy.cuda().generate(PROMPTS, 4, sampling)) == expected


@pytest.mark.skipif(not _usable(), reason="needs a processor with kernels for bfloat16")
def test_packed_weights_change_no_more_than_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    options = dict(LLAMA, hidden_size=64, intermediate_size=96, attention_bias=True)
    policy = small(options=options, dtype="bfloat16").to(torch.bfloat16)
    inside: list[str] = []
    product = decode.Decoder.run

    def run(self: decode.Decoder) -> None:
        inside.append(type(policy.model.lm_head.forward).__name__)
        product(self)

    monkeypatch.setattr(decode.Decoder, "run", run)
    sampling = Sampling(max_new_tokens=WORTH, temperature=0)
    quick = policy.generate(PROMPTS, 1, sampling)
    monkeypatch.setattr(packed_weights, "MOST", 0)
    plain = policy.generate(PROMPTS, 1, sampling)
    assert inside == ["partial", "method"] and "forward" not in policy.model.lm_head.__dict__
    for a, b in zip(quick, plain, strict=True):
        same = next((i for i, (x, y) in enumerate(zip(a[0].tokens, b[0].tokens, strict=False)) if x != y), WORTH)
        assert a[0].logp[:same] == pytest.approx(b[0].logp[:same], abs=0.1)


def test_every_row_sees_its_own_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows come and go at random while the ring turns and grows: each sees what it wrote since it began, once."""
    monkeypatch.setattr(kv_cache, "COLUMNS", 4)
    r, one = random.Random(0), torch.zeros(1, 1, 1, 1)
    cache = Cache(rows=4, prompts=1, longest=1, device=torch.device("cpu"))
    kept = cache.layer(0, one, one).own
    cache.open([1])
    live: list[list[int]] = []  # what each row wrote
    for now in range(400):
        coming = r.randint(0 if live else 1, 4 - len(live))
        cache.enter([0] * coming)
        live += [[] for _ in range(coming)]
        step = DecodeStep(cache)
        for row, wrote in enumerate(live):
            wrote.append(1000 * row + now)
            kept[0][row, 0, cache.at, 0] = wrote[-1]
        _, hidden = step.masks(None)
        for row, wrote in enumerate(live):
            seen = kept[0][row, 0, step.seen, 0]
            seen = seen if hidden is None else seen[hidden[row, 0, 0] == 0]
            assert sorted(seen.tolist()) == sorted(wrote)
        gone = [row for row in range(len(live)) if r.random() < (0.3 if now < 200 else 0.05)]
        cache.leave(gone)
        close(live, gone)
    assert cache.columns >= 32


def test_an_adapter_takes_part() -> None:
    from peft import LoraConfig, get_peft_model

    policy = small()
    before = policy.generate(PROMPTS, 1, Sampling(max_new_tokens=12, temperature=0))
    policy.model = get_peft_model(policy.model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5))
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    after = policy.generate(PROMPTS, 1, Sampling(max_new_tokens=12, temperature=0))
    assert tokens(after) != tokens(before) and policy.training
    policy.eval()
    assert [group[0].tokens for group in after] == [greedy(policy, prompt, 12) for prompt in PROMPTS]


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


@pytest.mark.parametrize("rows", [3])
def test_a_sample_does_not_depend_on_who_is_decoded_beside_it(
    policy: CausalLM, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = Sampling(max_new_tokens=14, seed=4)
    together = policy.generate(PROMPTS, 4, sampling)
    monkeypatch.setitem(decode.ROWS, "cpu", rows)
    apart = policy.generate(PROMPTS, 4, sampling)
    assert tokens(apart) == tokens(together)
    assert [r.logp for group in apart for r in group] == [
        pytest.approx(r.logp, abs=1e-4) for group in together for r in group
    ]


def test_keys_name_the_noise() -> None:
    policy, sampling = small(), Sampling(max_new_tokens=10, seed=4)
    together = tokens(policy.generate(PROMPTS, 2, sampling))
    order, keys = [2, 0, 3], [2, 0, 3]
    assert tokens(policy.generate([PROMPTS[i] for i in order], 2, sampling, keys)) == [together[i] for i in order]
    same = tokens(policy.generate([PROMPTS[0]] * 3, 1, sampling, [7, 8, 7]))
    assert same[0] == same[2] != same[1]
    with pytest.raises(ValueError, match="4 prompts but 1 keys"):
        policy.generate(PROMPTS, 1, sampling, [0])


def test_progress_is_told(policy: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(decode.ROWS, "cpu", 4)
    told: list[int] = []
    generate(policy, policy.backbone, PROMPTS, 3, Sampling(max_new_tokens=8), on_progress=told.append)
    assert sum(told) == 12 and len(told) > 1


def test_every_prompt_has_its_own_room() -> None:
    """The model has 64 positions: a long prompt is cut short, and a short one beside it is not."""
    policy = small(options=LLAMA | {"vocab_size": 97})
    long, short = policy.generate([[5] * 60, [9]], 1, Sampling(max_new_tokens=50, temperature=0))
    assert len(long[0].tokens) == 4 and (short[0].finished or len(short[0].tokens) == 50)


def test_logits_that_are_no_numbers_are_told() -> None:
    policy = small()
    with torch.no_grad():
        policy.model.lm_head.weight[5] = float("nan")
    for temperature in (0.0, 1.0):
        with pytest.raises(UserError, match="not? finite numbers.*learning rate"):
            policy.generate(PROMPTS, 2, Sampling(max_new_tokens=4, temperature=temperature))


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
    with torch.no_grad(), policy.backbone.native_attention():
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


def test_a_large_vocabulary_is_searched_in_blocks() -> None:
    """The chosen token is the first whose cumulative probability exceeds the noise, and padding is never chosen."""
    torch.manual_seed(0)
    size = 3 * BLOCK + 17
    logits = torch.randn(50, size) * 3
    logits[:, 2 * BLOCK :] = float("-inf")
    logits[1:, -1] = 2.0
    noise = torch.rand(50, dtype=torch.float64)
    noise[:4] = torch.tensor([1 - 2**-53, 1 - 2**-53, 0.0, 0.5])
    token, logp = choose(logits, noise, Sampling())
    p = logits.double().softmax(-1)
    upto = p.cumsum(-1)
    picked = token[:, None]
    assert int(token[0]) < 2 * BLOCK and int(token[1]) == size - 1
    assert bool((upto.gather(-1, picked)[:, 0] > noise - 1e-6).all())
    assert bool(((upto - p).gather(-1, picked)[:, 0] <= noise + 1e-6).all())
    torch.testing.assert_close(logp, p.gather(-1, picked)[:, 0].log().float())


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_over_parts_is_attention_over_all(softcap: float | None) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, length, 8) for length in (4, 9, 9))
    mask = torch.zeros(2, 1, 4, 9).masked_fill(torch.rand(2, 1, 4, 9) < 0.3, -1e9)
    mask[0, 0, 0, :5] = -1e9  # nothing to see in the first part
    ask = AttentionArgs(0.3, softcap=softcap)
    parts = [partial(query, (key[:, :, s], value[:, :, s]), mask[..., s], ask) for s in (slice(0, 5), slice(5, 9))]
    whole, lse = partial(query, (key, value), mask, ask)
    scores = query @ key.mT * 0.3
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    torch.testing.assert_close(whole, (scores + mask).softmax(-1) @ value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, (scores + mask).logsumexp(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(join(*parts), whole, rtol=1e-4, atol=1e-5)


def test_places_close_without_a_gap() -> None:
    for gone, left in (([1, 4], [0, 3, 2]), ([0, 1], [3, 4, 2]), ([3, 4], [0, 1, 2]), ([0, 1, 2, 3, 4], [])):
        items = [*range(5)]
        close(items, gone)
        assert items == left


def test_sampling_is_checked() -> None:
    for bad in ({"temperature": -1.0}, {"top_p": 0.0}, {"max_new_tokens": 0}, {"top_k": -1}):
        with pytest.raises(ValueError):
            Sampling(**bad)
    with pytest.raises(ValueError):
        small().generate([[]])
