"""Checks of a model when it is built, by forward passes over a handful of tokens.

Some assumptions would fail silently: that the head on hidden states gives the model's own logits (Cohere, Granite and
Gemma 2 scale or cap them); that the forest's mask reaches every layer (recurrent and linear attention mix all tokens of
a row), with the layer's window; that the KV cache of sampling holds what a layer attends to; that no token sees later
ones. Closeness alone proves none of this, since what leaks may be small at first and grow with training. So a leak is
looked for in gradients, where no leak is exactly zero, and windows are made so short that a few tokens cross them.
That every token has an embedding is read from the tokenizer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from leyden.batch.forest import Batch, Tree, pack
from leyden.data.tokenizer import beyond_embeddings
from leyden.errors import UserError
from leyden.models.attention.cached import DecodeStep, Prefill
from leyden.models.attention.kv_cache import Cache, close
from leyden.models.backbone import Backbone
from leyden.run.flops import experts

SHORT = 3
"""Sliding window of the probes, in tokens"""
AMPLIFIED = 1e4
"""Factor on the head's output in `check_head`. A cap hardly changes the small logits of an untrained model."""

UNFIT = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)
"""What a model raises that does not take what it is given."""

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_vocabulary(path: str, tokenizer: PreTrainedTokenizerBase, embeddings: int, stop: Collection[int]) -> None:
    """That the model has an embedding for the tokens that text is made of, and for those that end an answer. Added
    tokens that no text uses may lie beyond (the image token of the smallest Gemma 3).

    Raises:
        UserError: it has none.
    """
    if tokenizer.vocab_size > embeddings:
        raise UserError(
            f"{path}: the tokenizer knows {tokenizer.vocab_size} tokens but the model only {embeddings}; use the "
            "tokenizer that belongs to the model"
        )
    if (last := max(stop, default=0)) >= embeddings:
        raise UserError(f"{path}: answers end with {beyond_embeddings(tokenizer, last, embeddings)}")


def probe_trees(vocabulary: int) -> list[Tree]:
    """Two trees with shared prompts, small enough that even the largest model runs them in a moment."""
    ids = [(7 * i * i + 3 * i + 5) % vocabulary for i in range(17)]
    return [Tree(ids[:5], [ids[5:7], ids[7:11]]), Tree(ids[11:14], [ids[14:17]])]


def _distance(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-6))


@torch.no_grad()
def check_head(backbone: Backbone, tolerance: float) -> None:
    """Compare the logits of `Backbone` with the model's own.

    Raises:
        UserError: they differ, so log-probabilities would be wrong.
    """
    base, head = backbone.base, backbone.head
    tokens = torch.tensor([[5, 17, 3, 11]], device=backbone.device) % backbone.config.vocab_size
    try:
        ours = head(backbone.body(input_ids=tokens, use_cache=False).last_hidden_state)
        factor = AMPLIFIED / float(ours.abs().max().clamp_min(1e-6))
        hook = head.register_forward_hook(lambda module, args, out: out * factor)
        try:
            logits = base(input_ids=tokens, use_cache=False).logits
        finally:
            hook.remove()
        known = _distance(backbone.squash(ours * factor), logits) <= tolerance
    except torch.OutOfMemoryError:
        raise
    except UNFIT:  # another module stands between the two
        known = False
    if not known:
        _check_runs(backbone, tokens)
        raise UserError(
            f"{backbone.path}: the logits of {type(base).__name__} are not its head on its hidden states, by a rule "
            "that is not known here; use another model"
        )


def _check_runs(backbone: Backbone, tokens: Tensor) -> None:
    """That the model runs on token ids [1, T] at all."""
    try:
        backbone.base(input_ids=tokens, use_cache=False)
    except UNFIT as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{backbone.path}: {type(backbone.base).__name__} does not run on tokens alone ({reason}); "
            "use another model"
        ) from error


def takes_forest(backbone: Backbone, tolerance: float) -> bool:
    """Whether packed forests, in training and in sampling, give the hidden states of separate rows, and nothing leaks
    from one response or tree into another."""
    trees = probe_trees(backbone.config.vocab_size)
    batch = pack(trees).to(backbone.device)
    try:
        with short_windows(backbone):
            with torch.no_grad():
                expected = backbone.hidden_by_rows(batch)
                own = torch.cat([expected[i:j] for span in batch.structure() for _, i, j in span.responses])
                close_by = [_distance(backbone.hidden(batch), expected), _distance(decoded(backbone, trees), own)]
            return all(apart <= tolerance for apart in close_by) and not leaks(backbone, batch)
    except UNFIT:
        return False  # the keyword or the mask did not reach the layers


def cautions(backbone: Backbone) -> tuple[str, ...]:
    """What training this model does otherwise than one may expect; see `Policy.cautions`."""
    lines, longest = [], getattr(backbone.config, "max_position_embeddings", None)
    if (limit := backbone.rope_limit) is not None and limit < (longest or limit + 1):
        lines.append(
            f"{backbone.path}: no row may be longer than {limit:,} tokens, beyond which its rotary frequencies "
            "(longrope) would depend on the longest row of a batch"
        )
    routed = experts(backbone.config)
    if routed is not None and not backbone.adapted:
        lines.append(
            f"{backbone.path}: its router chooses among {routed[0]} experts and is trained without the auxiliary loss "
            "that balances them; with an adapter (--config lora) the router stays as it is"
        )
    return tuple(lines)


@contextmanager
def short_windows(backbone: Backbone) -> Iterator[None]:
    """Shorten all sliding windows and chunks of attention to `SHORT` tokens, so that a few tokens cross them."""
    modules = list(backbone.body.modules())
    configs = {id(c): c for m in modules if (c := getattr(m, "config", None)) is not None}
    kept = [
        (owner, name, value)
        for owner in (*({id(backbone.config): backbone.config} | configs).values(), *modules)
        for name, value in vars(owner).items()
        if ("window" in name or name == "attention_chunk_size") and name != "max_window_layers"
        if type(value) is int and value > SHORT
    ]
    try:
        for owner, name, _ in kept:
            setattr(owner, name, SHORT)
        yield
    finally:
        for owner, name, value in kept:
            setattr(owner, name, value)


def leaks(backbone: Backbone, batch: Batch) -> bool:
    """Whether a hidden state of a packed forest depends on a token that its own token does not see.

    The gradient of a hidden state in the embedding of an unseen token is exactly zero, however small a leak would be.
    Two sums of hidden states cover all pairs of responses, trees, and earlier and later tokens of a response.
    """
    found: list[Tensor] = []

    def watch(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        found.append(out.detach().requires_grad_())
        return found[-1]

    hook = backbone.base.get_input_embeddings().register_forward_hook(watch)
    try:
        with torch.enable_grad():
            hidden = backbone.hidden(batch)
    finally:
        hook.remove()
    direction = torch.linspace(1, 9, hidden.shape[1], device=hidden.device).sin().to(hidden.dtype)
    one, other = batch.structure()
    (_, _, first_stop), (_, second, _) = one.responses
    seen = batch.mask
    for queries in ([first_stop - 1, other.cut - 1], [second, other.stop - 1]):
        (gradient,) = torch.autograd.grad((hidden[queries] @ direction).sum(), found, retain_graph=True)
        depends = (gradient[0] != 0).any(-1)
        if bool((depends & ~seen[queries].any(0)).any()) or not bool(depends[batch.parent[queries]].all()):
            return True
    return False


def decoded(backbone: Backbone, trees: list[Tree]) -> Tensor:
    """Hidden states of all tokens of the responses, one decode step after another with the KV cache: [R, H]."""
    device = backbone.device
    cache = Cache(sum(len(tree.responses) for tree in trees), len(trees), max(len(t.prompt) for t in trees), device)

    def run(tokens: Tensor, position: Tensor, forest: Prefill | DecodeStep) -> Tensor:
        out = backbone.body(input_ids=tokens[None], position_ids=position[None], use_cache=False, forest=forest)
        return out.last_hidden_state[0]  # type: ignore[no-any-return]

    prompts = pack([Tree(tree.prompt, []) for tree in trees]).to(device)
    run(prompts.tokens, prompts.position, Prefill(prompts, backbone.backend(device), cache))
    rows = [
        (i, len(tree.prompt), response, list[Tensor]()) for i, tree in enumerate(trees) for response in tree.responses
    ]
    live = rows[:]
    cache.enter([i for i, *_ in live])
    while live:
        newest = [(response[len(states)], before + len(states)) for _, before, response, states in live]
        tokens, position = torch.tensor(newest, device=device).T
        hidden = run(tokens, position, DecodeStep(cache))
        for (*_, states), state in zip(live, hidden, strict=True):
            states.append(state)
        gone = [place for place, (_, _, response, states) in enumerate(live) if len(states) == len(response)]
        cache.leave(gone)
        close(live, gone)
    return torch.stack([state for *_, states in rows for state in states])


@torch.no_grad()
def check_rows(backbone: Backbone, tolerance: float) -> None:
    """Compare a padded row with the same row alone, and with one that ends otherwise; run one in training mode.

    Raises:
        UserError: they differ where they should not: the model is not causal, or mixes the rows of a batch. Or it
            trains on rows of a fixed length alone (Reformer).
    """
    trees = probe_trees(backbone.config.vocab_size)
    first = Tree(trees[0].prompt, trees[0].responses[:1])

    def hidden(trees: list[Tree]) -> Tensor:
        return backbone.hidden_by_rows(pack(trees).to(backbone.device))[: len(first)]

    expected, alone = hidden(trees), hidden([first])
    changed = hidden([Tree(first.prompt, [[*first.responses[0][:-1], first.prompt[0]]])])
    name = type(backbone.base).__name__
    if not _distance(changed[:-1], alone[:-1]) <= tolerance:
        raise UserError(f"{backbone.path}: {name} is not causal here: its tokens see later ones; use another model")
    if not _distance(alone, expected) <= tolerance:
        raise UserError(f"{backbone.path}: {name} mixes the rows of a batch; use another model")
    backbone.base.train()
    try:
        with torch.random.fork_rng(devices=[]):
            hidden([first])
    except UNFIT as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{backbone.path}: {name} cannot be trained on rows of any length ({reason})") from error
    finally:
        backbone.base.eval()
