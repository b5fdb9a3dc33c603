"""Scalar heads on a model's hidden states, and checks that a model can become a reward model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from leyden.batch.forest import Batch
from leyden.errors import UserError
from leyden.models.backbone import Backbone
from leyden.models.load import is_reward
from leyden.policy.policy import Labels

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCORE = "score.weight"
ONE = Labels()
TOLD = "labels"
"""Key of the labels in the metadata of an adapter's weights"""


def make_head(width: int, outputs: int = 1) -> nn.Linear:
    """A new head for hidden states of width H: fp32, no bias, weights from N(0, 1 / (H + 1)) (Stiennon et al. 2020)."""
    head = nn.Linear(width, outputs, bias=False, dtype=torch.float32)
    nn.init.normal_(head.weight, std=(width + 1) ** -0.5)
    return head


def start_head(
    width: int, name: str, path: str, revision: str | None = None, labels: Labels = ONE
) -> tuple[nn.Linear, bool]:
    """The initial head of this name, and whether it is new.

    If the folder has such a head, its weights are used. A value head without saved weights starts from the folder's
    score head, if there is one. A new value head is 0, since any other start would be noise in the advantages. Random
    weights are drawn on the CPU, so that a run starts alike on every device.
    """
    device = torch.get_default_device()
    with torch.device("cpu"):
        head = make_head(width, len(labels.names))
    head, names = head.to(device), (name, "score") if name == "value" else (name,)
    heads = (saved_head(path, kind, revision, labels) for kind in names)
    saved = next((weight for weight in heads if weight is not None), None)
    with torch.no_grad():
        if saved is not None:
            head.weight.copy_(saved)
        elif name == "value":
            head.weight.zero_()
    return head, saved is None


def predicted(batch: Batch) -> tuple[Tensor, float]:
    """Indices of the predicted tokens with a nonzero weight, and the factor 1 for outputs there.

    If there are none, one index and the factor 0: the product still gives every parameter a gradient, for which other
    ranks wait.
    """
    if len(at := batch.predicted()):
        return at, 1.0
    return torch.zeros(1, dtype=torch.long, device=batch.tokens.device), 0.0


def placed(batch: Batch, at: Tensor, x: Tensor) -> Tensor:
    """[T] with `x` at the indices `at` and 0 elsewhere."""
    return x.new_zeros(len(batch)).index_put((at,), x)


def saved_head(path: str, name: str, revision: str | None = None, labels: Labels | None = None) -> Tensor | None:
    """Weights [K, H] of the head of this name in a folder or in the files of a hub name loaded before; None if absent.

    Args:
        labels: what it has to give; None takes any.

    Raises:
        UserError: the folder is declared a reward model but has no such head, or one that gives something else.
    """
    folder = _folder(path, revision)
    if folder is None:
        return None
    weight = _find_tensor(folder, {f"{name}.weight", f"base_model.model.{name}.weight"})
    if weight is None and name == "score" and is_reward(str(folder)):
        raise UserError(
            f"{path}: it says that it is a reward model, but has no {SCORE} in safetensors files; export it again, or "
            "give the model that it was made from"
        )
    if weight is not None and labels is not None:
        _check_labels(path, weight, labels, saved_labels(path, revision))
    return weight


def _check_labels(path: str, weight: Tensor, asked: Labels, saved: Labels | None) -> None:
    """That a head gives what is asked of it. The name of a single number says nothing."""
    known = saved.names if saved is not None else ()
    if asked.names == ONE.names and (weight.ndim != 2 or len(weight) != 1):
        raise UserError(
            f"{path}: its head is {list(weight.shape)}, but a reward is one number; use another model, or score with "
            "--model.reward Classifier"
        )
    if len(weight) != len(asked.names) or (len(known) > 1 and known != asked.names):
        gives = ", ".join(known) if len(known) == len(weight) else f"{len(weight)} numbers"
        raise UserError(
            f"{path}: its head gives {gives}, but {', '.join(asked.names)} is to be learnt; give the same in the same "
            "order, or a model without a head"
        )


def saved_labels(path: str, revision: str | None = None) -> Labels | None:
    """What the head of a sequence classifier gives, as its configuration says, or the file of an adapter; None for
    other models, and where neither says it."""
    from transformers import PreTrainedConfig

    if not is_reward(path, revision):
        return None
    if (Path(path) / "adapter_config.json").is_file():
        return _adapter_labels(Path(path))
    config, _ = PreTrainedConfig.get_config_dict(path, revision=revision)
    names = config.get("id2label") or {0: "LABEL_0", 1: "LABEL_1"}  # two is what transformers leaves out
    in_order = tuple(str(names[place]) for place in sorted(names, key=int))
    return Labels(in_order, config.get("problem_type") or "regression")


def _adapter_labels(folder: Path) -> Labels | None:
    from safetensors import safe_open

    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        return None
    with safe_open(file, "pt") as tensors:
        told = (tensors.metadata() or {}).get(TOLD)
    return None if told is None else Labels(tuple(json.loads(told)["names"]), json.loads(told)["problem"])


def _folder(path: str, revision: str | None) -> Path | None:
    """The local folder, or the hub library's local files of a hub name."""
    from huggingface_hub import snapshot_download

    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        return None


def _find_tensor(folder: Path, names: set[str]) -> Tensor | None:
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for key in names & set(tensors.keys()):
                tensor: Tensor = tensors.get_tensor(key)
                return tensor
    return None


def check_reward(backbone: Backbone) -> None:
    """Check before hours of training that the model can be exported as a reward model.

    Raises:
        UserError: transformers has no sequence classifier for the model, or the adapter changes more than its body.
    """
    base, classifier = backbone.base, blank(backbone).state_dict()
    if not backbone.adapted:
        if set(classifier) != {SCORE, *body_of(base)}:
            raise _refusal(backbone)
        return
    body = {id(p) for p in base.base_model.parameters()}
    outside = [name for name, p in backbone.model.named_parameters() if p.requires_grad and id(p) not in body]
    if outside:
        raise UserError(
            f"{backbone.path}: the adapter changes {outside[0]}, which a reward model does not have; name only layers "
            "of the body in --model.policy.adapter.target_modules and modules_to_save"
        )


def check_language(backbone: Backbone) -> None:
    """Check that the model has a trained language-model head: a reward model's folder has none, unless it is tied.

    Raises:
        UserError: there is none, so log-probabilities would come from random weights.
    """
    base = backbone.base
    tied = base.get_output_embeddings().weight is base.get_input_embeddings().weight
    if not tied and any("ForSequenceClassification" in name for name in base.config.architectures or ()):
        raise UserError(
            f"{backbone.path}: a reward model, which has no language-model head and so no answers; give "
            "--model.policy.path the model that it was made from"
        )


def _refusal(backbone: Backbone) -> UserError:
    name = type(backbone.base).__name__
    return UserError(
        f"{backbone.path}: transformers has no sequence classification with one score for {name}, so a reward model "
        "of it could not be loaded elsewhere; use a model of another family, such as Llama, Qwen or Gemma"
    )


def body_of(base: PreTrainedModel) -> dict[str, Tensor]:
    """The body's tensors under their names in the whole model."""
    return base.base_model.state_dict(prefix=f"{base.base_model_prefix}.")  # type: ignore[no-any-return]


def name_labels(config: Any, labels: Labels) -> None:
    """Write labels into a configuration, as transformers names them; of `regression` pipelines return plain numbers."""
    config.num_labels, config.problem_type = len(labels.names), labels.problem
    config.id2label, config.label2id = dict(enumerate(labels.names)), {name: i for i, name in enumerate(labels.names)}


def blank(backbone: Backbone, pad: int | None = None, labels: Labels = ONE) -> PreTrainedModel:
    """The model as a sequence classifier with these labels, without memory for its weights.

    Args:
        pad: its pad token; the vocabulary grows to contain it.
        labels: of its head.
    """
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(backbone.base.config)
    name_labels(config, labels)
    config._attn_implementation = backbone.native
    text = config.get_text_config()
    text.pad_token_id = config.pad_token_id = pad
    text.vocab_size = max(text.vocab_size, 0 if pad is None else pad + 1)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise _refusal(backbone) from error
    return model
