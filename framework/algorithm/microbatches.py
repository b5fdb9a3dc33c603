"""Micro-batches cut to fit the memory. Means are of the whole optimizer step, so the parts of one add up to it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import TypeVar

import torch

from leyden.batch.forest import Batch
from leyden.errors import UserError

log = logging.getLogger("leyden")
B = TypeVar("B", bound=Batch)
R = TypeVar("R")
MEMORY_ADVICE = (
    "set --data.max_length to fewer tokens or --model.policy.gradient_checkpointing true, or train less: --config "
    "lora, --config qlora"
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, on a GPU or on the processor."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


class MicroBatches:
    """The size that micro-batches are cut to. Nothing is cut until one has run out of memory, or a limit is set."""

    def __init__(self) -> None:
        self.token_limit: int | None = None
        """Most tokens of a part, unless it is one tree alone; None does not cut."""
        self._ran_out = False

    def limit_to(self, tokens: int) -> None:
        """Cut micro-batches of more than so many tokens from now on, unless they are cut smaller already."""
        self.token_limit = min(tokens, self.token_limit or tokens)

    def of(self, batch: B, count: int | None = None) -> list[B]:
        """The parts of a micro-batch, one at least.

        Args:
            count: how many there have to be, where all processes must run as many; `needed` of this batch by default.
        """
        wanted = self.needed(batch) if count is None else count
        parts = batch.split(wanted) if min(wanted, len(batch.structure())) > 1 else [batch]
        return parts + [batch.blank()] * ((count or 0) - len(parts))

    def run(self, function: Callable[[B], R], batch: B) -> list[R]:
        """The results of a function without gradients for each part of a batch, which is cut smaller until it fits."""
        todo, results = [batch], list[R]()
        while todo:
            part = todo.pop(0)
            if len(parts := self.of(part)) > 1:
                todo = [*parts, *todo]
                continue
            try:
                results.append(function(part))
                continue
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
            self.shrink(part)  # outside of the handler, which would keep what the failed part has made
            todo.insert(0, part)
        return results

    def needed(self, batch: Batch) -> int:
        """The number of parts that are small enough."""
        if self.token_limit is None or batch.size <= self.token_limit:
            return 1
        lengths = [span.stop - span.start for span in batch.structure()]
        parts = min(math.ceil(batch.size / self.token_limit), max(1, len(lengths)))
        while (
            parts < len(lengths) and max(sum(lengths[i] for i in cut) for cut in batch.cuts(parts)) > self.token_limit
        ):
            parts += 1
        return parts

    def shrink(self, failed: Batch) -> None:
        """Cut smaller from now on, since this part did not fit.

        Raises:
            UserError: it is one tree, which nothing can be cut from.
        """
        if len(failed.structure()) < 2:
            raise UserError(f"a single row of {failed.size} tokens does not fit the memory; {MEMORY_ADVICE}")
        first, self._ran_out = not self._ran_out, True
        self.token_limit = min(failed.size, self.token_limit or failed.size) // 2
        torch.cuda.empty_cache()
        if first:
            log.warning(
                "a micro-batch of %s tokens did not fit the memory; it is cut and run again, and larger ones than %s "
                "tokens from now on: the same steps, a little slower. --data.max_tokens %s with more "
                "--trainer.accumulate_grad_batches says so from the start",
                f"{failed.size:,}",
                f"{self.token_limit:,}",
                self.token_limit,
            )
