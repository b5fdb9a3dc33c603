"""Chat templates: conversations to token ids of prompt and response, with the loss weight of each token."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from leyden.batch.forest import Tree
from leyden.data.tokenizer import chat_source, stop_ids, turn_end
from leyden.errors import RowError, UserError
from leyden.example import Example, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
_MARK = "leyden-answer"


class ChatTemplate:
    """One tokenizer with its chat template.

    The prompt is what generation will see: the template's text for the turns before the answer, generation prompt
    included, tokenised as one string without added special tokens (the template writes them). The whole conversation
    is tokenised as one string too and cut where the answers begin and end. Where a cut would fall inside a token, or
    the prompt would come out differently than alone (merges across the cut, tokenizers without offsets), the pieces
    between the cuts are tokenised one by one instead, so that the prompt's ids are always exactly those of `prompt`.

    Args:
        tokenizer: any transformers tokenizer.
        chat_template: None is the tokenizer's own, `plain` is that of
            `leyden.data.tokenizer.PLAIN`, else a Jinja file or text.
        system_prompt: put first in conversations that have no system turn.
        stop: further token ids that end a turn, such as those of a generation config.

    Raises:
        UserError: there is no chat template, or it cannot be rendered.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        system_prompt: str | None = None,
        stop: Iterable[int] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.source = chat_source(tokenizer, chat_template)
        self.system_prompt = system_prompt
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

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids to generate an answer from: the turns and the generation prompt."""
        return self._ids(self._render(self._with_system(messages), answer=True))

    def encode(
        self, example: Example, train_on: Literal["response", "all"] = "response", finished: bool = True
    ) -> Tree:
        """Prompt, responses and weights: 1 on what an assistant turn says and its end, 0 on other speakers' tokens.

        With `train_on="all"` the whole first conversation is trained on, and the prompt is the BOS token, if there is
        one. Plain text is always trained on whole, and ends with EOS. Responses that are not `finished` were cut at a
        length limit: nothing follows the words of their last turn. Raises `RowError`.
        """
        if example.text is not None:
            return self._whole(self._ids(example.text), ends=False)
        messages = self._with_system(example.messages)
        if train_on == "all":
            text, _ = self._spans(messages, example.responses[0])
            return self._whole(self._ids(text), ends=self.terminator is not None)
        start = self._render(messages, answer=True)
        prompt = self._ids(start)
        encoded = [self._encode(messages, response, prompt, finished) for response in example.responses]
        return Tree(prompt, [ids for ids, _ in encoded], weights=[weights for _, weights in encoded])

    def _encode(
        self, messages: list[Message], response: list[Message], prompt: list[int], finished: bool
    ) -> tuple[list[int], list[float]]:
        text, spans = self._spans(messages, response)
        if not finished:
            spans[-1] = self._words(text, response[-1]["content"], *spans[-1])
            text = text[: spans[-1][1]]
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

    def _spans(self, messages: list[Message], response: list[Message]) -> tuple[str, list[Span]]:
        """The text of a conversation up to the end of its last answer, and where each answer begins and ends in it."""
        turns = [*messages, *response]
        text = self._render(turns)
        answers = [i for i in range(len(messages), len(turns)) if turns[i]["role"] == "assistant"]
        if not answers:
            raise RowError("no assistant turn: nothing to train; add the answer or drop the row", "no answer")
        starts = [self._start(text, turns[:i]) for i in answers]
        spans = []
        for index, first, bound in zip(answers, starts, [*starts[1:], len(text)], strict=True):
            spans.append((first, self._stop(text, turns, index, first, bound)))
        return text[: spans[-1][1]], spans

    def _start(self, text: str, turns: list[Message]) -> int:
        prefix = self._render(turns, answer=True)
        if not text.startswith(prefix):
            at = next((i for i, (a, b) in enumerate(zip(prefix, text, strict=False)) if a != b), len(text))
            raise RowError(
                f"the prompt is not a prefix of the conversation: the chat template writes {prefix[at : at + 20]!r} "
                f"before an answer but {text[at : at + 20]!r} in a whole conversation; give it another chat template",
                "template does not fit",
            )
        return len(prefix)

    def _stop(self, text: str, turns: list[Message], index: int, first: int, bound: int) -> int:
        """Where the answer `turns[index]` ends, which starts at `first`: after its terminator, else after its words."""
        content = turns[index]["content"]
        if self.terminator is not None:
            at = text.find(content.strip(), first, bound)
            after = first if at < 0 else at + len(content.strip())  # the words may hold the terminator too
            end = text.find(self.terminator, after, bound)
            if end >= 0:
                return end + len(self.terminator)
        marked = self._render([*turns[:index], Message(role="assistant", content=_MARK), *turns[index + 1 :]])
        at = marked.find(_MARK, first)
        words = next((words for words in (content, content.strip()) if at >= 0 and text.startswith(words, at)), None)
        if words is None:
            problem = "the chat template rewrites the answer, so its tokens cannot be found; give it another one"
            raise RowError(problem, "template does not fit")
        return at + len(words)

    def _words(self, text: str, content: str, first: int, stop: int) -> Span:
        """What an answer that stands at [first, stop) says, up to the last of its words."""
        if self.terminator is not None and text[first:stop].endswith(self.terminator):
            stop -= len(self.terminator)
        ends = [at + len(words) for words in (content, content.strip()) if (at := text.rfind(words, first, stop)) >= 0]
        return first, ends[0] if ends else stop

    def _whole(self, ids: list[int], ends: bool) -> Tree:
        """A tree that trains on all of `ids`; its prompt is BOS where there is one, which is never doubled."""
        if not ends and ids[-1:] != [self.eos]:
            ids = [*ids, self._end()]
        prompt = [] if self.bos is None else [self.bos]
        if prompt and ids[:1] == prompt:
            ids = ids[1:]
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

    def _render(self, messages: Sequence[Message], answer: bool = False) -> str:
        from jinja2 import TemplateError

        if self.source is None:
            raise UserError(
                f"{self.tokenizer.name_or_path}: the tokenizer has no chat template; "
                "add --data.chat_template plain, or the path of a Jinja file"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=answer, chat_template=self.source
            )
        except (TemplateError, TypeError) as error:
            raise RowError(
                f"the chat template refuses the conversation ({error}); mend the row or the template",
                "template refuses",
            ) from None
        return str(text)
