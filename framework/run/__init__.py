"""A run's folder and its files, and the callbacks that measure a run and show its progress.

Called by the command line, as callbacks and loggers by the Trainer, and by whatever shows progress. May import the
single files of `framework`. Begin reading at `folder`; `callbacks` measures and exports, `metrics_csv` is the logger,
`progress` the progress line in the terminal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from leyden.lazy import lazy_exports

if TYPE_CHECKING:
    from leyden.run.callbacks import Export, FinalValidation, RunRecord, Throughput
    from leyden.run.metrics_csv import MetricsCSV
    from leyden.run.predictions import PredictionWriter
    from leyden.run.progress import Progress, Summary

__all__ = [
    "Export",
    "FinalValidation",
    "MetricsCSV",
    "PredictionWriter",
    "Progress",
    "RunRecord",
    "Summary",
    "Throughput",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "callbacks": "Export FinalValidation RunRecord Throughput",
        "metrics_csv": "MetricsCSV",
        "progress": "Progress Summary",
        "predictions": "PredictionWriter",
    },
)
