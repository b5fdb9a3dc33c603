"""A stand-in for vLLM's server, in its own words (0.30): it samples from a real small Llama, and fails when it is told.

It needs numpy alone, so that it starts in half a second, and computes the model by itself, so that its log-probs are
a second opinion. `environment` makes what passes for a Python with vLLM; `Fake` is a server that runs already.

It keeps keys of whole blocks of a prompt as vLLM does, gives sample k the seed + k, and has a journal of what it did,
a line each, which outlives it. Faults come by the variable FAKE_VLLM, or by POST to /fake while it runs: see `Faults`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

BLOCK = 128
"""Tokens of a block of keys, as vLLM has on a processor."""
FAULTS, JOURNAL = "FAKE_VLLM", "FAKE_VLLM_JOURNAL"
Array = np.ndarray[Any, Any]


@dataclass
class Faults:
    """What goes wrong."""

    ignore_reload: bool = False
    """Reloads answer and do nothing"""
    keep_head: bool = False
    """Reloads leave the output head as it was"""
    keep_cache: bool = False
    """Emptying the cache of keys answers and does nothing"""
    busy_cache: bool = False
    """Emptying it answers that it could not be"""
    die_after: list[int | None] = field(default_factory=list)
    """Answers after which it is killed: of the first start, of the second and so on"""
    core_dies_after: list[int | None] = field(default_factory=list)
    """The same, but its engine dies first: HTTP 500, and an end a moment later"""
    slow: float = 0.0
    """Seconds that an answer takes longer"""
    refuse: tuple[int, str] | None = None
    """Status and reason with which requests for samples are refused"""
    vocabulary: int | None = None
    """Tokens from here on are unknown"""
    shifted: bool = False
    """Every token has the embedding of the one before: another vocabulary"""
    last_words: str = ""
    """What it says and ends with before it listens"""
    unable_from: int = 0
    """The start, counted from 0, from which it has last words"""
    deaf: bool = False
    """It never listens"""
    stubborn: bool = False
    """It ignores SIGTERM"""


class Llama:
    """A Llama's forward pass in float32.

    Args:
        weights: by their names in a checkpoint.
        config: its config.json.
    """

    def __init__(self, weights: Mapping[str, Array], config: Mapping[str, Any]) -> None:
        self.weights, self.config = dict(weights), config
        self.heads, self.groups = config["num_attention_heads"], config["num_key_value_heads"]
        self.width = config.get("head_dim") or config["hidden_size"] // self.heads
        theta = (config.get("rope_parameters") or config)["rope_theta"]
        self.frequencies = theta ** -(np.arange(0, self.width, 2) / self.width)

    @classmethod
    def load(cls, folder: str | Path) -> Llama:
        files = sorted(Path(folder).glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(folder)
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        weights = {name: x.astype(np.float32) for file in files for name, x in load_file(file).items()}
        if config["tie_word_embeddings"]:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        return cls(weights, config)

    def adapted(self, folder: str | Path) -> Llama:
        """With an adapter merged."""
        config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
        scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
        parts, weights = load_file(Path(folder) / "adapter_model.safetensors"), dict(self.weights)
        for name, down in parts.items():
            if ".lora_A." in name:
                target = name.removeprefix("base_model.model.").replace(".lora_A", "")
                up = parts[name.replace("lora_A", "lora_B")]
                weights[target] = weights[target] + np.float32(scale) * (up @ down).astype(np.float32)
        return Llama(weights, self.config)

    def __call__(self, tokens: Array, keys: Array) -> tuple[Array, Array]:
        """Logits after the last token [b, v], and keys and values with those of the new tokens.

        Args:
            tokens: [b, t].
            keys: of the tokens before: [layers, 2, b, groups, s, width].
        """
        at, kept = keys.shape[-2], []
        angle = np.outer(np.arange(at, at + tokens.shape[1]), self.frequencies)
        turn = np.concatenate([angle, angle], -1)
        rope = np.cos(turn).astype(np.float32), np.sin(turn).astype(np.float32)
        x = self.weights["model.embed_tokens.weight"][tokens]
        for layer, before in enumerate(keys):
            name = f"model.layers.{layer}."
            mixed, new = self._attend(self._norm(x, name + "input_layernorm"), name + "self_attn.", before, rope)
            kept.append(new)
            x = x + mixed
            y = self._norm(x, name + "post_attention_layernorm")
            gate = self._linear(y, name + "mlp.gate_proj")
            x = x + self._linear(gate / (1 + np.exp(-gate)) * self._linear(y, name + "mlp.up_proj"),
                                 name + "mlp.down_proj")  # fmt: skip
        return self._linear(self._norm(x[:, -1], "model.norm"), "lm_head"), np.stack(kept)

    def no_keys(self) -> Array:
        return np.zeros((self.config["num_hidden_layers"], 2, 1, self.groups, 0, self.width), np.float32)

    def _attend(self, x: Array, name: str, before: Array, rope: tuple[Array, Array]) -> tuple[Array, Array]:
        b, t, _ = x.shape

        def heads(part: str, count: int) -> Array:
            return self._linear(x, name + part).reshape(b, t, count, self.width).swapaxes(1, 2)

        q, k, v = heads("q_proj", self.heads), heads("k_proj", self.groups), heads("v_proj", self.groups)
        q, k = (y * rope[0] + np.concatenate([-y[..., self.width // 2 :], y[..., : self.width // 2]], -1) * rope[1]
                for y in (q, k))  # fmt: skip
        new = np.concatenate([before, np.stack([k, v])], -2)
        k, v = (np.repeat(y, self.heads // self.groups, 1) for y in new)
        scores = q @ k.swapaxes(-1, -2) / np.float32(self.width**0.5)
        hidden = np.triu(np.ones(scores.shape[-2:], bool), scores.shape[-1] - t + 1)
        scores = np.where(hidden, np.float32(-1e30), scores)
        share = np.exp(scores - scores.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        return self._linear((share @ v).swapaxes(1, 2).reshape(b, t, -1), name + "o_proj"), new

    def _norm(self, x: Array, name: str) -> Array:
        size = np.sqrt((x**2).mean(-1, keepdims=True) + np.float32(self.config["rms_norm_eps"]))
        return x / size * self.weights[name + ".weight"]

    def _linear(self, x: Array, name: str) -> Array:
        return x @ self.weights[name + ".weight"].T


class Refusal(Exception):
    """An answer of 400 or above."""

    def __init__(self, status: int, message: str, kind: str = "BadRequestError") -> None:
        super().__init__(message)
        self.status, self.body = status, {"error": {"message": message, "type": kind, "param": None, "code": status}}


class Engine:
    """What a server does, without HTTP.

    Args:
        given: its command line.
        faults: what goes wrong.
    """

    def __init__(self, given: argparse.Namespace, faults: Faults) -> None:
        self.given, self.faults, self.lock = given, faults, threading.Lock()
        self.starts = starts()
        self.model = self._load(given.model)
        self.adapters: dict[str, Llama] = {}
        self.keys: dict[Any, Array] = {}
        self.answers = self.running = 0
        self.dead = False
        self.write("start", pid=os.getpid(), model=os.path.realpath(given.model))

    def write(self, did: str, **more: Any) -> None:
        if JOURNAL in os.environ:
            line = json.dumps({"did": did, "port": self.given.port, **more}) + "\n"
            place = os.open(os.environ[JOURNAL], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(place, line.encode())
            os.close(place)

    def _load(self, folder: str) -> Llama:
        model = Llama.load(folder)
        if self.faults.shifted:
            name = "model.embed_tokens.weight"
            model.weights[name] = np.roll(model.weights[name], 1, 0)
        return model

    # -- control -----------------------------------------------------------------------------------------------------

    def reload(self, call: Mapping[str, Any]) -> dict[str, Any]:
        folder, head = call["kwargs"]["weights_path"], self.model.weights["lm_head.weight"]
        self.write("reload", path=folder)
        if not Path(folder).is_dir():
            self.dead = True
            said = (
                "Repo id must use alphanumeric chars, '-', '_' or '.'. The name cannot start or end with '-' or '.' "
                f"and the maximum length is 96: '{folder}'."
            )
            said = f"Call to collective_rpc method failed: Worker failed with error '{said}', please check the stack"
            raise Refusal(500, f"{said} trace above for the root cause", "InternalServerError")
        if not self.faults.ignore_reload:
            self.model = self._load(folder)
        if self.faults.keep_head:
            self.model.weights["lm_head.weight"] = head
        return {"results": [None]}

    def reset(self) -> dict[str, Any]:
        self.write("reset")
        if self.faults.busy_cache or self.running:
            return {"success": False}
        if not self.faults.keep_cache:
            self.keys = {}
        return {"success": True}

    def load_adapter(self, call: Mapping[str, Any]) -> str:
        name, folder = call["lora_name"], Path(call["lora_path"])
        if name in self.adapters:
            said = "If you want to load the adapter in place, set 'load_inplace' to True."
            raise Refusal(400, f"The lora adapter '{name}' has already been loaded. {said}", "InvalidUserInput")
        if not (folder / "adapter_config.json").is_file():
            raise Refusal(404, f"Loading lora {name} failed: No adapter found for {folder}", "NotFoundError")
        rank = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["r"]
        if rank > self.given.max_lora_rank:
            said = (
                f"Worker failed with error 'LoRA rank {rank} is greater than max_lora_rank {self.given.max_lora_rank}.'"
            )
            said = f"Call to add_lora method failed: {said}, please check the stack trace above for the root cause"
            raise Refusal(500, said, "InternalServerError")
        self.write("load", name=name)
        self.adapters[name] = self.model if self.faults.ignore_reload else self.model.adapted(folder)
        return f"Success: LoRA adapter '{name}' added successfully."

    def unload_adapter(self, call: Mapping[str, Any]) -> str:
        name = call["lora_name"]
        if name not in self.adapters:
            raise Refusal(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
        self.write("unload", name=name)
        del self.adapters[name]
        return f"Success: LoRA adapter '{name}' removed successfully."

    # -- samples -----------------------------------------------------------------------------------------------------

    def check(self, asked: Mapping[str, Any]) -> Llama:
        """The model that a request is for.

        Raises:
            Refusal: vLLM would not take it.
        """
        if self.dead:
            raise self._end()
        if self.faults.refuse:
            raise Refusal(*self.faults.refuse)
        names = {self.given.served_model_name or self.given.model: self.model} | self.adapters
        if asked["model"] not in names:
            raise Refusal(404, f"The model `{asked['model']}` does not exist.", "NotFoundError")
        model, prompt, wanted, most = names[asked["model"]], asked["prompt"], asked["max_tokens"], self.longest
        for token in prompt:
            if token >= (self.faults.vocabulary or model.config["vocab_size"]):
                raise Refusal(400, f"Token id {token} is out of vocabulary")
        if len(prompt) + wanted > most:
            raise Refusal(
                400,
                f"This model's maximum context length is {most} tokens. However, you requested {wanted} output tokens "
                f"and your prompt contains {len(prompt)} input tokens, for a total of {len(prompt) + wanted} tokens. "
                "Please reduce the length of the input prompt or the number of requested output tokens. "
                f"(parameter=input_tokens, value={len(prompt)})",
            )
        if asked["temperature"] == 0 and asked["n"] > 1:
            raise Refusal(400, f"n must be 1 when using greedy sampling, got {asked['n']}.")
        return model

    @property
    def longest(self) -> int:
        return int(self.given.max_model_len or self.model.config["max_position_embeddings"])

    def complete(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """The samples that were asked for."""
        model = self.check(asked)
        time.sleep(self.faults.slow)
        with self.lock:
            self.running += 1
        try:
            tokens, logp = self.sample(model, asked)
        finally:
            with self.lock:
                self.running -= 1
        known = {"prompt_logprobs": self.likely(model, asked["prompt"])} if "prompt_logprobs" in asked else {}
        choices = []
        for k, (mine, said) in enumerate(zip(tokens, logp, strict=True)):
            ended = "stop" if self.has_ended(mine, asked) else "length"
            choices.append({"index": k, "text": "", "finish_reason": ended, "token_ids": mine,
                            "logprobs": {"token_logprobs": said}, **known})  # fmt: skip
        return {"object": "text_completion", "model": asked["model"], "choices": choices[::-1]}

    def die_if_due(self) -> None:
        """To be called with the lock, so that what was answered is in the journal too."""

        def due(after: list[int | None]) -> bool:
            most = after[self.starts] if self.starts < len(after) else None
            return most is not None and self.answers >= most

        if due(self.faults.die_after):
            os.kill(os.getpid(), signal.SIGKILL)
        if due(self.faults.core_dies_after):
            raise self._end()

    def _end(self) -> Refusal:
        """What it says when its engine has ended, and it is about to."""
        self.dead = True
        threading.Timer(0.3, os._exit, [1]).start()
        said = "EngineCore encountered an issue. See stack trace (above) for the root cause."
        return Refusal(500, said, "InternalServerError")

    def sample(self, model: Llama, asked: Mapping[str, Any]) -> tuple[list[list[int]], list[list[float]]]:
        """Token ids and their log-probs, of n samples: each by its own noise, whatever else is being sampled."""
        n = asked["n"]
        noise = [np.random.default_rng(asked["seed"] + k) for k in range(n)]
        logits, keys = self.read(model, asked["model"], asked["prompt"])
        logits, keys = np.repeat(logits, n, 0), np.repeat(keys, n, 2)
        tokens: list[list[int]] = [[] for _ in range(n)]
        said: list[list[float]] = [[] for _ in range(n)]
        for _ in range(asked["max_tokens"]):
            logp = processed(logits.astype(np.float64), asked)
            drawn = [int(np.argmax(row)) if asked["temperature"] == 0 else draw(row, one)
                     for row, one in zip(logp, noise, strict=True)]  # fmt: skip
            for k, token in enumerate(drawn):
                if not tokens[k] or not self.has_ended(tokens[k], asked):
                    tokens[k].append(token)
                    said[k].append(float(logp[k, token]))
            if all(self.has_ended(mine, asked) for mine in tokens):
                break
            logits, keys = model(np.array(drawn)[:, None], keys)
        return tokens, said

    def has_ended(self, tokens: list[int], asked: Mapping[str, Any]) -> bool:
        """Whether a response ends with a stop token, or has a stop string."""
        if tokens[-1] in asked["stop_token_ids"]:
            return True
        if not asked.get("stop"):
            return False
        from tokenizers import Tokenizer  # only where texts are asked for

        text = Tokenizer.from_file(f"{self.given.model}/tokenizer.json").decode(tokens)
        return any(stop in text for stop in asked["stop"])

    def likely(self, model: Llama, prompt: list[int]) -> list[Any]:
        """What it says of each token of a prompt, but for the first."""
        said: list[Any] = [None]
        for at, token in enumerate(prompt[1:], start=1):
            logp = processed(model(np.array([prompt[:at]]), model.no_keys())[0].astype(np.float64), {"temperature": 1})
            said.append({str(token): {"logprob": float(logp[0, token]), "rank": 1, "decoded_token": ""}})
        return said

    def read(self, model: Llama, name: str, prompt: list[int]) -> tuple[Array, Array]:
        """Logits after a prompt, and its keys: those of whole blocks come from the cache where they are there."""
        whole = (len(prompt) - 1) // BLOCK * BLOCK
        before, known = model.no_keys(), (name, *prompt[:whole])
        if whole and (cached := self.keys.get(known)) is not None:
            before = cached
        logits, keys = model(np.array([prompt[before.shape[-2] :]]), before)
        if whole:
            self.keys[known] = keys[..., :whole, :]
        return logits, keys


def processed(logits: Array, asked: Mapping[str, Any]) -> Array:
    """Log-probs after temperature and truncation."""
    logits = logits / (asked["temperature"] or 1.0)
    if 0 < (k := asked.get("top_k", -1)) < logits.shape[-1]:
        logits = np.where(logits < np.sort(logits, -1)[:, -k, None], -np.inf, logits)
    logp: Array = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
    return logp


def draw(logp: Array, noise: np.random.Generator) -> int:
    """A token."""
    share = np.cumsum(np.exp(logp))
    return min(int(np.searchsorted(share, noise.random() * share[-1], "right")), len(share) - 1)


def starts() -> int:
    """How often a server was started before."""
    return sum(row["did"] == "start" for row in journal(os.environ.get(JOURNAL)))


class Handler(BaseHTTPRequestHandler):
    """vLLM's paths."""

    protocol_version, engine = "HTTP/1.1", None
    disable_nagle_algorithm = True
    engine: Engine  # type: ignore[no-redef]

    def log_message(self, format: str, *args: Any) -> None:
        print(f"INFO: {format % args}", flush=True)

    def do_GET(self) -> None:
        name = self.engine.given.served_model_name or self.engine.given.model
        models = [{"id": one, "max_model_len": self.engine.longest} for one in (name, *self.engine.adapters)]
        found: dict[str, Any] = {
            "/health": "",
            "/version": {"version": "0.30.0"},
            "/v1/models": {"object": "list", "data": models},
            "/fake": {"pid": os.getpid(), "answers": self.engine.answers, "environment": dict(os.environ)},
        }
        if self.path == "/health" and self.engine.dead:
            self._say(503, "")
        elif self.path in found:
            self._say(200, found[self.path])
        else:
            self._say(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        engine = self.engine
        paths = {"/v1/completions": lambda: engine.complete(body), "/fake": lambda: self._fault(body)}
        if os.environ.get("VLLM_SERVER_DEV_MODE") == "1":
            paths |= {"/collective_rpc": lambda: engine.reload(body), "/reset_prefix_cache": engine.reset}
        if engine.given.enable_lora and os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING") == "1":
            paths["/v1/load_lora_adapter"] = lambda: engine.load_adapter(body)
            paths["/v1/unload_lora_adapter"] = lambda: engine.unload_adapter(body)
        if self.path not in paths:
            return self._say(404, {"detail": "Not Found"})
        try:
            found = paths[self.path]()
            with engine.lock if self.path == "/v1/completions" else nullcontext():
                if self.path == "/v1/completions":
                    engine.die_if_due()
                self._say(200, found)
                if self.path == "/v1/completions":
                    engine.answers += 1
                    engine.write("answer", n=body["n"], seed=body["seed"], model=body["model"])
        except Refusal as refusal:
            self._say(refusal.status, refusal.body)

    def _fault(self, changed: Mapping[str, Any]) -> dict[str, Any]:
        self.engine.faults = replace(self.engine.faults, **changed)
        return {}

    def _say(self, status: int, found: Any) -> None:
        data = (found if isinstance(found, str) else json.dumps(found)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "text/plain" if isinstance(found, str) else "application/json")
        self.end_headers()
        self.wfile.write(data)


class Listener(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 512

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # whoever asked has gone


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "host", "served-model-name"):
        parser.add_argument(f"--{name}")
    for name in ("port", "max-model-len", "max-lora-rank"):
        parser.add_argument(f"--{name}", type=int, default=16 if name == "max-lora-rank" else None)
    parser.add_argument("--enable-lora", action="store_true")
    given, _ = parser.parse_known_args()
    faults = Faults(**json.loads(os.environ.get(FAULTS, "{}")))
    if faults.stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if faults.last_words and starts() >= faults.unable_from:
        print(faults.last_words, flush=True)
        raise SystemExit(1)
    if faults.deaf:
        time.sleep(600)
    Handler.engine = Engine(given, faults)
    Listener((given.host, given.port), Handler).serve_forever()


# -- for tests ---------------------------------------------------------------------------------------------------------


def environment(folder: Path, version: str = "0.30.0+cpu") -> str:
    """The folder of an environment whose Python has the stand-in for vLLM."""
    package = folder / "site" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for place in (package, package.parent, package.parent.parent):
        (place / "__init__.py").write_text("")
    run = f"import runpy\n\nrunpy.run_path({str(Path(__file__).resolve())!r}, run_name='__main__')\n"
    (package / "api_server.py").write_text(run)
    about = folder / "site" / f"vllm-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{folder / "site"}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return str(folder)


def journal(file: str | Path | None) -> list[dict[str, Any]]:
    """What servers did, in order."""
    if file is None or not Path(file).is_file():
        return []
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


class Fake:
    """A server that runs already, as somebody else's would.

    Args:
        model: the folder of a Llama.
        port: where it listens.
        log: where its journal goes.
        faults: see `Faults`.
        variables: more of its environment; by default those of a server that takes weights over.
        options: more of its command line.
    """

    def __init__(self, model: str, port: int, log: Path, faults: Mapping[str, Any] | None = None,
                 variables: Mapping[str, str] | None = None, options: tuple[str, ...] = ()) -> None:  # fmt: skip
        usual = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        own = {JOURNAL: str(log), FAULTS: json.dumps(faults or {})} | dict(usual if variables is None else variables)
        command = [sys.executable, __file__, "--model", model, "--host", "127.0.0.1", "--port", str(port), *options]
        self.process = subprocess.Popen(command, env=os.environ | own, stdout=subprocess.DEVNULL)
        self.url, self.port = f"http://127.0.0.1:{port}", port
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                self.ask("GET", "/health")
                return
            except OSError:
                time.sleep(0.02)
        raise TimeoutError(self.url)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        return ask(self.port, method, path, body)

    def __enter__(self) -> Fake:
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.wait()


def ask(port: int, method: str, path: str, body: Any = None) -> Any:
    """What a server answers."""
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, json.dumps(body or {}), {"Content-Type": "application/json"})
    text = connection.getresponse().read().decode()
    connection.close()
    return json.loads(text) if text.startswith(("{", "[")) else text


if __name__ == "__main__":
    main()
