"""vLLM in the process that trains: one GPU for both, in turn."""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from leyden.errors import UserError, first_line
from leyden.models.causal_lm import CausalLM
from leyden.models.engines.published import base_of, check_policy, config_of, lora_room, publish_adapter, weights
from leyden.models.engines.requests import request_seed
from leyden.models.engines.vllm import computed_in
from leyden.policy.engine import Engine, OnProgress
from leyden.policy.policy import Policy, Response, Sampling


class ColocatedVLLM(Engine):
    """Samples with a vLLM in this very process, which must be installed beside Leyden. It gets the weights without a
    detour by a disk, and sleeps while training needs the GPU's memory: the weights then wait in the machine's.

    Args:
        dtype: in which it computes; `auto` is that of training's forward pass.
        memory: the share of the GPU's memory that it may take; on a processor GiB for its cache of keys.
        max_length: most tokens of a prompt and its response; None is what the data may ask for.
        options: more arguments of `vllm.LLM`.
    """

    runs_policy: ClassVar[bool] = False
    at_once: ClassVar[int] = 2048

    def __init__(
        self,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        memory: float | None = None,
        max_length: int | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        if memory is not None and memory <= 0:
            raise UserError(f"ColocatedVLLM: memory {memory}: give more than 0")
        self.dtype, self.memory, self.max_length, self.options = dtype, memory, max_length, dict(options or {})
        self._llm: Any = None
        self._policy: CausalLM | None = None
        self._adapter: Any = None
        self._scratch, self._run, self._version = Path(), "", 0
        self._exact = self._asleep = False

    def is_exact(self, policy: Policy) -> bool:
        return self._exact

    def start(self, policy: Policy, folder: Path, longest: int) -> None:
        policy = check_policy(policy)
        if find_spec("vllm") is None:
            raise UserError(
                "ColocatedVLLM: no vLLM in this environment; install it beside Leyden (for processors: make vllm), or "
                "use --config vllm, whose server may have an environment of its own"
            )
        computes = getattr(torch, self.dtype, None) or computed_in(policy)
        self._exact = computes == computed_in(policy) == torch.float32
        self._scratch, self._run = Path(tempfile.mkdtemp(prefix="leyden-")), uuid.uuid4().hex[:8]
        length = min(self.max_length or longest, policy.positions or self.max_length or longest)
        options = self._options(policy, computes, length) | self.options
        with _apart(VLLM_CPU_KVCACHE_SPACE=str(max(1, round(self.memory or 1)))):
            from vllm import LLM

            try:
                self._llm = LLM(**options)
            except (ValueError, RuntimeError, OSError) as error:
                raise UserError(
                    f"ColocatedVLLM: vLLM does not start ({first_line(error)}); see --model.engine.memory and "
                    "--model.engine.options"
                ) from error

    def _options(self, policy: CausalLM, computes: torch.dtype, longest: int) -> dict[str, Any]:
        base, cuda = base_of(policy), policy.device.type == "cuda"
        options: dict[str, Any] = {
            "model": base or self._skeleton(policy),
            "dtype": str(computes).removeprefix("torch."),
            "max_model_len": longest,
            "logprobs_mode": "processed_logprobs",  # of the distribution that is sampled from
            "generation_config": "vllm",
            "skip_tokenizer_init": True,
            "trust_remote_code": bool(policy.source["trust_remote_code"]),
        }
        if base is None:  # its weights come from here
            options |= {"load_format": "dummy"}
        if policy.backbone.adapted:
            options |= {"enable_lora": True, "max_lora_rank": lora_room(policy), "max_loras": 1}
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            options["distributed_executor_backend"] = "external_launcher"  # each process has one of its own
        if cuda:
            return options | {"enable_sleep_mode": True, "gpu_memory_utilization": self.memory or 0.3}
        # a seeded request whose prompt is cut in chunks ends the engine on a processor
        most = max(4096, 4 * longest)
        return options | {"enforce_eager": True, "enable_chunked_prefill": False, "max_num_batched_tokens": most}

    def _skeleton(self, policy: CausalLM) -> str:
        """A folder that says how the model is built, and has no weights."""
        folder = self._scratch / "model"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config_of(policy), indent=2), encoding="utf-8")
        return str(folder)

    def sync(self, policy: Policy) -> None:
        policy = self._policy = check_policy(policy)
        self._wake()
        self._version += 1
        if not policy.backbone.adapted or (self._version == 1 and base_of(policy) is None):
            with _apart():
                self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights(policy)})
        if policy.backbone.adapted:
            from vllm.lora.request import LoRARequest

            name, folder = f"{self._run}-{self._version}", self._scratch / f"a{self._version}"
            publish_adapter(policy, folder, writes=True)
            shutil.rmtree(self._scratch / f"a{self._version - 1}", ignore_errors=True)
            self._adapter = LoRARequest(name, self._version, str(folder))
        elif not self._llm.reset_prefix_cache():
            raise UserError("ColocatedVLLM: its cache of keys could not be emptied")

    def generate(
        self,
        prompts: Sequence[list[int]],
        n: int,
        sampling: Sampling,
        keys: Sequence[int],
        on_progress: OnProgress | None = None,
    ) -> list[list[Response]]:
        from vllm import SamplingParams

        assert self._policy is not None
        self._wake()
        policy, stop = self._policy, sorted(self._policy.stop)
        how = [
            SamplingParams(
                n=n,
                max_tokens=min(sampling.max_new_tokens, (policy.positions or 1 << 30) - len(prompt)),
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k or -1,
                seed=request_seed(sampling.seed, key),
                logprobs=0,
                stop_token_ids=stop,
                ignore_eos=True,
                detokenize=False,
            )
            for prompt, key in zip(prompts, keys, strict=True)
        ]
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        with _apart():
            found = self._llm.generate(asked, how, use_tqdm=False, lora_request=self._adapter)
        (on_progress or (lambda count: None))(n * len(prompts))
        return [[self._response(one) for one in sorted(r.outputs, key=lambda one: int(one.index))] for r in found]

    def _response(self, found: Any) -> Response:
        assert self._policy is not None
        tokens = [int(token) for token in found.token_ids]
        logp = [float(each[token].logprob) for token, each in zip(tokens, found.logprobs, strict=True)]
        return self._policy.response(tokens, logp, found.finish_reason == "stop")

    def rest(self) -> None:
        if self._llm is not None and not self._asleep and torch.cuda.is_available():
            self._llm.sleep(level=1)
            self._asleep = True

    def _wake(self) -> None:
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False

    def stop(self) -> None:
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
        self._llm = self._adapter = None
        self._version, self._asleep = 0, False
        if self._scratch.name.startswith("leyden-"):
            shutil.rmtree(self._scratch, ignore_errors=True)


@contextmanager
def _apart(**variables: str) -> Iterator[None]:
    """Leave everything of this process as it was: vLLM seeds the generators, and draws from them as it samples; on a
    processor it takes the setting of threads for itself.

    Args:
        variables: of the environment, inside.
    """
    quiet = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    } | variables
    before = {name: os.environ.get(name) for name in quiet}
    os.environ |= {name: value for name, value in quiet.items() if name not in os.environ}
    threads, count, python = torch.set_num_threads, torch.get_num_threads(), random.getstate()
    states = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        torch.set_num_threads = threads
        if torch.get_num_threads() != count:
            threads(count)
        random.setstate(python)
        torch.set_rng_state(states[0])
        if states[1]:
            torch.cuda.set_rng_state_all(states[1])
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
