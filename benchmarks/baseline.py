"""Figures of a run in a JSON file, and a later run held against them.

A file says what it was measured with. Where options differ (model, rows, sizes, dtype, threads) there is nothing to
compare, and the run does not begin; where the machine or the packages differ it says so and goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
Record = dict[str, Any]
"""options, machine, packages and figures."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", default="", help="JSON file to write")
    parser.add_argument("--against", default="", help="JSON file of an earlier run; exits with 1 if this one is worse")


def processor() -> str:
    known = Path("/proc/cpuinfo")  # Linux only, and not every processor has a name there
    lines = known.read_text(encoding="utf-8").splitlines() if known.is_file() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{cpu or platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def versions(names: Sequence[str]) -> dict[str, str]:
    """Of those of these packages that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def summary(values: Sequence[float]) -> Figures:
    """A figure of every round with its median and quartiles, to five digits, as it stands in a file."""
    low, middle, high = quartiles(values)
    kept = [float(f"{value:.5g}") for value in (*values, middle, low, high)]
    return {"rounds": kept[:-3], "median": kept[-3], "quartiles": kept[-2:]}


def is_worse(earlier: Sequence[float], now: Sequence[float], tolerance: float, more_is_better: bool = True) -> bool:
    """Whether the better quartile of these rounds is worse than the worse quartile of the earlier ones, by more than
    this part of it: more than the spread of both explains."""
    (earlier_low, _, earlier_high), (low, _, high) = quartiles(earlier), quartiles(now)
    return high < earlier_low * (1 - tolerance) if more_is_better else earlier_high < low * (1 - tolerance)


def differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """`dtype float32 there, bfloat16 here; …`"""
    names = [name for name in {**now, **earlier} if earlier.get(name) != now.get(name)]
    return "; ".join(f"{name} {earlier.get(name, 'not')} there, {now.get(name, 'not')} here" for name in names)


def read(path: str, record: Record) -> Figures:
    """The figures of a file, once it is known that this run can be compared with them."""
    if not Path(path).is_file():
        sys.exit(f"{path} is not there: --output {path} writes it")
    earlier: Record = json.loads(Path(path).read_text(encoding="utf-8"))
    if other := differences(earlier["options"], record["options"]):
        sys.exit(f"{path} cannot be compared with, since options differ: {other}")
    ours = {"leyden": record["packages"].get("leyden")}  # another version of the project is what is measured
    if other := differences(earlier["packages"] | ours, record["packages"]):
        print(f"note: other packages than in {path}: {other}", flush=True)
    if earlier["machine"] != record["machine"]:
        print(f"note: {path} is of another machine: {earlier['machine']}", flush=True)
    figures: Figures = earlier["figures"]
    return figures


def write(path: str, record: Record) -> None:
    """Write the file of `--output`, where there is to be one."""
    if path:
        Path(path).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def hold(
    options: argparse.Namespace,
    conditions: Mapping[str, Any],
    packages: Mapping[str, str],
    measure: Callable[[], Figures],
    worse: Callable[[Figures, Figures], list[str]],
) -> None:
    """Measure, write what `--output` asks for, and exit with 1 where the file of `--against` has better figures.

    Args:
        conditions: what has to be the same for figures to mean the same.
        worse: from earlier figures and those of this run to a line for each thing that got worse.
    """
    record: Record = {"options": dict(conditions), "machine": processor(), "packages": dict(packages)}
    earlier = read(options.against, record) if options.against else None
    record["figures"] = measure()
    write(options.output, record)
    if earlier is not None:
        lines = worse(earlier, record["figures"])
        print("\n".join(lines) or f"nothing is worse than in {options.against}")
        sys.exit(bool(lines))
