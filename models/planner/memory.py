"""How many bytes training holds: numbers in, bytes out.

Activations are what autograd keeps of transformers' decoder layers for the backward pass, tensor by tensor; a test
counts the same in real models. All other formulas say where they come from. T tokens in a micro-batch, h the width of
hidden states, q and k those of all query heads and of all key heads together, f that of the MLP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from leyden.models.attention.kv_cache import COLUMNS
from leyden.models.logprobs import BLOCK_BYTES, CHUNK_BYTES

STATES = {
    **dict.fromkeys(("AdamW", "Adam", "NAdam", "RAdam", "Adamax", "AdamW32bit", "PagedAdamW", "PagedAdamW32bit"), 2),
    **dict.fromkeys(("AdamW8bit", "Adam8bit", "PagedAdamW8bit", "PagedAdam8bit"), 2),
    **dict.fromkeys(("Lion", "Lion8bit", "PagedLion8bit", "RMSprop", "Adagrad", "Muon"), 1),
    **dict.fromkeys(("SGD", "Adafactor"), 0),
}
"""Numbers that an optimizer keeps of every trained parameter, beside a few per matrix. SGD has one with momentum."""
HALF = 2
"""Bytes of a number in bfloat16 or float16."""
FLOAT = 4
"""Bytes of a number in float32, in which adapters and new heads are."""


@dataclass(frozen=True)
class Shape:
    """What a model is made of."""

    layers: int
    hidden: int
    """h"""
    query: int
    """q"""
    key: int
    """k"""
    inner: int
    """f"""
    gated: bool
    """The MLP multiplies two products, gate and up"""
    norms: int
    """Widths of a layer's norms of hidden states, added up"""
    head_norms: int
    """Those of norms of queries and keys"""
    factors: int
    """Numbers that these norms divide a token by: one each, and one for each head"""
    vocabulary: int
    linear: int
    """Parameters of the linear layers of the body"""
    largest: int
    """Those of the largest of them"""


@dataclass(frozen=True)
class Kept:
    """Which inputs of a layer's linear layers the backward pass needs: those of layers that are trained, or adapted."""

    attention: int = 3
    """How many read the hidden states that attention starts from"""
    output: int = 1
    """1 if attention's last one is among them"""
    mlp: int = 2
    down: int = 1
    norms: bool = True
    """Norms are trained"""
    ranks: int = 0
    """Ranks of a layer's adapters, added up; 0 is without adapters"""
    dropout: bool = False
    """Adapters have dropout"""


@dataclass(frozen=True)
class Arithmetic:
    """How weights are stored and computed with."""

    weight: int = FLOAT
    """Bytes of a weight that is not quantised, and of the hidden states"""
    autocast: bool = False
    """Products are computed in half precision"""
    quantised: bool = False
    cuda: bool = False

    @property
    def product(self) -> int:
        """Bytes of what attention and the language-model head compute in."""
        return HALF if self.autocast else self.weight

    @property
    def result(self) -> int:
        """Bytes of what a linear layer gives back; one in four bits gives back what it got."""
        return self.weight if self.quantised else self.product


def quantised(parameters: int, double: bool = True) -> float:
    """Four bits and a scale for each block of 64: fp32, or 8 bits and an fp32 scale of 256 of them (Dettmers et al.
    2023, section 3): 4.5 or 4.127 bits a parameter."""
    scale = 8 / 64 + 32 / (64 * 256) if double else 32 / 64
    return parameters * (4 + scale) / 8


def optimizer(name: str, parameters: int, size: int, momentum: bool = False) -> float:
    """State of an optimizer for parameters of `size` bytes each, in whose dtype torch keeps it. bitsandbytes keeps a
    byte a number and an fp32 scale for each block of 256, or fp32 (its `create_state` functions)."""
    states = 1 if name == "SGD" and momentum else STATES.get(name, 2)
    if name.endswith("8bit"):
        size_of_one = 1 + FLOAT / 256
    elif name.startswith("Paged") or name.endswith("32bit"):
        size_of_one = float(FLOAT)
    else:
        size_of_one = float(size)
    return states * parameters * size_of_one


def step(parameters: int, largest: int, size: int, in_place: bool, cuda: bool) -> int:
    """What an optimizer step works with: on a GPU torch takes the square roots of all second moments at once (its
    `_multi_tensor_adamw`), on a processor those of one parameter, and divides. A fused step is in place."""
    if in_place:
        return 0
    return size * (parameters if cuda else 2 * largest)


def layer(shape: Shape, kept: Kept, how: Arithmetic) -> int:
    """Bytes that autograd keeps of a token in one layer.

    A norm keeps its input in fp32, its factor, and if it is trained the normalised input. Attention keeps
    q, k, v and its output. A gated MLP keeps gate, silu(gate), up and their product, another one only what its
    activation function reads and gives. Linear layers keep their inputs where `Kept` says so, and adapters what they
    reduce them to.
    """
    h, q, k, f, result = shape.hidden, shape.query, shape.key, shape.inner, how.result
    attended = how.product if how.autocast else result
    norms = FLOAT * (shape.norms + shape.head_norms + shape.factors)
    norms += (how.weight * shape.norms + attended * shape.head_norms) * int(kept.norms)
    products = attended * (2 * q + 2 * k) + result * f * (3 if shape.gated else 1)
    reduced = kept.ranks * (HALF if how.autocast else FLOAT)
    inputs = (
        _input(h, kept.attention, how.weight, kept, how)
        + _input(h, kept.mlp, how.weight, kept, how)
        + _input(q, kept.output, attended, kept, how, held=True)
        + _input(f, kept.down, result, kept, how)
    )
    return norms + products + reduced + inputs


def _input(width: int, readers: int, size: int, kept: Kept, how: Arithmetic, held: bool = False) -> int:
    """What is kept of an input of this width and of `size` bytes a number that so many linear layers read.

    They share it unless it is converted: autocast, and adapters (to fp32; PEFT's on 4-bit layers only where autocast
    is not for GPUs), make a copy for each. `held`: it is kept anyway.
    """
    adapted = kept.ranks > 0
    between = FLOAT if adapted and not (how.quantised and how.autocast and how.cuda) else size
    last = HALF if how.autocast else between if adapted else how.weight
    if not readers:
        return 0
    if kept.dropout and adapted:
        return width * readers * (last + 1)  # what is left of it, and a mask
    if not size == between == last:
        return width * readers * last
    return 0 if held else width * size


def activations(tokens: int, shape: Shape, kept: Kept, how: Arithmetic, checkpointing: bool) -> int:
    """What the forward pass of a micro-batch leaves for the backward pass, without logits.

    With checkpointing it is the input of every layer. Autocast keeps half-precision copies of fp32 weights: of trained
    ones until the forward pass ends, of frozen ones with their layer.
    """
    h = shape.hidden
    body = how.weight * h if checkpointing else layer(shape, kept, how)
    top = h * (FLOAT + (how.weight if kept.norms else 0) + 2 * how.weight)  # the last norm, and the states that predict
    copies = how.autocast and how.weight == FLOAT and not how.quantised and not (checkpointing and kept.ranks)
    return tokens * (shape.layers * body + top) + HALF * shape.linear * int(copies)


def passing(tokens: int, shape: Shape, kept: Kept, how: Arithmetic, checkpointing: bool) -> int:
    """What the backward pass of a layer works with beside what was kept: gradients of the MLP's two halves and of
    hidden states, twice each, and 4-bit weights as they are multiplied with. With checkpointing also all that its
    forward pass, which is run again, leaves."""
    again = layer(shape, kept, how) if checkpointing else 0
    return tokens * (again + 2 * how.result * shape.inner + 2 * how.weight * shape.hidden) + unpacked(shape, how)


def unpacked(shape: Shape, how: Arithmetic) -> int:
    """The largest of the 4-bit weights as a matrix to multiply with."""
    return shape.largest * (how.weight + (HALF if how.autocast and how.weight == FLOAT else 0)) * int(how.quantised)


def forward(tokens: int, shape: Shape, how: Arithmetic) -> int:
    """What a forward pass without gradients works with, logits apart: hidden states and, in the MLP, gate, up and
    their product, or in a norm two fp32 copies."""
    mlp = (3 if shape.gated else 2) * how.result * shape.inner + how.product * shape.hidden
    return tokens * (how.weight * shape.hidden + max(mlp, 2 * FLOAT * shape.hidden)) + unpacked(shape, how)


def logits(predicted: int, shape: Shape, how: Arithmetic) -> int:
    """The language-model head on so many states: one chunk of logits, fp32 blocks of it that are worked on, and its
    weights where autocast casts them (see `leyden.models.logprobs`)."""
    chunk = min(predicted * shape.vocabulary * how.product, max(CHUNK_BYTES, shape.vocabulary * how.product))
    block = 64 << 20 if how.cuda else BLOCK_BYTES["cpu"]
    cast = HALF * shape.vocabulary * shape.hidden if how.autocast and how.weight == FLOAT else 0
    return chunk + 2 * min(block, FLOAT * predicted * shape.vocabulary) + cast


def token_cache(shape: Shape, how: Arithmetic) -> int:
    """Keys and values of one token in all layers, in the dtype that attention is computed in."""
    return shape.layers * 2 * shape.key * how.product


def cache(rows: int, prompts: int, longest: int, new: int, shape: Shape, how: Arithmetic) -> int:
    """Keys and values while sampling: those of each prompt once, and a ring for each row that doubles up to the
    longest answer (see `leyden.models.attention.kv_cache`)."""
    columns = COLUMNS << max(0, math.ceil(math.log2(new / COLUMNS)))
    return token_cache(shape, how) * (prompts * longest + rows * columns)


def choosing(rows: int, shape: Shape, how: Arithmetic) -> int:
    """Logits of one step of sampling: as the head gives them, in fp32, and as probabilities."""
    return rows * shape.vocabulary * (how.product + 2 * FLOAT)
