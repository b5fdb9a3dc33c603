"""The responses of one rollout on their way: asked for as they are needed, or ahead, while another one trains."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from threading import Thread

from leyden.data.prompts import Prompt
from leyden.on_policy.rollout import AnsweredPrompt
from leyden.on_policy.rollout_file import RolloutFile


class PendingRollout:
    """This process's part of a rollout, while its responses arrive.

    Args:
        number: of the rollout.
        drawn: its prompts, each with the number of its draw.
        fingerprint: of what the responses depend on; see `sampling_fingerprint`.
        ready: what is there already, by the number of the draw.
        arrivals: the rest, as the engine has it.
        file: where responses go that arrive before their turn to be scored.
    """

    def __init__(
        self,
        number: int,
        drawn: Sequence[tuple[int, Prompt]],
        fingerprint: str,
        ready: dict[int, AnsweredPrompt],
        arrivals: Generator[list[AnsweredPrompt]],
        file: RolloutFile,
    ) -> None:
        self.number, self.drawn, self.fingerprint, self.ready = number, drawn, fingerprint, ready
        self._arrivals, self._file = arrivals, file
        self._thread: Thread | None = None
        self._problem: BaseException | None = None

    def ahead(self) -> PendingRollout:
        """Let a thread ask for all responses from now on."""
        self._thread = Thread(target=self._run, name=f"rollout {self.number}", daemon=True)
        self._thread.start()
        return self

    def _run(self) -> None:
        try:
            for arrived in self._arrivals:
                self._keep(arrived)
        except BaseException as problem:  # it belongs to whoever waits for the responses
            self._problem = problem

    def wait(self) -> None:
        """Until the thread has all responses; whatever it failed on is raised here."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._problem is not None:
            problem, self._problem = self._problem, None
            raise problem

    def of(self, chunk: Sequence[tuple[int, Prompt]]) -> list[AnsweredPrompt]:
        """These prompts with their responses, once all of them are there."""
        self.wait()
        while any(draw not in self.ready for draw, _ in chunk):
            arrived = next(self._arrivals)
            self.ready |= {one.draw: one for one in arrived}
            if any(draw not in self.ready for draw, _ in chunk):
                self._keep(arrived)
        return [self.ready[draw] for draw, _ in chunk]

    def all(self) -> list[AnsweredPrompt]:
        """All prompts with their responses, in the order of their draws."""
        return self.of(self.drawn)

    def close(self) -> None:
        """Give up what is not there yet; with a thread, once the engine has ended what it asks."""
        if self._thread is None:
            self._arrivals.close()

    def _keep(self, arrived: list[AnsweredPrompt]) -> None:
        """File responses before they are scored, so that a run which is killed meanwhile has them."""
        self.ready |= {one.draw: one for one in arrived}
        self._file.append(arrived, self.number, self.fingerprint, scored=False)
