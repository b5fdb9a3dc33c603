"""What a logger is given beyond numbers: what the run is, samples of its answers, and what it exported."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger


class Tracker(Logger):
    """A logger that hears of a run's folder. Everything is called on the first process alone."""

    @abstractmethod
    def begin(self, folder: Path, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Training starts or goes on. Numbers may have been logged before.

        Args:
            folder: of the run.
            config: the resolved configuration.
            facts: what the run is made from: algorithm, version, git, and fingerprints of base, tokenizer and data.
        """

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Answers of one look of the evaluation, as rows of samples.jsonl."""

    def keep(self, export: Path) -> None:
        """The trained model is in this folder."""
