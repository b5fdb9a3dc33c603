"""What `leyden plan` says a run will hold against what it held: full training, LoRA and QLoRA at several sizes.

    python benchmarks/memory.py --sizes 20M 60M 135M

Models have random weights. Every run is a process of its own, on a processor: what counts is the most that it ever
held, as the system saw it, less what it held before it had a model (Python, the libraries, a warm-up on a tiny model).
The allocator gives memory back at once (MALLOC_MMAP_THRESHOLD_), or what is measured would be its habits; `--allocator
usual` leaves it alone. Pages of the file that weights are read from are not counted: the system takes them back when
memory is short. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import shapes

KINDS: dict[str, list[str]] = {
    "full": [],
    "lora": ["--config", "lora"],
    "qlora": ["--config", "qlora", "--trainer.plugins.compute_dtype", "float32"],
}
"""What is added to the config `sft`. 4-bit weights are computed with in float32, which every processor can."""
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def flags(folder: Path, options: argparse.Namespace) -> list[str]:
    """The run as a user would type it."""
    rows = ["--data.batch_size", str(options.rows), "--data.max_length", str(options.tokens // options.rows)]
    own = ["--model.policy.gradient_checkpointing", str(options.checkpointing).lower()]
    where = ["--model.policy.path", str(folder), "--trainer.accelerator", "cpu"]
    return ["--config", "sft", *KINDS[options.kind], *rows, *own, *where]


def planned(folder: Path, options: argparse.Namespace) -> float:
    """Bytes beside those of the process itself."""
    from leyden.cli.command import read_command
    from leyden.models.planner.budget import PROCESS, budget
    from leyden.models.planner.reading import resolved, settings

    found, _ = settings(resolved(read_command("fit", flags(folder, options))))
    return budget(found.run()).total - PROCESS["cpu"]


def train(folder: Path, options: argparse.Namespace) -> None:
    """Two steps of the same run on rows of the greatest length, forgetting at its start what loading took."""
    from lightning.pytorch import Callback, Trainer

    from leyden.batch.forest import Tree
    from leyden.cli.command import read_command
    from leyden.cli.lightning_cli import CLI
    from leyden.data.datamodule import PlannedData

    length = options.tokens // options.rows

    class Rows:
        def __init__(self, trees: list[Tree]) -> None:
            self.trees, self.lengths, self.totals = trees, [*map(len, trees)], [tree.totals() for tree in trees]

        def __len__(self) -> int:
            return len(self.trees)

        def __getitem__(self, index: int) -> Tree:
            return self.trees[index]

    class Data(PlannedData):
        train_trees = Rows([Tree([1], [[2] * (length - 1)], row=row) for row in range(2 * options.rows)])

        def source(self, row: int) -> str:
            return str(row)

    class Start(Callback):
        def on_train_start(self, *_: Any) -> None:
            Path("/proc/self/clear_refs").write_text("5")  # the most held so far is now what is held

    class Built(CLI):
        """Policy, optimizer and precision exactly as the command line builds them."""

        def before_instantiate_classes(self) -> None: ...

        def _run_subcommand(self, subcommand: str) -> None: ...

        def instantiate_trainer(self, **kwargs: Any) -> Trainer:
            quiet = {
                n: False for n in ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
            }
            plugins = self._get(self.config_init, "trainer").plugins
            return Trainer(accelerator="cpu", devices=1, max_epochs=1, plugins=plugins, callbacks=[Start()], **quiet)

    cli = Built(read_command("fit", [*flags(folder, options), "--data.path", "none.jsonl"]))
    cli.start()
    data = Data(options.rows, max_tokens=options.tokens)
    cli.trainer.fit(cli.model, data)


def held() -> float:
    """Bytes that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def worker(options: argparse.Namespace) -> None:
    """One measurement: bytes before, at most, and planned."""
    import torch

    torch.set_num_threads(1)
    folder = Path(options.folder)
    plan = planned(folder / options.size, options)
    train(folder / "1M", options)
    before = held()
    train(folder / options.size, options)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"before": before, "held": most - before, "planned": plan}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["20M", "60M", "135M"], choices=[*shapes.SMALL])
    parser.add_argument("--kinds", nargs="+", default=[*KINDS], choices=[*KINDS])
    parser.add_argument("--tokens", type=int, default=512, help="in a micro-batch")
    parser.add_argument("--rows", type=int, default=2, help="that these are")
    parser.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing")
    parser.add_argument("--allocator", choices=["at-once", "usual"], default="at-once")
    parser.add_argument("--size", help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        worker(options)
        return
    print(
        f"{options.tokens} tokens{', gradient checkpointing' * options.checkpointing}; allocator: {options.allocator}"
    )
    print(f"{'':<8}{'':<8}{'before':>10}{'held':>10}{'planned':>10}  MB")
    with tempfile.TemporaryDirectory() as folder:
        for size in dict.fromkeys(["1M", *options.sizes]):
            shapes.write(shapes.SMALL[size], Path(folder, size))
            code = f"import shapes, pathlib; shapes.fill(pathlib.Path({str(Path(folder, size))!r}))"
            subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
        for size in options.sizes:
            for kind in options.kinds:
                found = measure(size, kind, folder, options)
                ratio = found["planned"] / found["held"]
                columns = "".join(f"{found[name] / 1e6:>10,.0f}" for name in ("before", "held", "planned"))
                print(f"{size:<8}{kind:<8}{columns}  {100 * (ratio - 1):+.1f} %", flush=True)


def measure(size: str, kind: str, folder: str, options: argparse.Namespace) -> dict[str, float]:
    """One run in a process of its own."""
    command = [sys.executable, __file__, "--size", size, "--kind", kind, "--folder", folder]
    command += [
        "--tokens",
        str(options.tokens),
        "--rows",
        str(options.rows),
        *["--checkpointing"] * options.checkpointing,
    ]
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "JSONARGPARSE_DEPRECATION_WARNINGS": "off"}
    own |= AT_ONCE if options.allocator == "at-once" else {}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | own)
    if done.returncode:
        sys.exit(f"{size} {kind} failed:\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
