"""A model behind a vLLM server that says how likely given tokens are, and no more: a teacher of sampled tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import PreTrainedTokenizerBase

from leyden.batch.forest import Batch
from leyden.data.tokenizer import load_tokenizer
from leyden.errors import UserError
from leyden.models.engines.client import Client, Refused, Slow, Unreachable, completion
from leyden.policy.policy import Outputs, Policy, Response, Sampling


class ServedModel(Policy):
    """A model too large for the machines that train, behind a vLLM server that runs already (`vllm serve MODEL`).

    It gives log-probs of given tokens, which is what `SampledReverseKL` compares, and no distributions: a server would
    send a vocabulary for each token. Each response is one request, with its prompt.

    Args:
        path: hub name or folder of the model: its tokenizer has to be the policy's.
        url: of the server.
        name: what the server calls the model; None where it has one.
        requests: that it works on at a time.
        timeout: seconds that one may take.
    """

    samples_only = True

    def __init__(
        self, path: str, url: str, name: str | None = None, requests: int = 32, timeout: float = 600.0
    ) -> None:
        super().__init__()
        if requests < 1:
            raise UserError(f"--model.teacher.requests {requests}: give 1 or more")
        self.path, self.url, self.name, self.requests = path, url, name, requests
        self.client = Client(url, timeout, "--model.teacher.url")
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.path)
        return self._tokenizer

    @property
    def stop(self) -> frozenset[int]:
        end = self.tokenizer.eos_token_id
        return frozenset() if end is None else frozenset([end])

    def build(self, wants: Collection[str] = ("logp",), dropout: bool = True) -> None:
        """Find the model on the server.

        Raises:
            UserError: nothing answers there, or it has no such model.
        """
        try:
            models = {one["id"]: one for one in self.client.get("/v1/models")["data"]}
        except (Unreachable, Refused) as error:
            raise UserError(
                f"--model.teacher.url {self.url}: no server answers there ({error}); start one with: vllm serve "
                f"{self.path}"
            ) from None
        finally:
            self.client.close()
        if self.name is None and len(models) == 1:
            self.name = next(iter(models))
        if self.name not in models:
            raise UserError(
                f"--model.teacher.name {self.name}: the server at {self.url} has {', '.join(models)}; name one"
            )
        self.positions = models[self.name].get("max_model_len")

    @torch.no_grad()
    def forward(self, batch: Batch, want: Collection[str] = ("logp",), temperature: float = 1.0) -> Outputs:
        if set(want) - {"logp"}:
            raise UserError(
                "--model.teacher ServedModel: a server gives log-probs of sampled tokens alone; set "
                "--model.divergence SampledReverseKL"
            )
        if temperature != 1.0:
            raise UserError(
                f"--model.sampling.temperature {temperature}: the log-probs of a server are those at 1; set it to 1"
            )
        tokens, on = batch.tokens.tolist(), (batch.weight > 0).tolist()
        responses = [(span, start, stop) for span in batch.structure() for _, start, stop in span.responses]
        asked = [(span, i, j) for span, i, j in responses if any(on[i:j])]
        logp = torch.zeros(len(batch))
        try:
            with ThreadPoolExecutor(self.requests) as pool:
                said = pool.map(self.log_probs, [tokens[s.start : s.cut] + tokens[i:j] for s, i, j in asked])
                for (_, start, stop), values in zip(asked, said, strict=True):
                    logp[start:stop] = torch.tensor(values[start - stop :])
        finally:
            self.client.tidy()
        return Outputs(torch.where(batch.weight > 0, logp.to(batch.weight.device), 0.0))

    def log_probs(self, tokens: Sequence[int]) -> list[float]:
        """Log-prob of each token after those before it, nats; 0 of the first.

        Raises:
            UserError: the server is gone, or takes no text of this length.
        """
        greedy = Sampling(max_new_tokens=1, temperature=0.0, seed=0)
        body = completion(str(self.name), list(tokens), 1, greedy, 0, 1, frozenset()) | {"prompt_logprobs": 0}
        try:
            rows = self.client.post("/v1/completions", body)["choices"][0]["prompt_logprobs"]
        except Slow as error:
            raise UserError(
                f"--model.teacher.url {self.url}: {error}; give --model.teacher.timeout more than {self.timeout:g}, or "
                f"fewer --model.teacher.requests than {self.requests}"
            ) from None
        except Unreachable as error:
            raise UserError(
                f"--model.teacher.url {self.url}: the server went away ({error}); start it again, and go on with "
                "--ckpt_path last"
            ) from None
        except Refused as refusal:
            raise UserError(
                f"--model.teacher.url {self.url}: it refuses a text of {len(tokens)} tokens ({refusal}); it takes one "
                "token more than a prompt with its answer: start it with a larger --max-model-len, or give "
                "--data.max_length less"
            ) from None
        return [0.0, *(float(row[str(token)]["logprob"]) for row, token in zip(rows[1:], tokens[1:], strict=True))]

    def generate(self, prompts: Sequence[list[int]], *args: Any, **kwargs: Any) -> list[list[Response]]:
        self._gives_no("answers")

    def save(self, folder: str | Path | None) -> None:
        self._gives_no("weights")

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.path} {self.name}".encode()).hexdigest()

    def _gives_no(self, what: str) -> NoReturn:
        raise UserError(f"ServedModel is a teacher and gives no {what}; use CausalLM")

    def __deepcopy__(self, memo: dict[int, Any]) -> ServedModel:
        return self  # an average of weights copies modules, and this one has locks and no weights
