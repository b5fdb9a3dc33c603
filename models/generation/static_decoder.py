"""The decoder for GPUs: a decode step of fixed shapes, recorded once as a CUDA graph and then replayed.

A decode step of a small model is a thousand small kernels, and starting each from Python takes longer than its work.
A graph starts all of them at once. The host looks at the tokens every few steps only; what rows sample after a stop
token is dropped. Noise is drawn from the same generator of each sample, for all steps of a block at once, so that
samples are those of the plain decoder.
"""

from __future__ import annotations

import gc
import logging
import threading
import warnings
from collections.abc import Callable, Sequence

import torch

from leyden.models.attention.static import StaticCache, StaticStep
from leyden.models.generation.decoder import Decoder, DraftGroup, Writer

log = logging.getLogger(__name__)
BLOCK = 8
"""Decode steps between two looks of the host"""
COLUMNS = 128
"""Smallest number of columns of own keys; each further size is twice as large, and a graph of its own"""
TRIES = 3
"""Steps in which a model may wait for the device before it is taken to do so always: a process's first step does"""
CHECKED_ELSEWHERE = "masking_utils"
"""Module of transformers that waits for the device except while a graph is recorded"""
RECORDING = threading.Lock()
"""Held by the thread that looks for waits or records: what it switches, it switches for the whole process"""


class StaticDecoder(Decoder):
    """`Decoder` with decode steps of fixed shapes, by CUDA graphs where the device and the model allow it.

    Args:
        each: look at every token as it is sampled, for a reader that waits for it.
    """

    def __init__(self, writer: Writer, groups: Sequence[DraftGroup], each: bool = False) -> None:
        super().__init__(writer, groups)
        device, rows = self.backbone.device, self.rows
        self.block = 1 if each else BLOCK
        self.last_position = self.backbone.positions
        self.at = torch.zeros(1, dtype=torch.long, device=device)
        """[1] step of the block"""
        self.noise = torch.zeros(self.block, rows, dtype=torch.float64, device=device)
        self.tokens = torch.zeros(self.block, rows, dtype=torch.long, device=device)
        self.logp = torch.zeros(self.block, rows, device=device)
        self.graphs: dict[int, Callable[[], None]] = {}
        """Recorded steps by number of columns"""
        self.records = device.type == "cuda"
        self.tries = TRIES

    def make_cache(self) -> StaticCache:
        columns = -(-self.limit // 64) * 64
        most = min(self.samples, self.rows)
        return StaticCache(self.rows, self.prompts, most, self.longest, columns, self.backbone.device)

    def step(self) -> None:
        """Decode steps of one block, and the work of the host on its tokens."""
        steps = min(self.block, max(group.limit - len(draft.tokens) for group, draft in self.live))
        ages = [len(draft.tokens) - 1 for _, draft in self.live]
        self.cache.arrange(
            [
                (draft.tokens[-1], len(group.prompt) + age, age)
                for (group, draft), age in zip(self.live, ages, strict=True)
            ]
        )
        self._draw(steps)
        columns = self._columns(max(ages) + steps)
        for _ in range(steps):
            self._advance(columns)
        self._read(steps)

    def _draw(self, steps: int) -> None:
        """Noise for the next steps of every row, which the device gets without waiting."""
        rows = [[0.0] * self.block for _ in range(self.rows)]
        for place, (_, draft) in zip(self.cache.row_place, self.live, strict=True):
            rows[place][:steps] = [draft.source.random() for _ in range(steps)]
        noise = torch.tensor(rows, dtype=torch.float64).T.contiguous()
        self.noise.copy_(noise.pin_memory() if self.noise.is_cuda else noise, non_blocking=True)
        self.at.zero_()

    def _columns(self, needed: int) -> int:
        columns = COLUMNS
        while columns < needed:
            columns *= 2
        return min(columns, int(self.cache.columns))

    def _read(self, steps: int) -> None:
        """Append the tokens of the last steps to their drafts."""
        both = torch.stack([self.tokens[:steps].double(), self.logp[:steps].double()]).tolist()  # the host waits here
        complete = []
        for i, (place, (group, draft)) in enumerate(zip(self.cache.row_place, self.live, strict=True)):
            for token, logp in zip(*([row[place] for row in part] for part in both), strict=True):
                if self.writer.append(group, draft, int(token), logp):
                    complete.append(i)
                    break
        if complete:
            self.writer.report(len(complete))
        self.leave(complete)

    def _advance(self, columns: int) -> None:
        """One decode step: replayed where it is recorded."""
        if columns in self.graphs:
            return self.graphs[columns]()
        with RECORDING:
            # the first step of this size runs by itself, so that kernels are loaded before the recording
            if self._waits(columns) and self.tries:
                self.tries -= 1
            elif self.records:
                self.graphs[columns] = recorded(lambda: self._run(columns))
            else:
                self.graphs[columns] = lambda: self._run(columns)

    def _run(self, columns: int) -> None:
        """The decode step itself: reads and writes tensors that stay where they are, and never waits for the device."""
        plan = self.cache.plan
        hidden = self.run_body(plan.tokens, plan.position, StaticStep(self.cache, columns))
        token, logp = self.writer.sample(hidden, self.noise.index_select(0, self.at)[0])
        self.tokens.index_copy_(0, self.at, token[None])
        self.logp.index_copy_(0, self.at, logp[None])
        plan.tokens.copy_(token)
        plan.position.add_(1)
        if self.last_position is not None:  # rows that go on after their end
            plan.position.clamp_(max=self.last_position - 1)
        plan.age.add_(1).clamp_(max=columns - 1)
        self.at.add_(1).clamp_(max=self.block - 1)

    def _waits(self, columns: int) -> bool:
        """Run a decode step, and return whether it waited for the device, which no graph can hold."""
        if not self.records:
            self._run(columns)
            return False
        before, thread, waits = torch.cuda.get_sync_debug_mode(), threading.get_ident(), list[str]()

        def note(message: Warning | str, category: type[Warning], filename: str, *_: object) -> None:
            if "synchroniz" in str(message) and CHECKED_ELSEWHERE not in filename and threading.get_ident() == thread:
                waits.append(filename)  # other threads may wait as they like

        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note  # type: ignore[assignment]
            torch.cuda.set_sync_debug_mode("warn")
            try:
                self._run(columns)
            finally:
                torch.cuda.set_sync_debug_mode(before)
        if waits and not self.tries:
            self.records = False
            log.debug("no CUDA graph for %s: it waits in %s", self.backbone.path, waits[0])
        return bool(waits)


def recorded(run: Callable[[], None]) -> Callable[[], None]:
    """A function that replays the kernels of `run`, which is recorded and not executed."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    collects = gc.isenabled()
    gc.disable()  # to free a tensor of another stream may wait for the device
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                run()
            finally:
                graph.capture_end()
    finally:
        if collects:
            gc.enable()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay
