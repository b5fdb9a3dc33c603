"""A policy as lm-eval sees it: the same requests, tokens, windows and cuts as lm-eval's own Hugging Face model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from jinja2 import TemplateError
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from transformers import AutoTokenizer

from leyden.errors import UserError
from leyden.models.benchmark.scores import Request, Score, score
from leyden.models.causal_lm import CausalLM
from leyden.models.generation.generate import generate
from leyden.policy.engine import Engine
from leyden.policy.policy import Response, Sampling

LOOKBACK = 8
"""Tokens beside those of a stop string in which it is looked for: it may begin and end inside of others."""
NEUTRAL: dict[str, Any] = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "min_p": None}
"""What tasks may say of sampling that changes nothing."""


class PolicyLM(TemplateLM):  # type: ignore[misc]
    """A built policy for lm-eval.

    Texts become tokens as in lm-eval's `HFLM`: blanks that end a context belong to its continuation, the whole is
    tokenised and cut where the context's own tokens end, BOS stands where the tokenizer puts it, and what is too long
    loses its beginning. Log-probabilities are summed in fp32 also where the model computes in half precision, in which
    lm-eval rounds them. Sampled tasks take the whole distribution unless they say top_k or top_p; with temperature 0
    answers are those of lm-eval. Answers also end where the chat template ends a turn.

    Args:
        policy: built, on its device.
        batch_tokens: tokens of one row; None is a size for the device.
        max_length: most tokens of a context and its continuation; None is what the model's configuration says.
        add_bos_token: put BOS before every text, or before none; None is what the tokenizer does.
        seed: of sampled answers.
        forward: the context of forward passes, such as autocast.
        on_progress: called with a kind of request, how many of them were just done, and how many there are.
        engine: what samples answers, given the most tokens of a question and its answer; None is the policy itself.
            Log-probabilities are the policy's own in any case.
    """

    backend = "causal"

    def __init__(
        self,
        policy: CausalLM,
        batch_tokens: int | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        seed: int = 0,
        forward: Callable[[], Any] = nullcontext,
        on_progress: Callable[[str, int, int], None] = lambda kind, done, total: None,
        engine: Callable[[int], Engine] | None = None,
    ) -> None:
        super().__init__()
        self.policy, self.batch_tokens, self.seed, self.engine = policy, batch_tokens, seed, engine
        self.add_bos_token, self.forward, self.on_progress = add_bos_token, forward, on_progress
        self.cut = 0
        """Requests that were too long and lost their beginning"""
        self.tokenizer: Any = policy.tokenizer
        if add_bos_token is not None:
            self.tokenizer = AutoTokenizer.from_pretrained(policy.tokenizer.name_or_path, add_bos_token=add_bos_token)
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"{policy.path}: no EOS token, which ends an answer and begins a text; add one to it")
        known = resolve_max_length(policy.backbone.config, self.tokenizer)
        self.max_length = min(max_length or known, policy.positions or known)

    # -- what lm-eval asks of a model ----------------------------------------------------------------------------------

    @property
    def device(self) -> Any:
        return self.policy.device

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_gen_toks(self) -> int:
        return 256

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:
            return self._encode(string, self.tokenizer.decode(self.prefix_token_id))
        return [int(token) for token in self.tokenizer.encode(string, add_special_tokens=add_special_tokens)]

    def _encode(self, text: str, bos: str | None) -> list[int]:
        """Token ids of a text, with special tokens as asked for; without them where it begins with BOS already."""
        special = False if has_bos_prefix(text, bos) else self.add_bos_token
        how = {} if special is None else {"add_special_tokens": special}
        return [int(token) for token in self.tokenizer.encode(text, **how)]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation. A template that refuses system turns gets it without them, as in lm-eval."""

        def render(turns: list[dict[str, str]]) -> str:
            how = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, **how))

        try:
            return render(chat_history)
        except TemplateError:
            return render([turn for turn in chat_history if turn["role"] != "system"])

    # -- log-probabilities ---------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)  # type: ignore[no-any-return]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = True, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        cut = [self._cut(asked, context, continuation) for asked, context, continuation in requests]
        return [(one.logp, one.greedy) for one in self._score("questions", cut)]

    def _cut(self, asked: Any, context: list[int], continuation: list[int]) -> Request:
        """A request without what is too long: of both together the last tokens, of which the very last is not run."""
        if not 0 < len(continuation) <= self.max_length:
            text = "" if asked is None else f" ({asked[1][:40]!r})"
            raise UserError(
                f"a choice has {len(continuation)} tokens{text}, and 1 to {self.max_length} can be scored; mend the "
                "task, or give a model with more positions"
            )
        self.cut += asked is not None and len(context) + len(continuation) > self.max_length + 1
        context = context or [self.prefix_token_id]  # of nothing but blanks, which belong to the continuation
        kept = (context + continuation)[-(self.max_length + 1) :]
        return Request(kept[: -len(continuation)], continuation)

    def _score(self, kind: str, requests: Sequence[Request]) -> list[Score]:
        total = len(requests)
        with self.forward():
            return score(self.policy, requests, self.batch_tokens, lambda done: self.on_progress(kind, done, total))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Of each text, in windows of the model's length: each token is predicted once, after as much as fits."""
        windows, whose = list[Request](), list[int]()
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            pieces = utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            for context, continuation in map(utils.make_disjoint_window, pieces):
                windows.append(self._cut(None, context, continuation))
                whose.append(number)
        sums = [0.0] * len(requests)
        for number, one in zip(whose, self._score("windows", windows), strict=True):
            sums[number] += one.logp
        return sums

    # -- answers -------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Answers, requests with the same settings together."""
        answers = [""] * len(requests)
        settings: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            settings.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        for numbers in settings.values():
            contexts = [requests[number].args[0] for number in numbers]
            texts = self._answers(contexts, numbers, requests[numbers[0]].args[1], len(requests))
            for number, text in zip(numbers, texts, strict=True):
                answers[number] = text
        return answers

    def _answers(self, contexts: list[str], keys: list[int], asked: dict[str, Any], total: int) -> list[str]:
        kwargs = normalize_gen_kwargs(asked, self.max_gen_toks)
        eos = self.tokenizer.decode(self.eot_token_id)
        until = [stop for stop in handle_stop_sequences(kwargs.pop("until"), eos=eos) if stop]
        sampling = self._sampling(dict(kwargs))
        room = self.max_length - sampling.max_new_tokens
        if room < 1:
            raise UserError(
                f"max_gen_toks {sampling.max_new_tokens}: the model has positions for {self.max_length} in all, and "
                "the question needs some; take another task or model"
            )
        bos = self.tokenizer.bos_token  # none is none here, where `tok_encode` takes EOS for it
        prompts = [self._encode(context, bos) or [self.prefix_token_id] for context in contexts]
        self.cut += sum(len(prompt) > room for prompt in prompts)
        prompts = [prompt[-room:] for prompt in prompts]

        def report(done: int) -> None:
            self.on_progress("answers", done, total)

        with self.forward():
            groups = self._sampled(prompts, sampling, keys, report, until)
        texts = (self.tokenizer.decode(group[0].tokens, skip_special_tokens=True) for group in groups)
        return [postprocess_generated_text(text, until, None) for text in texts]

    def _sampled(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        keys: list[int],
        report: Callable[[int], None],
        until: list[str],
    ) -> list[list[Response]]:
        if self.engine is None:
            ended = self._ended(until)
            return generate(self.policy, self.policy.backbone, prompts, 1, sampling, keys, report, ended=ended)
        engine = self.engine(self.max_length)
        engine.stop_strings = until
        return engine.generate(prompts, 1, sampling, keys, report)

    def _sampling(self, kwargs: dict[str, Any]) -> Sampling:
        """How answers are sampled. Raises `UserError` for what Leyden's sampler does not have."""
        greedy = not kwargs.pop("do_sample")
        temperature = 0.0 if greedy else float(kwargs.pop("temperature", 1.0))
        kwargs.pop("temperature", None)
        most, top_k, top_p = kwargs.pop("max_gen_toks"), kwargs.pop("top_k", 0), kwargs.pop("top_p", 1.0)
        for name, value in kwargs.items():
            if name not in NEUTRAL or value != NEUTRAL[name]:
                raise UserError(f"generation_kwargs {name} {value}: not known here; take it out of the task")
        if greedy:
            return Sampling(most, 0.0, seed=self.seed)
        return Sampling(most, temperature, top_k or 0, top_p or 1.0, self.seed)

    def _ended(self, until: list[str]) -> Callable[[list[int]], bool]:
        """Whether an answer has a stop string near its end. One that is not seen here is still cut off afterwards."""
        longest = max((len(self.tokenizer.encode(stop, add_special_tokens=False)) for stop in until), default=0)

        def ended(tokens: list[int]) -> bool:
            seen = self.tokenizer.decode(tokens[-(longest + LOOKBACK) :])
            stops = [stop for stop in until if stop in seen]
            return bool(stops) and any(stop in self.tokenizer.decode(tokens) for stop in stops)

        return ended
