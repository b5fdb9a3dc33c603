"""Formulas for the memory of training: numbers in, bytes out.

Activation memory is the tensors of transformers' decoder layers that autograd keeps for the backward pass, counted one
by one; a test counts them in real models. All other formulas name their source. `tokens` are the T tokens of a
micro-batch. Widths: h of hidden states, q of all query heads together, k of all key heads together, f of the MLP.
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
"""Numbers that an optimizer stores for every trained parameter, apart from a few per matrix. SGD with momentum has one.
"""
HALF = 2
"""Bytes of a number in bfloat16 or float16."""
FLOAT = 4
"""Bytes of a number in float32, the dtype of adapters and new heads."""


@dataclass(frozen=True)
class Shape:
    """Widths and counts of a model."""

    layers: int
    hidden: int
    """h, width of the hidden states"""
    query: int
    """q, width of all query heads together"""
    key: int
    """k, width of all key heads together"""
    inner: int
    """f, width of the MLP"""
    gated: bool
    """The MLP multiplies two products, gate and up"""
    norms: int
    """Sum of the widths of a layer's norms of hidden states"""
    head_norms: int
    """Sum of the widths of a layer's norms of queries and keys"""
    factors: int
    """Factors that these norms compute per token: one for each norm, and one for each head of a head norm"""
    vocabulary: int
    linear: int
    """Parameters of the linear layers of the body"""
    largest: int
    """Parameters of the largest of these layers"""


@dataclass(frozen=True)
class Kept:
    """Numbers of trained or adapted linear layers in a decoder layer, whose inputs the backward pass needs.

    `mlp` counts those that read the input of the MLP, `down` its last one.
    """

    attention: int = 3
    """Number of those that read the input of attention"""
    output: int = 1
    """1 if the output projection of attention is among them"""
    mlp: int = 2
    down: int = 1
    norms: bool = True
    """Norms are trained"""
    ranks: int = 0
    """Sum of the ranks of a layer's adapters; 0 without adapters"""
    dropout: bool = False
    """Adapters have dropout"""


@dataclass(frozen=True)
class Arithmetic:
    """Number formats of weights and of the computation."""

    weight: int = FLOAT
    """Bytes of a weight that is not quantised, and of a number in the hidden states"""
    autocast: bool = False
    """Products are computed in half precision"""
    quantised: bool = False
    cuda: bool = False

    @property
    def product(self) -> int:
        """Bytes of a number in attention and in the language-model head."""
        return HALF if self.autocast else self.weight

    @property
    def result(self) -> int:
        """Bytes of a number in the output of a linear layer; a quantised one returns the dtype of its input."""
        return self.weight if self.quantised else self.product


def quantised(parameters: int, double: bool = True) -> float:
    """Bytes of quantised parameters: four bits each, and a scale for each block of 64.

    The scale is fp32, or with double quantisation 8 bits and an fp32 scale for each 256 scales (Dettmers et al. 2023,
    section 3): 4.5 or 4.127 bits per parameter.
    """
    scale = 8 / 64 + 32 / (64 * 256) if double else 32 / 64
    return parameters * (4 + scale) / 8


def optimizer(name: str, parameters: int, size: int, momentum: bool = False) -> float:
    """Bytes of an optimizer's state for parameters of `size` bytes each.

    torch stores the state in the dtype of the parameters. bitsandbytes stores one byte per number and an fp32 scale for
    each block of 256, or fp32 numbers (its `create_state` functions).
    """
    states = 1 if name == "SGD" and momentum else STATES.get(name, 2)
    if name.endswith("8bit"):
        number_size = 1 + FLOAT / 256
    elif name.startswith("Paged") or name.endswith("32bit"):
        number_size = float(FLOAT)
    else:
        number_size = float(size)
    return states * parameters * number_size


def step(parameters: int, largest: int, size: int, in_place: bool, cuda: bool) -> int:
    """Bytes of work space of an optimizer step.

    On a GPU torch takes the square roots of all second moments at once (its `_multi_tensor_adamw`), on a CPU those of
    one parameter, and divides. A fused step is in place.
    """
    if in_place:
        return 0
    return size * (parameters if cuda else 2 * largest)


def layer(shape: Shape, kept: Kept, how: Arithmetic) -> int:
    """Bytes that autograd keeps per token in one decoder layer.

    A norm keeps its input in fp32, its factor and, if it is trained, the normalised input. Attention keeps queries,
    keys, values and its output. A gated MLP keeps gate, silu(gate), up and their product; any other MLP keeps only
    input and output of its activation function. Linear layers keep the inputs listed in `Kept`, and adapters their
    low-rank projections.
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
    """Bytes kept per token of an input that is read by `readers` linear layers.

    They share the input unless it is converted. Autocast makes a copy for each, and so do adapters (to fp32; PEFT's on
    4-bit layers only where autocast is not for GPUs).

    Args:
        width: numbers in the input.
        size: bytes of a number.
        held: the input is kept anyway, and counted elsewhere.
    """
    adapted = kept.ranks > 0
    adapter_size = FLOAT if adapted and not (how.quantised and how.autocast and how.cuda) else size
    product_size = HALF if how.autocast else adapter_size if adapted else how.weight
    if not readers:
        return 0
    if kept.dropout and adapted:
        return width * readers * (product_size + 1)  # the input after dropout, and a mask
    if not size == adapter_size == product_size:
        return width * readers * product_size
    return 0 if held else width * size


def activations(tokens: int, shape: Shape, kept: Kept, how: Arithmetic, checkpointing: bool) -> int:
    """Activation memory of a micro-batch, in bytes: tensors kept for the backward pass, except logits.

    With gradient checkpointing only the input of every layer is kept. Autocast keeps half-precision copies of fp32
    weights: those of trained weights until the forward pass ends, those of frozen ones as long as their layer's
    activations.
    """
    h = shape.hidden
    body = how.weight * h if checkpointing else layer(shape, kept, how)
    top = h * (FLOAT + (how.weight if kept.norms else 0) + 2 * how.weight)  # the last norm, and the states that predict
    copies = how.autocast and how.weight == FLOAT and not how.quantised and not (checkpointing and kept.ranks)
    return tokens * (shape.layers * body + top) + HALF * shape.linear * int(copies)


def passing(tokens: int, shape: Shape, kept: Kept, how: Arithmetic, checkpointing: bool) -> int:
    """Bytes of work space of a layer's backward pass: gradients of the MLP's two halves and of hidden states, twice
    each, and an unpacked 4-bit weight. With gradient checkpointing also the activations of its repeated forward pass.
    """
    recomputed = layer(shape, kept, how) if checkpointing else 0
    return tokens * (recomputed + 2 * how.result * shape.inner + 2 * how.weight * shape.hidden) + unpacked(shape, how)


def unpacked(shape: Shape, how: Arithmetic) -> int:
    """Bytes of the largest 4-bit weight, unpacked for a matrix product."""
    return shape.largest * (how.weight + (HALF if how.autocast and how.weight == FLOAT else 0)) * int(how.quantised)


def forward(tokens: int, shape: Shape, how: Arithmetic) -> int:
    """Bytes of work space of a forward pass without gradients, except logits: hidden states and, in the MLP, gate, up
    and their product, or in a norm two fp32 copies."""
    mlp = (3 if shape.gated else 2) * how.result * shape.inner + how.product * shape.hidden
    return tokens * (how.weight * shape.hidden + max(mlp, 2 * FLOAT * shape.hidden)) + unpacked(shape, how)


def logits(predicted: int, shape: Shape, how: Arithmetic) -> int:
    """Bytes of the chunked head on `predicted` states: one chunk of logits, fp32 blocks of it in work, and the head's
    weights where autocast casts them (see `leyden.models.logprobs`)."""
    chunk = min(predicted * shape.vocabulary * how.product, max(CHUNK_BYTES, shape.vocabulary * how.product))
    block = 64 << 20 if how.cuda else BLOCK_BYTES["cpu"]
    cast = HALF * shape.vocabulary * shape.hidden if how.autocast and how.weight == FLOAT else 0
    return chunk + 2 * min(block, FLOAT * predicted * shape.vocabulary) + cast


def token_cache(shape: Shape, how: Arithmetic) -> int:
    """Bytes of the keys and values of one token in all layers, in the dtype of attention."""
    return shape.layers * 2 * shape.key * how.product


def cache(rows: int, prompts: int, longest: int, new: int, shape: Shape, how: Arithmetic) -> int:
    """Bytes of the KV cache: each prompt once, and for each row a ring that doubles up to the longest answer (see
    `leyden.models.attention.kv_cache`)."""
    columns = COLUMNS << max(0, math.ceil(math.log2(new / COLUMNS)))
    return token_cache(shape, how) * (prompts * longest + rows * columns)


def choosing(rows: int, shape: Shape, how: Arithmetic) -> int:
    """Bytes of the logits of one decode step: in the head's dtype, in fp32, and as probabilities."""
    return rows * shape.vocabulary * (how.product + 2 * FLOAT)
