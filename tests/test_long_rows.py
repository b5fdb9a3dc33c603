"""Rows of 32,768 tokens by shape: no tensor of a training step grows with the square of the row.

Most steps here are run on fake tensors, which have shapes and no values, so that the sizes are those of a real run.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small import LLAMA, TreeData, fit, small
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from leyden.algos import DPO, SFT, RewardModel
from leyden.batch.forest import Batch, Tree, pack
from leyden.models import CausalLM, causal_lm, logprobs
from leyden.models.attention import segments, varlen
from leyden.models.attention.dispatch import FOREST
from leyden.models.attention.flex import block_mask
from leyden.models.attention.forest import Forest
from leyden.models.backbone import Backbone
from leyden.models.load import enable_checkpointing

TOKENS = 32768
WIDTH, VOCABULARY = 64, 32000
ROWS = {
    "pair": lambda tokens: [Tree([1] * (tokens // 2), [[2] * (tokens // 4)] * 2)],
    "one": lambda tokens: [Tree([1] * 8, [[2] * (tokens - 8)])],
    "many": lambda tokens: [Tree([1] * (tokens // 2), [[2] * (tokens // 128)] * 64)],
    "trees": lambda tokens: [Tree([1] * (tokens // 16), [[2] * (tokens // 32)] * 2)] * 8,
}
"""Kinds of rows: a prompt with two responses, one response, many responses, and several prompts."""
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


class Sizes(TorchDispatchMode):
    """Bytes of the largest tensor that is made, and the most that live at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.what, self.live, self.peak = 0, "", 0, 0
        self.seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            storage = x.untyped_storage() if isinstance(x, Tensor) else None
            if storage is None or storage in self.seen:
                continue
            self.seen[storage] = size = storage.nbytes()
            if size > self.largest:
                self.largest, self.what = size, f"{func} {list(x.shape)}"
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._gone, size)
        return out

    def _gone(self, size: int) -> None:
        self.live -= size


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An attention that a CPU would refuse, taken for granted, and a head in several chunks."""
    monkeypatch.setattr(Backbone, "backend", lambda self, device: request.param)
    monkeypatch.setitem(logprobs.BLOCK_BYTES, "cpu", 64 << 20)
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", 32 << 20)
    monkeypatch.setattr(segments, "BLOCK", 1 << 22)  # fewer blocks, which take most of the time here
    return str(request.param)


def step(batch: Batch, monkeypatch: pytest.MonkeyPatch, window: int | None = None) -> Sizes:
    """Forward and backward of a policy of one layer on fake tensors."""
    options: dict[str, Any] = LLAMA | dict(hidden_size=WIDTH, num_hidden_layers=1, vocab_size=VOCABULARY)
    options |= dict(num_attention_heads=2, num_key_value_heads=1)
    config = LlamaConfig(**options) if window is None else MistralConfig(**options, sliding_window=window)
    at, _ = causal_lm.predicted(batch)
    policy = CausalLM("fake", dtype="bfloat16", gradient_checkpointing=True)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        policy.model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        policy.model.set_attn_implementation(FOREST)
        enable_checkpointing(policy.path, policy.backbone.base)
        policy.train()
        monkeypatch.setattr(causal_lm, "predicted", lambda batch: (fake.from_tensor(at), 1.0))  # how many has no shape
        with Sizes() as sizes:
            policy(batch._map(fake.from_tensor)).logp.sum().backward()
    assert all(p.grad is not None for p in policy.parameters())
    return sizes


def bound(tokens: int) -> int:
    """Bytes that no tensor of a step may exceed: a few hundred a token, or what is constant: a chunk of logits as
    fp32, the gradient of the head, the largest mask."""
    return max(512 * tokens, 2 * logprobs.CHUNK_BYTES, 4 * VOCABULARY * WIDTH, 4 * segments.MASK)


@pytest.mark.parametrize(
    ("backend", "kind", "window"),
    [("varlen", kind, None) for kind in ("pair", "one", "trees")]
    + [("varlen", "pair", 4096), ("segments", "pair", None), ("segments", "one", None), ("segments", "many", 1024)],
    indirect=["backend"],
)
def test_no_tensor_of_a_step_is_quadratic(
    backend: str, kind: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = step(pack(ROWS[kind](TOKENS)), monkeypatch, window)
    assert sizes.largest <= bound(TOKENS) < TOKENS * TOKENS // 4, sizes.what
    assert sizes.peak < 6 * bound(TOKENS)


@pytest.mark.parametrize("backend", ["varlen"], indirect=True)
def test_a_mask_of_the_row_or_all_logits_would_be_seen(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    most = bound(TOKENS)
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", 1 << 40)
    assert step(pack(ROWS["one"](TOKENS)), monkeypatch).largest == 2 * VOCABULARY * (TOKENS - 8) > most
    monkeypatch.setattr(Backbone, "backend", lambda self, device: "dense")
    assert step(pack([Tree([1] * (TOKENS - 1), [[2]])]), monkeypatch).largest >= TOKENS * TOKENS > most


@pytest.mark.parametrize("kind", ROWS)
def test_structures_of_the_back_ends(kind: str) -> None:
    """The gathered keys of `varlen` are every response's own and its prompt's; the block mask of `flex` has one entry
    for 128 x 128 pairs of tokens."""
    batch = pack(ROWS[kind](TOKENS))
    responses = max(len(span.responses) for span in batch.structure())
    with Sizes() as sizes:
        plan = varlen.layout(Forest(batch, "varlen"))
    assert plan.source is None or len(plan.source) <= responses * len(batch)
    assert sizes.largest <= 8 * responses * len(batch)
    with Sizes() as sizes:
        block_mask(batch.end.int(), batch.position.int(), 512)
    assert sizes.largest <= 8 * (TOKENS // 128) ** 2 < 20 * TOKENS


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks in proportion to rows of some hundred tokens."""
    for module, name, size in (
        (segments, "BLOCK", 1 << 9),
        (segments, "MASK", 1 << 9),
        (segments, "KEPT", 1 << 8),
        (logprobs, "CHUNK_BYTES", 1 << 14),
    ):
        monkeypatch.setattr(module, name, size)
    yield


@pytest.mark.parametrize(("algorithm", "kind"), [(SFT, "one"), (DPO, "pair"), (DPO, "many"), (RewardModel, "pair")])
def test_a_step_of_an_algorithm_is_linear(algorithm: Any, kind: str, small_blocks: None) -> None:
    """A real run on twice the row makes tensors of twice the size at most, and needs twice the memory."""
    found = []
    for tokens in (512, 1024):
        policy = small(options=LLAMA | {"max_position_embeddings": 2048}, gradient_checkpointing=True)
        trees = ROWS[kind](tokens)
        if kind == "one":
            trees[0].weights = [[1.0] * len(trees[0].responses[0])]
        with Sizes() as sizes:
            fit(algorithm(policy), TreeData(trees, batch_size=len(trees), max_tokens=2 * tokens))
        found.append(sizes)
    few, many = found
    assert many.largest < 2.2 * few.largest, (few.what, many.what)
    assert many.peak < 2.2 * few.peak and many.largest < 1024 * 1024
