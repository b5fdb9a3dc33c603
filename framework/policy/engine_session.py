"""An engine that is kept in step with a policy: started once, sent each state of the weights once, and proven."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from leyden.policy.engine import Engine
from leyden.policy.policy import Policy
from leyden.policy.sync_proof import SyncProof


class EngineSession:
    """The engine of a run.

    Args:
        engine: what samples.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.proof = engine, SyncProof()
        self.seconds = 0.0
        """What the last sync took, with its proof."""
        self._version: Any = None
        self._started = False

    def sync(self, policy: Policy, version: Any, folder: Path, longest: int) -> Engine:
        """The engine, with the policy's present weights. To be called on every process.

        Args:
            policy: whole, where the engine runs it.
            version: equal where the weights are, and the same on every process.
            folder: of the run.
            longest: most tokens of a prompt and its response.

        Raises:
            UserError: the engine cannot be started, or does not sample from the policy after the sync.
        """
        began = time.monotonic()
        if not self._started:
            self._started = True
            try:
                self.engine.start(policy, folder, longest)
            except BaseException:  # some of it may have been started
                self.stop()
                raise
        if version != self._version:
            self._version = None  # until it is known to be so
            self.engine.sync(policy)
            if not self.engine.runs_policy:
                self.proof.check(policy, self.engine, longest)
            self._version = version
            self.seconds = time.monotonic() - began
        return self.engine

    def forget(self) -> None:
        """The weights may be any from now on: a checkpoint was loaded, say."""
        self._version = None

    def stop(self) -> None:
        """End what was started."""
        if self._started:
            self._started, self._version = False, None
            self.engine.stop()


class EndEngine(Callback):
    """Ends the engine where a run breaks off: Lightning leaves `teardown` out then."""

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        pl_module.session.stop()
