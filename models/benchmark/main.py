"""`leyden benchmark`: standard tasks over the models of runs, with results in the runs' folders."""

from __future__ import annotations

import importlib.util
import os
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from leyden.cli.class_flags import flags_as_text, maker, split_flags
from leyden.cli.parser import Parser
from leyden.errors import UserError
from leyden.language import say
from leyden.models.benchmark.results import results_folder
from leyden.paths import resolve
from leyden.run.console import no_loading_bars, quiet_libraries

if TYPE_CHECKING:
    from leyden.models.benchmark.session import Session
    from leyden.policy.engine import Engine

ABOUT = """Ask models the questions of lm-eval's tasks; results go to benchmark.json in each run's folder.
Tasks that are in it already, asked in the same way of the same weights, are not asked again."""


def main(argv: list[str]) -> int:
    """Run the command and return the exit code. Raises `UserError` for mistakes that the user can fix."""
    words, engine = split_flags(argv, "engine")
    options = _parser().read(words)
    _check(options)
    for run in options.run if options.checkpoint is None else ():
        resolve(run)  # a mistake is said before the libraries are there
    folders = _folders(options)
    make = maker(engine, "engine", _engine_class) if engine else None
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("leyden benchmark: lm-eval is not installed; type pip install 'leyden[benchmark]'")
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # lm-eval would fork after threads have begun
    quiet_libraries()
    no_loading_bars()
    from leyden.models.benchmark.templates import sandboxed

    with nullcontext() if options.allow_code else sandboxed():
        session = _session(options, make, flags_as_text(engine) if engine else None)
        for run, folder in folders.items():
            session.measure(run, folder)
    return 0


def _parser() -> Parser:
    parser = Parser("leyden benchmark", ABOUT)
    parser.add_argument("run", nargs="+", metavar="RUN", help="run's, model or adapter folder, hub name, or tiny")
    text = "name, pattern or YAML file of a task or group, or a folder of such files; several are possible"
    parser.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help=text)
    parser.add_argument("--limit", type=_count("--limit", 1), metavar="N", help="only the first N questions of a task")
    names = ("--num_fewshot", "--num-fewshot")
    parser.add_argument(*names, type=_count(names[0], 0), metavar="N", help="examples before each question")
    names = ("--apply_chat_template", "--apply-chat-template")
    parser.add_argument(*names, action="store_true", help="write questions by the model's chat template")
    names = ("--fewshot_as_multiturn", "--fewshot-as-multiturn")
    parser.add_argument(*names, type=_flag(names[0]), metavar="true|false", help="examples as turns (default: true)")
    names = ("--system_instruction", "--system-instruction")
    parser.add_argument(*names, metavar="TEXT", help="what stands before everything else")
    names = ("--add_bos_token", "--add-bos-token")
    text = "BOS before every text, or before none (default: as the tokenizer does)"
    parser.add_argument(*names, type=_flag(names[0]), metavar="true|false", help=text)
    names = ("--max_length", "--max-length")
    text = "most tokens of a question and its answer (default: the model's positions)"
    parser.add_argument(*names, type=_count(names[0], 2), metavar="N", help=text)
    names = ("--batch_tokens", "--batch-tokens")
    text = "tokens that are run at once; less takes less memory"
    parser.add_argument(*names, type=_count(names[0], 1), metavar="N", help=text)
    parser.add_argument("--seed", type=int, default=1234, help="of examples and of sampled answers; default 1234")
    parser.choice("--dtype", ("float32", "bfloat16", "float16"), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--base", metavar="MODEL", help="an adapter's base, if it is not where the adapter says")
    parser.add_argument("--checkpoint", metavar="last|best|FILE", help="the model as it was then (default: at the end)")
    text = "folder of the results (default: the run's; of another model runs/benchmark-NAME)"
    parser.add_argument("--output", metavar="FOLDER", help=text)
    text = "what samples answers, VLLM or another; --engine.KEY VALUE for what it takes (default: the model itself)"
    parser.add_argument("--engine", metavar="CLASS", help=text)
    parser.add_argument("--again", action="store_true", help="ask tasks again that were asked already")
    text = "run the Python that a task brings, and the code that a model writes for it"
    parser.add_argument("--allow_code", "--allow-code", action="store_true", help=text)
    return parser


def _check(options: Namespace) -> None:
    """Refuse what would be ignored."""
    if options.fewshot_as_multiturn is not None and not options.apply_chat_template:
        raise UserError("--fewshot_as_multiturn: there are no turns without a chat template; add --apply_chat_template")
    if options.checkpoint is not None and options.output is None:
        raise UserError(
            f"--checkpoint {options.checkpoint}: the run's own results are those of its end; name another folder by "
            "--output, such as runs/benchmark-best"
        )
    if options.checkpoint is not None and options.dtype is not None:
        raise UserError(f"--dtype {options.dtype}: a checkpoint has its run's; leave it out")


def _folders(options: Namespace) -> dict[str, Path]:
    """Where the results of each model go. Raises `UserError` where two would go to the same folder."""
    several = len(set(options.run)) > 1
    folders = {run: results_folder(run, options.output, several) for run in options.run}
    for run, folder in folders.items():
        if other := next((o for o, f in folders.items() if o != run and f.resolve() == folder.resolve()), None):
            raise UserError(f"{run} and {other}: the results of both would go to {folder}; measure them one by one")
    return folders


def _count(flag: str, least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if text.isdecimal() and int(text) >= least:
            return int(text)
        raise UserError(f"{flag} {text}: give a whole number of {least} or more")

    return read


def _flag(flag: str) -> Callable[[str], bool]:
    def read(text: str) -> bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"{flag} {text}: use true or false")
        return text.lower() == "true"

    return read


def _engine_class() -> type:
    from leyden.policy.engine import Engine

    return Engine


def _session(options: Namespace, engine: Callable[[], Engine] | None, engine_as_text: str | None) -> Session:
    """Tasks are loaded once, for all models, and before any model is."""
    from leyden.models.benchmark.evaluate import Settings
    from leyden.models.benchmark.session import Model, Session

    settings = Settings(
        limit=options.limit,
        shots=options.num_fewshot,
        chat=options.apply_chat_template,
        multiturn=options.fewshot_as_multiturn is not False,
        system=options.system_instruction,
        seed=options.seed,
        allow_code=options.allow_code,
    )
    model = Model(
        dtype=options.dtype,
        base=options.base,
        checkpoint=options.checkpoint,
        batch_tokens=options.batch_tokens,
        max_length=options.max_length,
        add_bos_token=options.add_bos_token,
        engine=engine,
        engine_as_text=engine_as_text,
    )
    say("reading tasks and their data")
    return Session(options.tasks, settings, model, options.again)
