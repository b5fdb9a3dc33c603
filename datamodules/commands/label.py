"""`leyden data label`: preferences from several responses to each prompt, ranked by a reward."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leyden import language
from leyden.datamodules.commands.convert import rejected_path, whole_file, write_rejects
from leyden.datamodules.commands.label_scores import LabelScores
from leyden.datamodules.commands.prompt_groups import PromptGroup, read_groups
from leyden.datamodules.formats.ranking import above_gap, spread
from leyden.datamodules.formats.row_error import by_count
from leyden.datamodules.formats.turns import is_plain
from leyden.datamodules.source import Source
from leyden.errors import UserError
from leyden.example import Message

if TYPE_CHECKING:
    from leyden.rewards.reward import Reward

EVERY = 30.0
"""Seconds between two lines of progress in a log file."""


@dataclass(frozen=True)
class Labels:
    """Options of the preferences that are written.

    Args:
        pairs: write the best against the worst response, instead of all of them with their scores.
        min_gap: from the best down, a response closer than this to the last one kept is left out.
        max_responses: most responses of a row, the best and the worst among them.
        batch_size: responses that the reward scores at a time; an interruption loses the scores of one batch.
        overwrite: replace an output that exists.
    """

    pairs: bool = False
    min_gap: float = 0.0
    max_responses: int | None = None
    batch_size: int = 256
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not self.min_gap >= 0:
            raise UserError(f"--min-gap {self.min_gap}: a gap between scores is 0 or more")
        if self.max_responses is not None and self.max_responses < 2:
            raise UserError(f"--max-responses {self.max_responses}: a comparison takes two; give 2 or more")
        if self.batch_size < 1:
            raise UserError(f"--batch-size {self.batch_size}: give 1 or more")


def label(
    source: Source,
    output: str,
    make: Callable[[], Reward],
    about: str,
    how: Labels,
    say: Callable[[str], None] = language.say,
) -> int:
    """Label a file and return 0, or 1 where rows were rejected.

    The output appears when it is complete. Until then the scores are saved in OUTPUT.part, and the same command
    resumes from there.

    Args:
        source: rows of prompts with responses; rows with the same prompt belong together.
        output: a .jsonl file.
        make: builds the reward; called only if there is something left to score.
        about: the reward and its settings in words; scores of another reward are never mixed with these.
        how: options of the output.
        say: receives the lines about what was read and written.
    """
    out = _target(output, how)
    rejects: list[dict[str, Any]] = []
    groups = read_groups(source, rejects, say)
    several = [group for group in groups if len(group.samples) > 1]
    if not several:
        first = f" (first rejected row: {rejects[0]['place']}: {rejects[0]['problem']})" if rejects else ""
        raise UserError(
            f"{source.path}: no prompt has two different responses, so nothing can be compared{first}; give several to "
            "a prompt, such as the answers of leyden predict with --model.sampling.temperature 1 and several "
            "--model.sampling.seed, in one folder"
        )
    ledger = LabelScores(out.with_name(out.name + ".part"), {"input": source.path, "reward": about}, how.overwrite)
    _score(several, ledger, make, how.batch_size, say)
    reasons = Counter({"only one response": len(groups) - len(several)})
    rows = list(_rows(several, ledger, how, reasons))
    if not rows:
        raise UserError(
            f"{source.path}: under {about} no response is better than another of its prompt ({by_count(+reasons)}); "
            "take another reward or gap, or responses that differ more"
        )
    with whole_file(out) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_rejects(rejected_path(out), rejects, how.overwrite)
    ledger.remove()
    responses = sum(2 if how.pairs else len(row["responses"]) for row in rows)
    say(f"{source.path} -> {out}: {len(rows):,} prompts with {responses:,} responses, best first, by {about}")
    if left_out := by_count(+reasons):
        say(f"  left out: {left_out}")
    if ties := sum(not how.pairs and len(set(row["scores"])) < len(row["scores"]) for row in rows):
        say(f"  {ties:,} prompts have responses that tie; training compares one of each such with the others")
    if rejects:
        first = f"(first: {rejects[0]['place']}: {rejects[0]['problem']})"
        say(f"  {len(rejects):,} rows rejected -> {rejected_path(out)} {first}")
    return int(bool(rejects))


def _target(output: str, how: Labels) -> Path:
    out = Path(output).expanduser()
    if out.suffix != ".jsonl":
        raise UserError(f"{out}: the output is JSONL; name it {out.with_suffix('.jsonl')}")
    if out.exists() and not how.overwrite:
        raise UserError(f"{out}: exists already; add --overwrite, or name another output")
    return out


def _score(
    groups: Sequence[PromptGroup],
    ledger: LabelScores,
    make: Callable[[], Reward],
    size: int,
    say: Callable[[str], None],
) -> None:
    """Score the responses of all prompts that are not in the ledger yet, in batches of about `size` responses."""
    waiting = [group for group in groups if group.key not in ledger.scores]
    total = sum(len(group.samples) for group in groups)
    done = before = total - sum(len(group.samples) for group in waiting)
    if not waiting:
        return
    if before:
        say(f"{before:,} of {total:,} responses are scored already")
    from leyden.rewards.reward import score

    reward, started, last_line = _on_device(make()), time.monotonic(), time.monotonic()
    for batch in _batches(waiting, size):
        try:
            scores = score(reward, [sample for group in batch for sample in group.samples]).numpy()
        except UserError as error:
            progress = f" ({done:,} of {total:,} responses are scored and kept: then type the same again)"
            raise UserError(f"{error}{progress if done else ''}") from error
        shortest = iter(float(str(value)) for value in scores)  # 0.1, not 0.10000000149
        ledger.add({group.key: [next(shortest) for _ in group.samples] for group in batch})
        done, now = done + len(scores), time.monotonic()
        if sys.stderr.isatty() or now - last_line > EVERY:
            last_line = now
            _progress(done, total, (now - started) / (done - before) * (total - done))
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _progress(done: int, total: int, seconds: float) -> None:
    """Print a line of progress: redrawn on a terminal, a new one in a log file."""
    left = f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02} left"
    start, end = ("\r", "  ") if sys.stderr.isatty() else ("", "\n")
    language.say(f"{start}scored {done:,} of {total:,} responses · {left}", end=end, file=sys.stderr, flush=True)


def _on_device(reward: Reward) -> Reward:
    """The reward; if it is a model, in eval mode and on the GPU where there is one."""
    import torch

    if isinstance(reward, torch.nn.Module):
        reward.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return reward


def _batches(groups: Sequence[PromptGroup], size: int) -> Iterator[list[PromptGroup]]:
    """Batches of whole groups with about `size` responses together."""
    batch: list[PromptGroup] = []
    for group in groups:
        batch.append(group)
        if sum(len(member.samples) for member in batch) >= size:
            yield batch
            batch = []
    if batch:
        yield batch


def _rows(
    groups: Sequence[PromptGroup], ledger: LabelScores, how: Labels, reasons: Counter[str]
) -> Iterator[dict[str, Any]]:
    """Yields the rows to write, best response first. `reasons` counts the prompts without a row, by reason."""
    from leyden.run.predictions import as_json

    for group in groups:
        scores = ledger.scores[group.key]
        order = sorted(range(len(scores)), key=lambda number: -scores[number])
        ranked = [scores[number] for number in order]
        ranks = above_gap(ranked, how.min_gap)
        if ranked[0] == ranked[-1] or len(ranks) < 2:
            reasons["tied" if ranked[0] == ranked[-1] else "closer than --min-gap"] += 1
            continue
        ranks = [ranks[place] for place in spread(len(ranks), 2 if how.pairs else how.max_responses)]
        texts = [_text(group.samples[order[place]].response) for place in ranks]
        tools = group.samples[0].tools
        row: dict[str, Any] = {"prompt": group.messages} | ({"tools": tools} if tools else {})
        if how.pairs:
            margin = float(f"{ranked[ranks[0]] - ranked[ranks[1]]:.7g}")
            row |= {"chosen": texts[0], "rejected": texts[1], "margin": margin}
        else:
            finished = [group.samples[order[place]].finished for place in ranks]
            row |= {"responses": texts, "scores": [ranked[place] for place in ranks], "finished": finished}
        yield as_json(row | ({"row": group.row} if group.row else {}))


def _text(response: str) -> Any:
    """A response as a row holds it: as a turn where its text would be read as a conversation."""
    return response if is_plain(response) else [Message(role="assistant", content=response)]
