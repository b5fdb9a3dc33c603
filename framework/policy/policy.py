"""A policy turns tokens into log-probabilities, and prompts into responses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from leyden.batch.forest import Batch
from leyden.errors import UserError
from leyden.fingerprint import fingerprint_weights
from leyden.policy.predictions import Predictions
from leyden.rng import resolve_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

M = TypeVar("M", bound=nn.Module)


@dataclass
class Outputs:
    """What one forward over a batch gives; what was not wanted is None. T tokens; fp32, nats.

    Values stand at the token they speak of and are 0 on prompts, roots, padding and tokens of weight 0.
    """

    logp: Tensor
    """[T] log-prob of each response token given its ancestors; all 0 where it was not wanted"""
    entropy: Tensor | None = None
    """[T] entropy of the distribution that predicts each response token"""
    mean_logp: Tensor | None = None
    """[T] mean log-prob over the vocabulary at each response token (label smoothing)"""
    score: Tensor | None = None
    """[N] reward of each response, read at its last token; [N, K] where the policy has K labels"""
    value: Tensor | None = None
    """[T] value of the state before each response token, from which that token is predicted"""
    predictions: Predictions | None = None
    """the distributions that predict the response tokens, to be compared with those of another policy"""
    agreement: Tensor | None = None
    """[T] log Σ_v π(v)² at each response token: the log-probability that two draws of it agree; without a gradient"""


@dataclass(frozen=True)
class Labels:
    """What a score head gives: one number a response, or one for each of K names."""

    names: tuple[str, ...] = ("reward",)
    """Of the K outputs"""
    problem: Literal["regression", "single_label_classification"] = "regression"
    """As transformers calls it: K numbers, or the logits of K classes"""


def class_name(value: object) -> str:
    """A class of data as text: `true` and `2` mean the same as words, as numbers and in JSON."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


ReferenceKind = Literal["auto", "adapter_off", "snapshot", "copy"]
"""How a policy keeps its reference: the model without its adapter, the adapter's weights before training, or a frozen
copy of the model. `auto` takes the first that is possible."""


class Reference(nn.Module, ABC):
    """A fixed model that gives log-probs; never trained, without dropout, not in checkpoints."""

    kind: str
    """adapter_off, snapshot, copy, precomputed, other (another model) or itself (the policy before training)."""

    @abstractmethod
    def forward(self, batch: Batch, temperature: float = 1.0) -> Tensor:
        """[T] log-prob of each response token, fp32 nats, without gradients; as `Policy.forward` gives it."""

    def predictions(self, batch: Batch, temperature: float = 1.0) -> Predictions:
        """The distributions that predict the response tokens, without gradients, as `Outputs.predictions`.

        Raises:
            UserError: this reference has none to give.
        """
        raise UserError(
            f"a reference of the kind {self.kind} gives log-probs of sampled tokens alone; set --model.divergence "
            "SampledReverseKL, or give a model in --model.teacher.path"
        )

    @abstractmethod
    def fingerprint(self) -> str:
        """Eight hex digits that differ where the weights do."""


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled.

    Args:
        max_new_tokens: the longest response, in tokens.
        temperature: 0 is greedy; 1 is the model's own distribution.
        top_k: keep only the k most probable tokens; 0 keeps all.
        top_p: keep the most probable tokens that together reach this probability.
        seed: the same seed and prompt give the same response; None is that of `--seed_everything`.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    @property
    def is_full(self) -> bool:
        """Whether tokens are drawn from the whole distribution at this temperature, none left out: only then is the
        mean of log π / π_ref over samples a KL divergence, and that of -log π an entropy."""
        return self.temperature > 0 and not self.top_k and self.top_p == 1

    def seeded(self) -> Sampling:
        """The same with a seed that is settled."""
        return replace(self, seed=resolve_seed(self.seed))

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"{self}: max_new_tokens >= 1, temperature >= 0, top_k >= 0 and 0 < top_p <= 1 are needed")


@dataclass
class Response:
    """One sampled response."""

    tokens: list[int]
    """Token ids, the end-of-turn token included where it was sampled"""
    logp: list[float]
    """Log-prob of each token under the distribution it was sampled from (temperature, top-k and top-p applied)"""
    finished: bool
    """Whether it ended by itself and was not cut at the length limit"""
    text: str
    """The text, without special tokens"""


class Policy(nn.Module, ABC):
    """A causal language model as algorithms see it. Cheap to construct; weights arrive in `build`."""

    path: str
    """Hub name or folder of the weights: also where the tokenizer comes from."""
    positions: int | None = None
    """The longest sequence the model has positions for, where there is such a limit; known once it is built."""
    embeddings: int | None = None
    """Token ids below this number have an embedding, where the tokenizer may have more; known once it is built."""
    cautions: tuple[str, ...] = ()
    """What the start of a training should say of this model, one line each; known once it is built."""
    labels: Labels | None = None
    """What the score head gives, set before `build`; None takes what the folder says, else one reward."""
    samples_only: ClassVar[bool] = False
    """Whether it says how likely given tokens are at temperature 1, and gives neither distributions nor answers."""
    fresh: frozenset[str] = frozenset()
    """Heads that were newly made, since the folder at `path` had none; known once it is built."""

    @property
    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded on first use."""

    @property
    @abstractmethod
    def stop(self) -> frozenset[int]:
        """Token ids that end a response."""

    @abstractmethod
    def build(self, wants: Collection[str] = ("logp",), dropout: bool = True) -> None:
        """Load the weights and fix what is trained. Idempotent; leaves the policy in training mode.

        Args:
            wants: what training will ask `forward` for. `score` and `value` give the model a scalar head each; without
                log-probs the language-model head is not trained.
            dropout: False sets every dropout of the model and its adapter to 0.
        """

    def check_trainable(self) -> None:
        """Called before the weights of a policy that is to be trained are read: nothing to say by default.

        Raises:
            UserError: they cannot be trained as they are asked to be.
        """

    def is_compiled(self, batch: Batch) -> bool:
        """Whether torch's compiler makes kernels for this model as it is first run. By default none.

        Args:
            batch: a few tokens, on which it may be run to find out.
        """
        return False

    @contextmanager
    def compile_ahead(self, least: int, most: int) -> Iterator[None]:
        """Entered before the first step, around one forward on a few tokens in each way in which training will run its
        models: at its end, kernels are compiled that depend on the length of a row. By default there are none.

        Args:
            least, most: tokens of the rows that will be run so.
        """
        yield

    def blocks(self) -> list[nn.Module]:
        """The modules that FSDP2 shards one by one, in the order in which they run; the rest is sharded together."""
        return []

    def twin(self) -> Policy:
        """A policy of the same folder and settings, not built yet, that nothing new is trained on."""
        raise UserError(f"{type(self).__name__} gives no reference under FSDP2; give --model.reference_policy")

    def reference(self, kind: ReferenceKind = "auto") -> Reference:
        """The policy as it is now, as a fixed thing to compare with while the policy goes on learning.

        Args:
            kind: `adapter_off` runs the model without its adapter, `snapshot` with a copy of the adapter's weights,
                `copy` with a copy of all that is trained; `auto` takes the cheapest that is exact.

        Raises:
            UserError: the kind would not be exact for what this policy trains.
        """
        raise UserError(f"{type(self).__name__} gives no reference; write its `reference`, or use CausalLM")

    def critic(self) -> nn.Module:
        """A value function of its own on the policy's frozen weights: maps a batch to values [T], as `Outputs.value`.

        Raises:
            UserError: this policy has none to give.
        """
        raise UserError(f"{type(self).__name__} gives no critic; set --model.value head, or give --model.value_policy")

    @abstractmethod
    def forward(self, batch: Batch, want: Collection[str] = ("logp",), temperature: float = 1.0) -> Outputs:
        """One forward through the body over T packed tokens; see `Outputs` for shapes and units.

        Args:
            batch: prompts and responses.
            want: any of logp, entropy, mean_logp, agreement, score, value and predictions.
            temperature: of the distribution that log-probs are taken from: softmax(logits / temperature).
        """

    @abstractmethod
    def generate(
        self,
        prompts: Sequence[list[int]],
        n: int = 1,
        sampling: Sampling | None = None,
        keys: Sequence[int] | None = None,
        on_progress: Callable[[int], None] | None = None,
        on_token: Callable[[int, int, int], None] | None = None,
    ) -> list[list[Response]]:
        """`n` responses to each prompt of token ids, dropout off and without gradients.

        Args:
            prompts: token ids.
            n: responses to each.
            sampling: how; the defaults of `Sampling` where nothing is given.
            keys: a number for each prompt, which its noise depends on together with the seed and the number of the
                sample; 0, 1, 2 … where none are given. So a response does not depend on what else is sampled.
            on_progress: called now and then with how many responses have ended since.
            on_token: called with every token as it is sampled: place of its prompt, number of its sample, token id.

        Raises:
            ValueError: a prompt without tokens.
            UserError: a prompt that leaves no position for an answer.
        """

    def response(self, tokens: list[int], logp: list[float], finished: bool) -> Response:
        """A sampled response with its text.

        Args:
            tokens: ids, the end-of-turn token included where it was sampled.
            logp: of each token, nats.
            finished: whether it ended by itself.
        """
        return Response(tokens, logp, finished, str(self.tokenizer.decode(tokens, skip_special_tokens=True)))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, weight) of the model without an adapter, as its folder has them: whole, and one after the other, so
        that a model which is sharded need fit no single device. To be run to the end on every process."""
        raise UserError(f"{type(self).__name__} gives its weights to no engine; use CausalLM, or leave the engine out")

    @abstractmethod
    def save(self, folder: str | Path | None) -> None:
        """Write what was trained as an ordinary transformers folder, or a PEFT adapter folder, with the tokenizer.

        Args:
            folder: where; None on processes that only help to put sharded weights together.
        """

    def fingerprint(self) -> str:
        """Hex digits that differ where the weights that this policy was built from do, the same before and after
        training. By default those of its frozen weights: trained ones may have begun anywhere."""
        return fingerprint_weights(
            (name, weight) for name, weight in self.named_parameters() if not weight.requires_grad
        )

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.parameters()).device


def predictions_of(policy: Policy, out: Outputs) -> Predictions:
    """The predictions among the outputs `out` of `policy`, which wanted them.

    Raises:
        UserError: the policy gives none.
    """
    if out.predictions is None:
        raise UserError(
            f"{type(policy).__name__} gives no predictions over the vocabulary; let its `forward` return "
            "Outputs.predictions, or set --model.divergence SampledReverseKL"
        )
    return out.predictions


@contextmanager
def eval_mode(module: M) -> Iterator[M]:
    """Dropout of `module` off inside, and every part in the mode that it was in afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield module
    finally:
        for part, training in modes:
            part.training = training
