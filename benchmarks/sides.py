"""The two sides of a benchmark: rows as token ids for both, one run of ours, one run of a trainer of TRL."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RATE = 1e-6
"""Learning rate of both sides."""
Settings = dict[str, Any]
Result = dict[str, Any]
"""seconds and tokens of every step, loss and gradient norm of the first; of ours also the floating-point work."""


def now(options: argparse.Namespace) -> float:
    """The clock in seconds, once the device has done what it was given."""
    if options.device != "cpu":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


# -- rows ----------------------------------------------------------------------------------------------------------


def make_trees(options: argparse.Namespace, kind: str) -> list[Any]:
    """The first rows of a file as token ids, up to 200 steps of them. All tokens of compared responses count."""
    from leyden.data.chat_template import ChatTemplate
    from leyden.data.tokenizer import load_tokenizer
    from leyden.datamodules.files.files import read_rows
    from leyden.datamodules.formats.formats import RowError, detect, parse
    from leyden.datamodules.storage.truncation import longest

    template, trees = ChatTemplate(load_tokenizer(options.model)), []
    rows = [row for _, row in read_rows(options.data)]
    name, needed = detect(rows[:100], kind), options.batch_size * (options.warmup + options.steps)
    for row in rows:
        try:
            tree = template.encode(parse(row, name, kind))
        except RowError:
            continue
        if kind == "preference":
            tree.responses, tree.scores, tree.weights = tree.responses[:2], None, None
        if longest(tree) <= options.max_length and (kind != "preference" or tree.responses[0] != tree.responses[1]):
            trees.append(tree)
        if len(trees) == 200 * options.batch_size:
            break
    if len(trees) >= needed:
        return trees
    sys.exit(f"{options.data} has {len(trees)} rows of at most {options.max_length} tokens, {needed} are needed")


def written(trees: Sequence[Any]) -> str:
    return json.dumps([[tree.prompt, tree.responses, tree.weights] for tree in trees])


def read(path: str) -> list[Any]:
    from leyden.batch.forest import Tree

    rows = json.loads(Path(path).read_text(encoding="utf-8"))
    return [Tree(prompt, responses, None, weights, row) for row, (prompt, responses, weights) in enumerate(rows)]


def tokens_of(tree: Any) -> int:
    """Tokens that are read where no prompt is shared: the real tokens of both sides."""
    return sum(len(tree.prompt) + len(response) for response in tree.responses)


# -- ours ----------------------------------------------------------------------------------------------------------


def fit(algorithm: Any, options: argparse.Namespace, passes: float, head: bool = True, start: Any = None) -> Result:
    """Train with the Trainer on the rows in their order, with a callback that looks at the clock.

    Args:
        passes: forward passes that a step is worth, a backward pass counted as two.
        head: whether the language-model head is used.
        start: called with the algorithm before the first step.
    """
    import torch
    from lightning.pytorch import Callback, Trainer

    seconds: list[float] = []
    first: list[float] = []

    class Clock(Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            if start is not None:
                start(module)

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            if index % parts == 0:
                self.began = now(options)

        def on_train_batch_end(self, trainer: Any, module: Any, output: Any, batch: Any, index: int) -> None:
            if (index + 1) % parts:
                return
            seconds.append(now(options) - self.began)
            if not first:
                first.extend(float(trainer.callback_metrics[f"train/{name}"]) for name in ("loss", "grad_norm"))

    parts = int(getattr(options, "parts", 1))  # micro-batches a step
    trees, size = read(options.trees)[: options.batch_size * (options.warmup + options.steps)], options.batch_size
    data = rows_in_order(trees, size, parts=parts)
    quiet = {n: False for n in ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")}
    settings = {"max_epochs": 1, "gradient_clip_val": 1.0, "log_every_n_steps": 1, "callbacks": [Clock()], "devices": 1}
    Trainer(accelerator=options.device, accumulate_grad_batches=parts, **settings, **quiet).fit(algorithm, data)
    steps = [trees[i : i + size] for i in range(0, len(trees), size)]
    with torch.no_grad():
        work = [passes * sum(forward_work(algorithm.policy.model, tree, head) for tree in step) for step in steps]
    return {"seconds": seconds, "tokens": [sum(map(tokens_of, step)) for step in steps], "first": first, "work": work}


def rows_in_order(trees: list[Any], batch_size: int, max_tokens: int = 10**9, parts: int = 1) -> Any:
    """A DataModule over trees, in their order, as the other side is told to."""
    from leyden.data.datamodule import PlannedData
    from leyden.data.step_plan import plan_steps

    class Rows:
        def __init__(self) -> None:
            self.trees, self.lengths, self.totals = trees, [*map(len, trees)], [tree.totals() for tree in trees]

        def __len__(self) -> int:
            return len(self.trees)

        def __getitem__(self, index: int) -> Any:
            return self.trees[index]

    class Data(PlannedData):
        train_trees = Rows()

        def train_plan(self) -> Any:
            return plan_steps(range(len(trees)), self.train_trees.lengths, self.batch_size, self.max_tokens, parts)

        def source(self, row: int) -> str:
            return str(row)

    data = Data(batch_size, max_tokens=max_tokens, seed=0)
    data.seed = None  # type: ignore[assignment]
    return data


def policy_options(options: argparse.Namespace) -> Settings:
    """What a run changes of the policy: nothing, unless the benchmark says so."""
    return getattr(options, "policy", {})


def adamw(parameters: Any) -> Any:
    import torch

    return torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)


def forward_work(model: Any, tree: Any, head: bool) -> float:
    """Floating-point operations of one forward pass over a tree with its prompt read once: matrix products alone."""
    from torch import nn

    body, config = model.get_decoder(), model.config
    weights = sum(module.weight.numel() for module in body.modules() if isinstance(module, nn.Linear))
    p, lengths = len(tree.prompt), [len(response) for response in tree.responses]
    seen = p * (p + 1) / 2 + sum(n * p + n * (n + 1) / 2 for n in lengths)
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    scored = sum(map(len, tree.responses)) if tree.weights is None else sum(w != 0 for ws in tree.weights for w in ws)
    return (
        2.0 * weights * len(tree)
        + 4.0 * config.num_hidden_layers * width * seen
        + (2.0 * config.hidden_size * config.vocab_size * scored if head else 0.0)
    )


# -- theirs --------------------------------------------------------------------------------------------------------


def middle(order: list[int], size: int, options: Any, lengths: Sequence[int]) -> list[int]:
    """Few batches that stand for a whole epoch of a sampler that groups rows by length: its batches at evenly spaced
    quantiles of length, the median one first, to warm up."""
    batches = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
    batches.sort(key=lambda rows: sum(lengths[i] for i in rows))
    wanted = options.warmup + options.steps
    chosen = [batches[int((n + 0.5) * len(batches) / wanted)] for n in range(wanted)]
    chosen.insert(0, chosen.pop(wanted // 2))
    return [i for rows in chosen for i in rows]


def trl_run(trainer_class: Any, config_class: Any, model: Any, rows: list[Settings], options: Any, own: Any) -> Result:
    """One run of a trainer of TRL with the settings of both sides and its own."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback

    seconds: list[float] = []
    tokens: list[int] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = now(options)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(now(options) - self.began)

    grouped, size = own.pop("grouped", False), own.get("per_device_train_batch_size", options.batch_size)
    own = {"bf16": True, "per_device_train_batch_size": size} | own

    class Counting(trainer_class):  # type: ignore[misc]
        def _get_train_sampler(self, *rest: Any) -> Any:
            order = super()._get_train_sampler(*rest)
            return middle([*order], size, options, self.train_dataset["length"]) if grouped else order

        def training_step(self, model: Any, inputs: Any, *rest: Any, **kwargs: Any) -> Any:
            mask = inputs.get("attention_mask")
            tokens.append(int(mask.sum()) if mask is not None else inputs["input_ids"].numel())
            return super().training_step(model, inputs, *rest, **kwargs)

        def _prepare_dataset(self, dataset: Any, *rest: Any, **kwargs: Any) -> Any:
            ready = "prompt_ids" in dataset.column_names  # DPOTrainer would tokenise again
            return dataset if ready else super()._prepare_dataset(dataset, *rest, **kwargs)

    with tempfile.TemporaryDirectory() as folder:
        common = {
            "output_dir": folder,
            "learning_rate": RATE,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "max_steps": options.warmup + options.steps,
            "logging_steps": 1,
            "report_to": [],
            "save_strategy": "no",
            "use_cpu": options.device == "cpu",
            "dataloader_pin_memory": options.device != "cpu",
            "train_sampling_strategy": "sequential",
            "disable_tqdm": True,
        }
        trainer = Counting(
            model,
            args=config_class(**(common | own | {"bf16": own["bf16"] and options.dtype == "bfloat16"})),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(options.model),
            callbacks=[Clock()],
        )
        trainer.train()
    first = trainer.state.log_history[0]
    return {"seconds": seconds, "tokens": tokens, "first": [float(first["loss"]), float(first["grad_norm"])]}
