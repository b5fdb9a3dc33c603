"""Every causal language model that transformers knows: exact in a packed forest, exact by rows, or refused in one line.

`LEYDEN_WRITE_DOCS=1 python -m pytest -m slow tests/test_architectures.py` also writes the table of
docs/architectures.md.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import NAMES, tiny_config
from small import Numbers
from test_attention import error, trees
from transformers import AutoModelForCausalLM

from leyden.batch.forest import pack
from leyden.errors import UserError
from leyden.models import CausalLM
from leyden.models.reference import remove_dropout
from leyden.policy.policy import Sampling

SECONDS = 240
"""Most time for one architecture"""
PROMPTS = [[5, 9, 2, 40, 7, 11], [60, 61, 62]]
PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"


def built(model_type: str) -> CausalLM:
    """A policy over random weights. Defaults are so small that a wrong mask would hardly matter."""
    torch.manual_seed(0)
    policy = CausalLM(path=model_type)
    policy._tokenizer = Numbers()  # type: ignore[assignment]
    policy.model = AutoModelForCausalLM.from_config(tiny_config(model_type)).eval()
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    policy._choose_attention()
    policy.train()
    remove_dropout(policy.model)
    return policy


def checked(policy: CausalLM) -> str:
    """Compare log-probs, gradients and what is told of samples with plain separate rows; the kind of attention."""
    batch = pack(trees())
    logp, gradient = error(policy, batch, batch)
    assert logp < 1e-4 and gradient < 1e-3, f"log-probs {logp:.1e}, gradients {gradient:.1e}"
    groups = policy.generate(PROMPTS, 2, Sampling(max_new_tokens=12, seed=1))
    for prompt, responses in zip(PROMPTS, groups, strict=True):
        with torch.no_grad(), policy.backbone.native_attention():
            for response in responses:
                ids = torch.tensor([prompt + response.tokens])
                plain = policy.model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
                own = plain[len(prompt) - 1 : -1].gather(-1, ids[0, len(prompt) :, None])[:, 0]
                told = (own - torch.tensor(response.logp)).abs().max()
                assert told < 1e-4, f"sampled log-probs {told:.1e}"
    return "rows" if policy.attention == "rows" else "forest"


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*args: Any) -> None:
        raise TimeoutError(f"more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def outcomes() -> Iterator[dict[str, str]]:
    """Model type -> what became of it; written to the docs where the environment asks for it."""
    found: dict[str, str] = {}
    yield found
    if os.environ.get("LEYDEN_WRITE_DOCS") and len(found) == len(NAMES):
        PAGE.write_text(PAGE.read_text(encoding="utf-8").split("## The table")[0] + table(found), encoding="utf-8")


def table(found: dict[str, str]) -> str:
    """The outcomes as a section of Markdown."""
    kinds = ("forest", "rows", "refused", "not tried")
    count = {kind: sum(outcome.startswith(kind) for outcome in found.values()) for kind in kinds}
    lines = [
        f"## The table\n\ntransformers {transformers.__version__}: {len(found)} model types, of which "
        f"{count['forest']} run as packed forests, {count['rows']} by rows, {count['refused']} are refused, and "
        f"{count['not tried']} have no small configuration to try.\n",
        "| model type | class | runs as |\n|---|---|---|",
        *(f"| {name} | {NAMES[name]} | {outcome} |" for name, outcome in sorted(found.items())),
    ]
    return "\n".join(lines) + "\n"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", sorted(NAMES))
def test_exact_or_refused(model_type: str, outcomes: dict[str, str]) -> None:
    try:
        AutoModelForCausalLM.from_config(tiny_config(model_type)).eval()(input_ids=torch.tensor([[5, 17, 3]]))
    except Exception as problem:  # whatever a configuration of unusual sizes ends in
        outcomes[model_type] = "not tried"
        pytest.skip(f"no small configuration: {str(problem).splitlines()[0]}")
    with time_limit(SECONDS):
        try:
            policy = built(model_type)
        except UserError as refusal:
            assert "\n" not in str(refusal)
            reason = str(refusal).removeprefix(f"{model_type}: ").partition("; use another")[0].partition(" (")[0]
            outcomes[model_type] = f"refused: {reason}"
            return
        outcomes[model_type] = checked(policy)
