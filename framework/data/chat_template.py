"""Chat templates: conversations to token ids of prompt and response, with the loss weight of each token."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from os.path import commonprefix
from typing import TYPE_CHECKING, Any, Literal

from leyden.batch.forest import Tree
from leyden.data.rendered import Part, Span, parts_of
from leyden.data.tokenizer import PROBE, added_prefix, chat_source, stop_ids, turn_end
from leyden.errors import RowError, UserError
from leyden.example import Example, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tools = Sequence[Mapping[str, Any]]
_REASONING = (
    "the chat template leaves out the reasoning of earlier answers, which is not trained; to train it, give every "
    "answer a row of its own"
)
_NAMES = "the chat template does not write the key 'name' of messages"
_IDS = "the chat template does not write the key 'tool_call_id' of messages"
_HISTORY = (
    "the chat template writes earlier answers otherwise than the model is asked for them, so these are context and are "
    "not trained; to train them, give every answer a row of its own"
)


class ChatTemplate:
    """One tokenizer with its chat template.

    The prompt is what generation will see: the template's text for the turns before the answer, generation prompt
    included, tokenised as one string without added special tokens (the template writes them). The whole conversation
    is tokenised as one string too and cut where the answers begin and end. Where a cut would fall inside a token, or
    the prompt would come out differently than alone (merges across the cut, tokenizers without offsets), the pieces
    between the cuts are tokenised one by one instead, so that the prompt's ids are always exactly those of `prompt`.

    Every text of a row stands in what the template writes, or the row is an error. Two things a template may do to the
    turns before the last: leave out the reasoning of an answer, and write an answer otherwise than the generation
    prompt begins it (then it is context). Both are in `notes`.

    Args:
        tokenizer: any transformers tokenizer.
        chat_template: None is the tokenizer's own, `plain` is that of
            `leyden.data.tokenizer.PLAIN`, else the name of one of the tokenizer's, a Jinja file or text.
        system_prompt: put first in conversations that have no system turn.
        stop: further token ids that end a turn, such as those of a generation config.
        args: what the template is given beside the conversation, such as `{"enable_thinking": False}`. It becomes part
            of `source`, so that exports have it too.

    Raises:
        UserError: there is no chat template, it cannot be rendered, or it has no such argument.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        system_prompt: str | None = None,
        stop: Iterable[int] = (),
        args: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.source = chat_source(tokenizer, chat_template, args)
        self.system_prompt = system_prompt
        self.notes: dict[str, None] = {}
        """What the template did to the rows encoded so far that a user should know; emptied by `take_notes`."""
        self.eos: int | None = tokenizer.eos_token_id
        self.bos: int | None = tokenizer.bos_token_id
        if self.source is not None:
            try:
                self._render([Message(role="user", content="?"), Message(role="assistant", content="!")])
            except RowError as error:
                raise UserError(f"{tokenizer.name_or_path}: {error}") from None
        terminator = turn_end(tokenizer, self.source) if self.source else None
        self.terminator = None if terminator is None else str(tokenizer.convert_ids_to_tokens(terminator))
        """The special token that ends an assistant turn, as text; None where the template writes none."""
        if self.terminator is None and self.eos is None:
            raise UserError(f"{tokenizer.name_or_path}: no EOS token, so nothing could end an answer; add one to it")
        self.stop: frozenset[int] = stop_ids(tokenizer, [*stop, *([] if terminator is None else [terminator])])
        """Token ids that end a turn."""

    def take_notes(self) -> list[str]:
        """The notes so far, which are forgotten."""
        notes, self.notes = list(self.notes), {}
        return notes

    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """The ids to generate an answer from: the turns and the generation prompt. Raises `RowError`."""
        turns = self._with_system(messages)
        text = self._render(turns, tools, answer=True)
        self._check(self._parts(turns, tools, text, answer=True), turns, len(turns), len(turns) - len(messages))
        return self._ids(text)

    def encode(
        self, example: Example, train_on: Literal["response", "all"] = "response", finished: bool = True
    ) -> Tree:
        """Prompt, responses and weights: 1 on what an assistant turn says and its end, 0 on other speakers' tokens and
        on assistant turns that are not to be trained.

        With `train_on="all"` the whole first conversation is trained on, and the prompt is the BOS token, if the
        template writes one. Plain text is always trained on whole, and ends with EOS. Responses that are not `finished`
        were cut at a length limit: nothing follows the words of their last turn. Raises `RowError`.
        """
        if example.text is not None:
            return self._whole(self._ids(example.text), added_prefix(self.tokenizer), ends=False)
        messages = self._with_system(example.messages)
        if train_on == "all":
            if any(turn.get("trained") is False for turn in [*messages, *example.responses[0]]):
                problem = "a turn is flagged as not to be trained, and --data.train_on all trains it; use response"
                raise RowError(problem, "flagged off")
            text, _, _ = self._spans(example, messages, example.responses[0])
            return self._whole(self._ids(text), [], ends=self.terminator is not None)
        start = self._render(messages, example.tools, answer=True)
        encoded = []
        for response in example.responses:
            text, spans, parts = self._spans(example, messages, response)
            if len(example.responses) == 1:
                start = text[: spans[0][0]]  # where the first answers are context, the prompt is longer
            elif spans[0][0] != len(start):
                problem = "the first turn of an answer that is compared with others cannot be context; drop the row"
                raise RowError(problem, "flagged off")
            if not finished:
                spans[-1] = spans[-1][0], _words_end(text, parts, spans[-1])
                text = text[: spans[-1][1]]
            encoded.append((text, spans))
        prompt = self._ids(start)
        trained = [self._encode(text, spans, prompt, finished) for text, spans in encoded]
        return Tree(prompt, [ids for ids, _ in trained], weights=[weights for _, weights in trained])

    def _encode(self, text: str, spans: list[Span], prompt: list[int], finished: bool) -> tuple[list[int], list[float]]:
        cuts = [cut for span in spans for cut in span]
        pieces = self._cut_whole(text, cuts, prompt) or self._cut_pieces(text, cuts)
        ids = [token for piece in pieces for token in piece]
        weights = [float(number % 2 == 0) for number, piece in enumerate(pieces) for _ in piece]
        if self.terminator is None and finished:
            ids, weights = [*ids, self._end()], [*weights, 1.0]
        return ids, weights

    def _cut_whole(self, text: str, cuts: list[int], prompt: list[int]) -> list[list[int]] | None:
        """The ids between the cuts of the text tokenised as one string, or None where they would not be exact."""
        if not self.tokenizer.is_fast:
            return None
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
        ends = [end for _, end in offsets]
        at = [bisect_right(ends, cut) for cut in cuts]
        if any(index < len(ids) and offsets[index][0] < cut for index, cut in zip(at, cuts, strict=True)):
            return None
        if ids[: at[0]] != prompt:
            return None
        if any(ids[:index] != self._ids(text[:cut]) for index, cut in zip(at[2::2], cuts[2::2], strict=True)):
            return None
        return [ids[first:last] for first, last in zip(at, at[1:], strict=False)]

    def _cut_pieces(self, text: str, cuts: list[int]) -> list[list[int]]:
        return [self._piece(text[first:last]) for first, last in zip(cuts, cuts[1:], strict=False)]

    def _piece(self, text: str) -> list[int]:
        """The ids of text that goes on from other text: tokenizers that put a blank before a first word must not."""
        before = "a" if text.startswith("\n") else "\n"  # something that does not merge with what follows
        anchor, anchored = self._ids(before), self._ids(before + text)
        return anchored[len(anchor) :] if anchored[: len(anchor)] == anchor else self._ids(text)

    # -- where answers begin and end ---------------------------------------------------------------------------------

    def _spans(
        self, example: Example, messages: list[Message], response: list[Message]
    ) -> tuple[str, list[Span], list[Part]]:
        """The text of a conversation up to the end of its last trained answer, where each of these begins and ends in
        it, and the parts of the last one."""
        turns, tools = [*messages, *response], example.tools
        text = self._render(turns, tools)
        parts = self._parts(turns, tools, text)
        self._check(parts, turns, len(turns) - 1, len(messages) - len(example.messages))
        spoken = [i for i in range(len(messages), len(turns)) if turns[i]["role"] == "assistant"]
        answers = [i for i in spoken if turns[i].get("trained") is not False]
        if not answers:
            why = "every one is flagged as not to be trained" if spoken else "no assistant turn"
            raise RowError(f"{why}: nothing to train; add the answer or drop the row", "no answer")
        spans = []
        for index in answers:
            start = self._start(text, turns[:index], tools, last=index == answers[-1])
            if start is not None:
                spans.append((start, self._stop(text, turns, index, tools, start, parts)))
        return text[: spans[-1][1]], spans, [part for part in parts if part.turn == answers[-1]]

    def _start(self, text: str, turns: list[Message], tools: Tools, last: bool) -> int | None:
        """Where the answer to `turns` begins; None where it does not begin as the model is asked for it."""
        prefix = self._render(turns, tools, answer=True)
        if text.startswith(prefix):
            return len(prefix)
        if not last and text.startswith(self._render(turns, tools)):
            self.notes[_HISTORY] = None
            return None
        at = next((i for i, (a, b) in enumerate(zip(prefix, text, strict=False)) if a != b), len(text))
        raise RowError(
            f"the prompt is not a prefix of the conversation: the chat template writes {prefix[at : at + 20]!r} "
            f"before an answer but {text[at : at + 20]!r} in a whole conversation; give it another chat template",
            "template does not fit",
        )

    def _stop(
        self, text: str, turns: list[Message], index: int, tools: Tools, first: int, parts: Sequence[Part]
    ) -> int:
        """Where the answer `turns[index]` ends, which starts at `first`: after the token that ends it, else after its
        words."""
        after = max((end for part in parts if part.turn == index for _, end in part.spans), default=first)
        later = (start for part in parts if part.turn > index for start, _ in part.spans if start >= after)
        bound = min(later, default=len(text))
        if self.terminator is not None and (end := text.find(self.terminator, after, bound)) >= 0:
            return end + len(self.terminator)
        if (token := self._specials.search(text, after, bound)) and token[0] not in self._openings:
            return token.end()
        if turns[index].get("tool_calls"):  # something closes the call
            whole = self._render(turns[: index + 1], tools).rstrip()
            return len(whole) if text.startswith(whole) else bound
        return _words_end(text, [part for part in parts if part.turn == index], (first, bound))

    @cached_property
    def _specials(self) -> re.Pattern[str]:
        """Matches any special token."""
        added = self.tokenizer.added_tokens_decoder.values()
        special = {str(token) for token in added if token.special} | set(self.tokenizer.all_special_tokens)
        return re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")

    @cached_property
    def _openings(self) -> frozenset[str]:
        """The special tokens that begin a turn: those before a user's words and in the generation prompt."""
        turn = [Message(role="user", content=PROBE)]
        asked = self._render(turn, answer=True)
        before, answer = asked.partition(PROBE)[0], asked[len(commonprefix([asked, self._render(turn)])) :]
        return frozenset(self._specials.findall(before) + self._specials.findall(answer))

    # -- what the template makes of a conversation -------------------------------------------------------------------

    def _parts(self, turns: list[Message], tools: Tools, text: str, answer: bool = False) -> list[Part]:
        return parts_of(lambda turns, tools: self._render(turns, tools, answer), turns, tools, text)

    def _check(self, parts: Sequence[Part], turns: list[Message], last: int, added: int) -> None:
        """Raise `RowError` for a text that stands nowhere, unless it is the reasoning of a turn before `last`.

        Args:
            parts: of the conversation.
            turns: as the template sees them.
            last: index of the turn that is to be generated.
            added: number of turns put before those of the row.
        """
        if any("tool_call_id" in turn for turn in turns) and "tool_call_id" not in str(self.source):
            self.notes[_IDS] = None
        for part in parts:
            if part.spans:
                continue
            role = turns[part.turn]["role"] if part.turn >= 0 else "tools"
            if part.what == "name":
                self.notes[_NAMES] = None
            elif part.what == "reasoning" and role == "assistant" and part.turn < last:
                self.notes[_REASONING] = None
            else:
                number = part.turn + 1 - added
                whose = f"turn {number} ({role})" if number else "the system prompt"
                what = "the tools" if part.turn < 0 else whose
                what = what if part.what in ("content", "tool") else f"the {part.what} of {what}"
                raise RowError(
                    f"the chat template leaves out or rewrites {what}: {_short(part.text)}; give another one with "
                    "--data.chat_template, or take that out of the row",
                    "left out by the template",
                )

    def _whole(self, ids: list[int], prefix: list[int], ends: bool) -> Tree:
        """A tree that trains on all of `ids`. Its prompt is BOS where they begin with it, else `prefix`."""
        if not ends and ids[-1:] != [self.eos]:
            ids = [*ids, self._end()]
        prompt = [self.bos] if self.bos is not None and ids[:1] == [self.bos] else prefix
        if ids[: len(prompt)] == prompt:
            ids = ids[len(prompt) :]
        return Tree(prompt, [ids], weights=[[1.0] * len(ids)])

    def _end(self) -> int:
        if self.eos is None:
            raise UserError(f"{self.tokenizer.name_or_path}: no EOS token, so nothing could end a text; add one to it")
        return self.eos

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        if self.system_prompt is None or (messages and messages[0]["role"] == "system"):
            return list(messages)
        return [Message(role="system", content=self.system_prompt), *messages]

    def _render(self, messages: Sequence[Message], tools: Tools = (), answer: bool = False) -> str:
        from jinja2 import TemplateError

        if self.source is None:
            raise UserError(
                f"{self.tokenizer.name_or_path}: the tokenizer has no chat template; "
                "add --data.chat_template plain, or the path of a Jinja file"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                [{key: value for key, value in turn.items() if key != "trained"} for turn in messages],
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=answer,
                chat_template=self.source,
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise RowError(
                f"the chat template refuses the conversation ({error}); mend the row or the template",
                "template refuses",
            ) from None
        return str(text)


def _words_end(text: str, parts: Sequence[Part], span: Span) -> int:
    """Where the words of an answer end that stands at `span`, with what follows them in its content."""
    part = max((part for part in parts if part.spans), key=lambda part: part.spans[-1], default=None)
    if part is None:
        return span[0]
    end = part.spans[-1][1]
    return next((end + len(tail) for tail in (part.tail, part.tail.rstrip()) if text.startswith(tail, end)), end)


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:39] + "…")
