"""Logging and warnings in the terminal: our own log lines as they are, and of libraries only what matters."""

from __future__ import annotations

import logging
import sys
import warnings

from leyden.language import say
from leyden.run.folder import rank

_HARMLESS = (
    r".*does not have many workers",  # batches are planned and tokenised ahead
    r".*Be aware that when using `ckpt_path`",
    r".*`loftq_config` specified but will be ignored",  # its default, written out
    r".*`is_gradient_checkpointing` is deprecated",
    r".*a tied layer is part of the adapter",  # merging takes care of it
    r".*Setting `save_embedding_layers` to `True`",
    r".*Checkpoint directory .* exists and is not empty",
    r".*The dirpath has changed",
    r".*smaller than the logging interval",
    r".*`_get_pg_default_device` will be deprecated",
    r".*GPU available but not used",
    r".*Total length of .* across ranks is zero",  # no rows are held out
    r".*Found \d+ module\(s\) in eval mode",  # the reference model and dropout-free parts are meant to be
    r".*is used within a .*checkpoint.*",
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated",
)


def quiet_libraries() -> None:
    """Show our own log lines as they are, and hide the libraries' log lines and their harmless warnings."""
    log = logging.getLogger("leyden")
    log.handlers = [_Lines()]
    log.setLevel(logging.INFO if rank() == 0 else logging.WARNING)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("profilers", "callbacks.model_summary"):  # they print what they were asked for as log lines
        asked = logging.getLogger(f"lightning.pytorch.{name}")
        asked.handlers, asked.propagate = [_Lines()], False
        asked.setLevel(logging.INFO)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its CPU kernels are optional
    for message in _HARMLESS:
        warnings.filterwarnings("ignore", message=message)


def no_loading_bars() -> None:
    """Hide the progress bars of weights read from disk, but not those of downloads."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars  # type: ignore[attr-defined]
    from transformers.utils import logging as transformers_logging

    downloads = not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    if downloads:
        enable_progress_bars()


class _Lines(logging.Handler):
    """Log records as plain lines on whatever is standard error now."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record), file=sys.stderr)
