"""A teacher behind a vLLM server, against the same model in this process; by a stand-in for the server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import Fake
from small import fit, save_llama, weights_of
from test_vllm import Questions

from leyden.algos import Distillation
from leyden.batch import Tree, pack
from leyden.divergences import ReverseKL, SampledReverseKL
from leyden.errors import UserError
from leyden.models import CausalLM
from leyden.models.engines import ServedModel
from leyden.models.engines.server import free_port
from leyden.policy.policy import Sampling

SHORT = Sampling(max_new_tokens=5)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_llama(folder / "student", 0.1)
    save_llama(folder / "teacher", 0.2)
    return folder


@pytest.fixture
def server(models: Path, tmp_path: Path) -> Any:
    with Fake(str(models / "teacher"), free_port("127.0.0.1"), tmp_path / "journal.jsonl") as fake:
        yield fake


def distilled(models: Path, teacher: Any, **options: Any) -> Any:
    given: dict[str, Any] = dict(divergence=SampledReverseKL(), samples=2, minibatches=2, sampling=SHORT)
    given |= dict(lr_scheduler=None, keep_rollouts=False, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2, eps=1e-3))
    return Distillation(CausalLM(str(models / "student")), teacher=teacher, **(given | options))


def test_a_served_teacher_is_the_model_itself(models: Path, server: Any) -> None:
    """Of every token, weights of 0 and prompts of one token among them; and after training by it."""
    served, here = ServedModel(str(models / "teacher"), server.url), CausalLM(str(models / "teacher"))
    served.build()
    here.build()
    trees = [Tree([5, 6, 7], [[8, 9], [10, 11, 12]], weights=[[1.0, 1.0], [1.0, 0.0, 1.0]]), Tree([4], [[20]])]
    batch = pack([*trees, Tree([30, 31], [])], length=20)
    with torch.no_grad():
        torch.testing.assert_close(served(batch).logp, here(batch).logp, atol=1e-5, rtol=0)
    assert not list(served.parameters()) and served.positions == 512
    ends = []
    for teacher in (served, CausalLM(str(models / "teacher"))):
        found = distilled(models, teacher)
        fit(found, Questions(4, size=4), max_epochs=2)
        ends.append(weights_of(found.policy))
    torch.testing.assert_close(ends[0], ends[1], atol=1e-4, rtol=0)


def test_what_a_served_teacher_cannot_do(models: Path, server: Any) -> None:
    teacher = str(models / "teacher")
    port = free_port("127.0.0.1")
    wrong: list[tuple[Any, str]] = [
        (lambda: ServedModel(teacher, "not a url"), "give the address of a server"),
        (lambda: ServedModel(teacher, server.url, requests=0), "give 1 or more"),
        (lambda: ServedModel(teacher, f"http://127.0.0.1:{port}").build(), "no server answers there"),
        (lambda: ServedModel(teacher, server.url, "other").build(), "the server at .* has .*; name one"),
        (lambda: ServedModel(teacher, server.url).generate([[1]]), "gives no answers"),
        (lambda: ServedModel(teacher, server.url).save("x"), "gives no weights"),
    ]
    for make, message in wrong:
        with pytest.raises(UserError, match=message):
            make()
    for options, message in (
        ({"divergence": ReverseKL()}, "set --model.divergence SampledReverseKL"),
        (
            {"sampling": Sampling(max_new_tokens=4, temperature=0.7)},
            "SampledReverseKL and --model.sampling.temperature 1",
        ),
    ):
        with pytest.raises(UserError, match=message):
            fit(distilled(models, ServedModel(teacher, server.url), **options), Questions(4, size=4), max_epochs=1)


def test_a_server_that_refuses_or_goes_says_what_to_do(models: Path, server: Any) -> None:
    served = ServedModel(str(models / "teacher"), server.url)
    served.build()
    with pytest.raises(UserError, match=r"refuses a text of 512 tokens .* larger --max-model-len"):
        served.log_probs([5] * 512)
    server.process.kill()
    server.process.wait()
    with pytest.raises(UserError, match="the server went away"):
        served.log_probs([5, 6])
    served.client.close()
