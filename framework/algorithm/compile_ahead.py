"""Compilation before the first step: models run once, on a few tokens, in every way in which training will run them.

Kernels are compiled when a model first runs in some way: with gradients and without, in training and in evaluation
mode, as policy and as reference. Left to the steps themselves, that would hold one up for a minute, in the middle of an
epoch and wherever a validation comes first.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from leyden.batch.forest import Batch, pack
from leyden.batch.tree import Tree
from leyden.paths import kernel_folder
from leyden.policy.policy import Policy, Sampling, eval_mode
from leyden.rng import rng_states, set_rng_states
from leyden.sharding import assembled

log = logging.getLogger("leyden")
LENGTHS = (5, 7, 9), (11, 3, 18)
"""Tokens of the trees that models are run on: prompt and two responses. No two are equal, no response is a single
token and the whole is a prime number, for a compiler takes sizes of 1 as fixed and equal sizes as one."""
IDS = 3
"""Token ids in them, which every vocabulary has."""


class Way(NamedTuple):
    """A way in which training runs its models."""

    run: Callable[[], list[Tensor]]
    training: bool
    """Whether in training mode"""
    gradients: bool
    sizes: tuple[int, int]
    """Fewest and most tokens that rows have when they are run so"""


def few_tokens() -> Batch:
    """A batch of two prompts with two responses each."""
    trees = [[[at % IDS for at in range(length)] for length in lengths] for lengths in LENGTHS]
    return pack([Tree(prompt, responses) for prompt, *responses in trees])


def compile_ahead(algorithm: Any) -> None:
    """Compile the kernels that training will need, where a model is compiled at all. Nothing else changes: no gradient,
    weight, buffer, mode or random number. To be called on every process, with all models where they will be trained.

    Args:
        algorithm: an `Algorithm` whose Trainer fits.
    """
    batch, precision = few_tokens().to(algorithm.device), algorithm.trainer.precision_plugin
    began = time.monotonic()
    try:
        with _unchanged(algorithm), precision.forward_context():
            if not any(policy.is_compiled(batch) for policy in _policies(algorithm)):
                return
            # tensors of inference mode would have kernels of their own: validation shares those without gradients
            algorithm.trainer.fit_loop.epoch_loop.val_loop.inference_mode = False
            cuda = algorithm.device.type == "cuda"
            place = torch.cuda.get_device_name(algorithm.device) if cuda else "this processor"
            log.info(
                "compiling kernels for %s before the first step, which may take minutes; later runs find them in %s",
                place,
                kernel_folder(),
            )
            for way in _ways(algorithm, batch):
                _run(algorithm, way)
    except Exception as error:  # a model that cannot run so few tokens may well train
        log.warning(
            "kernels could not all be compiled before the first step, so that later ones may wait for them: %s",
            str(error).partition("\n")[0] or type(error).__name__,
        )
        log.debug("compiling ahead", exc_info=error)
        return
    log.info("kernels are compiled: %.0f seconds", time.monotonic() - began)


def _policies(algorithm: Any) -> list[Policy]:
    """The policies that are run in training, the trained one first."""
    reference = getattr(algorithm, "reference", None)
    parts = (algorithm, reference if isinstance(reference, nn.Module) else nn.Module())
    return list(dict.fromkeys(part for whole in parts for part in whole.modules() if isinstance(part, Policy)))


def _ways(algorithm: Any, batch: Batch) -> Iterator[Way]:
    """The ways in which this algorithm, with its data and callbacks, will run its models."""
    rehearse, sizes = (lambda: algorithm.rehearse(batch)), algorithm.row_sizes
    yield Way(rehearse, True, True, sizes)
    if algorithm.on_policy:  # log-probs of what was sampled
        yield Way(rehearse, True, False, sizes)
    held = getattr(algorithm.data, "held_sizes", sizes)
    if held is not None or algorithm.samples_answers:
        yield Way(rehearse, False, False, held or sizes)
    if algorithm.samples_answers:
        yield Way(lambda: _answer(algorithm), False, False, (1, max(1, getattr(algorithm.data, "longest_row", 1))))


def _run(algorithm: Any, way: Way) -> None:
    with torch.set_grad_enabled(way.gradients), algorithm.policy.compile_ahead(*way.sizes):
        if way.training:
            outputs = way.run()
        else:
            with eval_mode(algorithm):
                outputs = way.run()
        if learnt := [x.float().sum() for x in outputs if x.requires_grad]:
            torch.stack(learnt).sum().backward()  # type: ignore[no-untyped-call]


def _answer(algorithm: Any) -> list[Tensor]:
    """Sample: several answers side by side, and one alone, for whose decode steps other kernels are compiled."""
    prompts = [[at % IDS for at in range(length)] for length in (5, 11, 7)]
    with assembled(algorithm):
        algorithm.policy.generate(prompts, 3, Sampling(max_new_tokens=4))
        algorithm.policy.generate(prompts[:1], 1, Sampling(max_new_tokens=4))
    return []


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Leave gradients, buffers and random generators as they were before."""
    states = rng_states()
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
        set_rng_states(states)
