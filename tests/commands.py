"""Run every command of README.md and docs/ once, at the sizes that it has there: `python tests/commands.py [PAGE …]`.

The tests run the same pages at sizes that take seconds, so they cannot see that a size which a reader types does not
work. Here only training is cut short: a run stops after its first optimizer step, by a callback that it is not told of,
so that its data, plan, schedule and rollouts are those of the whole run. `predict` answers its first 64 prompts, and an
answer breaks off after 8 tokens, since a model of one step would seldom end one.

What is run is read from the pages. A block of code is written to the file that the paragraph before it names, or run as
Python where it names none; the lines of a `bash` block are run in a shell's way, one after the other. Every page has a
folder of its own. What a command reads and the page has not made is taken from the page before it that has made it:
README.md comes first, and then the pages in the order in which README.md names them. `make` runs what it stands for
itself, and a block after a comment `<!-- needs … -->`, such as an account, a network or several devices, is left to the
reader. A page's Korean twin has the same commands, which the tests compare.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^(<!-- needs [^>]*-->\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILES = {"python": "py", "yaml": "yaml", "json": "jsonl?"}
"""Language of a block -> ending of the file that it is."""
WRITTEN = ("--output", "--csv", "--trainer.default_root_dir")
"""Flags of what a command makes."""


class Block(NamedTuple):
    """A block of code of a page."""

    language: str
    content: str
    file: str
    """Named in the paragraph before it; empty where none is."""


def blocks(text: str) -> Iterator[Block]:
    """The blocks of a page that can be run here, in order."""
    for match in BLOCK.finditer(text):
        needs, language, content = match.groups()
        paragraph = text[: match.start()].rstrip().rpartition("\n\n")[2]
        named = re.findall(rf"`([\w.-]+\.{FILES.get(language, '-')})`", paragraph)
        if not needs and (language == "bash" or language in FILES):
            yield Block(language, content, named[-1] if named else "")


def pages() -> list[Path]:
    """README.md, the pages that it names, in that order, and the others."""
    readme = ROOT / "README.md"
    linked = [ROOT / "docs" / name for name in re.findall(r"\]\(docs/([\w-]+\.md)", readme.read_text(encoding="utf-8"))]
    others = [page for page in sorted((ROOT / "docs").glob("*.md")) if not page.name.endswith(".ko.md")]
    return list(dict.fromkeys([readme, *linked, *others]))


def borrow(words: Sequence[str], earlier: Sequence[Path]) -> None:
    """Copy what a command reads, and this folder has not, from the first of the earlier folders that has it."""
    texts = [word for at, word in enumerate(words) if not at or words[at - 1] not in WRITTEN]
    for name in (name for text in texts for name in re.findall(r"[\w.*/-]+", text)):
        if Path(name).is_absolute() or name.strip("./") == "" or any(Path().glob(name)):
            continue
        for folder in earlier:
            if there := sorted(folder.glob(name)):
                for path in there:
                    here = Path(path.relative_to(folder))
                    here.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copytree(path, here) if path.is_dir() else shutil.copy(path, here)
                break


def stop_after_one_step() -> None:
    """Add to every run of the command line a callback that ends it, as early stopping does."""
    from lightning.pytorch import Callback, LightningModule, Trainer

    from leyden.cli.lightning_cli import CLI

    class FirstStep(Callback):
        def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
            self.began = trainer.global_step

        def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
            trainer.should_stop = trainer.global_step > self.began

    usual = CLI._own_callbacks

    def with_end(self: CLI, config: dict[str, Any]) -> list[Any]:
        if self.verb == "predict":
            config["limit_predict_batches"] = 1  # of 64 prompts
        return [*usual(self, config), *([FirstStep()] if self.verb == "fit" else [])]

    CLI._own_callbacks = with_end  # type: ignore[method-assign]


def break_off_answers() -> None:
    """Let policies sample a few tokens of an answer, whatever their plans made room for."""
    from leyden.models import CausalLM
    from leyden.policy import Sampling

    whole = CausalLM.generate

    def short(
        self: CausalLM, prompts: Any, n: int = 1, sampling: Sampling | None = None, *rest: Any, **named: Any
    ) -> Any:
        asked = sampling or Sampling()
        return whole(self, prompts, n, replace(asked, max_new_tokens=min(8, asked.max_new_tokens)), *rest, **named)

    CausalLM.generate = short  # type: ignore[method-assign, assignment]


def run(line: str) -> int:
    """Run one command, and return its exit code; an error that it does not handle is shown, and counts as a failure."""
    words = shlex.split(line, comments=True)
    if words[0] != "leyden":
        return subprocess.run(line, shell=True, check=False).returncode
    from leyden.cli.launcher import main as leyden

    sys.stdin = io.StringIO("안녕?\n")
    os.environ.pop("PL_GLOBAL_SEED", None)  # a command of its own process would not know the last one's
    try:
        return leyden(list(words[1:]))
    except Exception:
        traceback.print_exc()
        return 1


def run_python(code: str) -> int:
    try:
        exec(compile(code, "a page", "exec"), {})
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def run_page(page: Path, folder: Path, earlier: Sequence[Path]) -> list[str]:
    """Run a page in a folder; returns the commands that failed. Those after one are run all the same."""
    folder.mkdir(parents=True)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    failed = []
    for language, content, file in blocks(page.read_text(encoding="utf-8")):
        if file:
            Path(file).write_text(content, encoding="utf-8")
        elif language == "python" and re.match("from |import ", content):  # others are parts of something
            failed += [f"{page.name}: the Python code"] * run_python(content)
        for line in content.splitlines() if language == "bash" else ():
            words = shlex.split(line, comments=True)
            if not words or words[0] == "make":
                continue
            print(f"\n{page.name}: {line}", flush=True)
            began = time.monotonic()
            borrow(words, earlier)
            failed += [f"{page.name}: {line}"] * bool(run(line))
            print(f"    {time.monotonic() - began:.1f} s", flush=True)
    sys.path.remove(str(folder))
    for name, module in list(sys.modules.items()):  # another page may have a module of the same name
        if str(getattr(module, "__file__", "")).startswith(str(folder)):
            del sys.modules[name]
    return failed


def main(names: Sequence[str]) -> int:
    began = time.monotonic()
    os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # in pipes
    chosen = [page for page in pages() if not names or page.name == "README.md" or page.name in names]
    with tempfile.TemporaryDirectory() as place:
        os.environ["LEYDEN_CACHE"] = str(Path(place, "cache"))
        stop_after_one_step()
        break_off_answers()
        folders = [Path(place, page.stem) for page in chosen]
        failed = [one for n, page in enumerate(chosen) for one in run_page(page, folders[n], folders[:n])]
        os.chdir(ROOT)
    print(f"\n{len(failed)} commands failed, {time.monotonic() - began:.0f} s", *failed, sep="\n  ")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
