"""Decode steps of fixed shapes: the samples and log-probs of the plain decoder, in every size of columns."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch
from test_generate import MODELS, PROMPTS, small, tokens

from leyden.models import CausalLM
from leyden.models.attention.kv_cache import close
from leyden.models.attention.static import StaticCache
from leyden.models.generation import decoder, generate, static_decoder
from leyden.models.generation.static_decoder import StaticDecoder
from leyden.policy.policy import Response, Sampling

NAMES = [name for name in MODELS if name != "mamba"]
WAYS = {
    "greedy": Sampling(max_new_tokens=45, temperature=0),
    "plain": Sampling(max_new_tokens=20, seed=4),
    "truncated": Sampling(max_new_tokens=20, seed=4, temperature=0.7, top_p=0.8, top_k=30),
}


@cache
def made(name: str) -> CausalLM:
    return small(name, *MODELS[name])


def both(
    policy: CausalLM, monkeypatch: pytest.MonkeyPatch, n: int, sampling: Sampling
) -> tuple[list[list[Response]], list[list[Response]]]:
    """The plain decoder's responses, and those of fixed shapes."""
    plain = policy.generate(PROMPTS, n, sampling)
    monkeypatch.setattr(generate, "STATIC", {"cpu"})
    return plain, policy.generate(PROMPTS, n, sampling)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("rows", "columns"), [(64, 128), (3, 8)])
@pytest.mark.parametrize("name", NAMES)
def test_samples_are_those_of_the_plain_decoder(
    name: str, rows: int, columns: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With windows and soft caps, few rows that are refilled, and columns that grow while rows are there."""
    monkeypatch.setitem(decoder.ROWS, "cpu", rows)
    monkeypatch.setattr(static_decoder, "COLUMNS", columns)
    plain, fixed = both(made(name), monkeypatch, 4, WAYS[way])
    assert tokens(fixed) == tokens(plain)
    for a, b in zip(plain, fixed, strict=True):
        for x, y in zip(a, b, strict=True):
            assert y.logp == pytest.approx(x.logp, abs=1e-5) and (x.finished, x.text) == (y.finished, y.text)


def test_noise_is_that_of_the_plain_decoder_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches the choice of each sample's k-th token."""
    policy = small()
    heard: dict[int, list[float]] = {}
    monkeypatch.setattr(type(policy), "stop", frozenset())
    seen: list[torch.Tensor] = []
    choose = decoder.choose
    monkeypatch.setattr(
        decoder, "choose", lambda logits, noise, s: (seen.append(noise.clone()), choose(logits, noise, s))[1]
    )
    monkeypatch.setattr(generate, "STATIC", {"cpu"})
    policy.generate(PROMPTS, 2, Sampling(max_new_tokens=11, seed=9))
    for step in seen:
        for place, x in enumerate(step.tolist()):
            heard.setdefault(place, []).append(x)
    drawn = set()
    for key in range(len(PROMPTS)):
        for k in range(2):
            source = random.Random(f"9/{key}/{k}")
            drawn.add(tuple(source.random() for _ in range(11)))
    first = seen[0].tolist()
    later = {tuple(values[1:]) for values in heard.values()}
    assert {values[1:] for values in drawn} == later and sorted(values[0] for values in drawn) == sorted(first)


def test_rows_and_prompts_keep_their_places() -> None:
    """Rows and prompts come and go at random: what the device is told is the assignment that a list would give."""
    r, cache = random.Random(0), StaticCache(6, 4, 3, 10, 32, torch.device("cpu"))
    prompts: list[int] = []  # length of each
    rows: list[tuple[int, int]] = []  # number of each row, and the length of its prompt
    for number in range(300):
        free = [i for i in range(len(prompts)) if cache.owner.count(i) < 3]
        if len(prompts) < 4 and r.random() < 0.5:
            length = r.randint(1, 10)
            (place,) = cache.open([length])
            assert place in range(4) and len(set(cache.prompt_place)) == len(cache.prompt_place)
            prompts.append(length)
        elif len(rows) < 6 and free:
            of = r.choice(free)
            cache.enter([of])
            rows.append((number, prompts[of]))
        elif rows:
            gone = [r.randrange(len(rows))]
            cache.leave(gone)
            close(rows, gone)
            empty = [i for i in range(len(prompts)) if i not in cache.owner]
            cache.forget(empty)
            close(prompts, empty)
        cache.arrange([(one, 0, 7) for one, _ in rows])
        plan = cache.plan
        for place, (one, length) in zip(cache.row_place, rows, strict=True):
            assert int(plan.tokens[place]) == one and int(plan.age[place]) == 7
            in_layout = int(plan.back[place])
            assert int(plan.there[in_layout]) == place
            assert int(plan.lengths[in_layout // plan.most]) == length
        assert len(set(plan.back[cache.row_place].tolist())) == len(rows)


def test_every_token_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that waits for tokens gets each before the next is sampled."""
    monkeypatch.setattr(generate, "STATIC", {"cpu"})
    policy, steps, told = small(), [0], list[int]()
    advance = StaticDecoder._advance

    def counted(self: StaticDecoder, columns: int) -> None:
        steps[0] += 1
        advance(self, columns)

    monkeypatch.setattr(StaticDecoder, "_advance", counted)
    policy.generate(PROMPTS[:1], 1, Sampling(max_new_tokens=6), on_token=lambda i, k, token: told.append(steps[0]))
    assert told == [*range(len(told))]


def test_positions_end_where_the_model_has_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that compute along after their end do not reach past learned positions."""
    monkeypatch.setattr(generate, "STATIC", {"cpu"})
    policy = small("gpt2", *MODELS["gpt2"])
    long, short = policy.generate([[5] * 60, [9]], 1, Sampling(max_new_tokens=50, temperature=0))
    assert len(long[0].tokens) == 4 and (short[0].finished or len(short[0].tokens) == 50)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", NAMES)
def test_graphs_are_recorded_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, sampling, decoders = small(name, *MODELS[name]), Sampling(max_new_tokens=40, seed=4), list[StaticDecoder]()
    expected = policy.generate(PROMPTS, 4, sampling)
    run = StaticDecoder.run
    monkeypatch.setattr(StaticDecoder, "run", lambda self: (decoders.append(self), run(self))[1])
    monkeypatch.setattr(static_decoder, "COLUMNS", 16)
    monkeypatch.setitem(decoder.ROWS, "cuda", 5)
    ours = policy.cuda().generate(PROMPTS, 4, sampling)
    assert decoders[0].records and len(decoders[0].graphs) >= 2
    assert tokens(ours) == tokens(expected)
    torch.cuda.synchronize()
    assert torch.randn(3, device="cuda").isfinite().all()  # the generator is left as it was
