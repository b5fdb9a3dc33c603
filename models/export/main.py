"""`leyden export`: a trained model as a folder for others, with a model card."""

from __future__ import annotations

import json
import os
import shutil
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from leyden.atomic import replacing
from leyden.cli.parser import Parser
from leyden.errors import UserError, first_line
from leyden.language import say
from leyden.run.console import quiet_libraries

DTYPES = ("float32", "bfloat16", "float16")
ABOUT = "Write a trained model as a folder that transformers and PEFT load, with a model card; merge and upload it."


def main(argv: list[str]) -> int:
    """Run the command and return the exit code. Raises `UserError` for mistakes that the user can fix."""
    parser = Parser("leyden export", ABOUT)
    parser.add_argument("run", metavar="RUN", help="a run's folder")
    parser.add_argument("output", metavar="OUT", nargs="?", help="a new folder (default: in the run's folder)")
    parser.add_argument("--checkpoint", metavar="last|best|FILE", help="the model as it was then (default: at the end)")
    parser.add_argument("--merge", action="store_true", help="work the adapter into its base model, and say the cost")
    into = ("full", "four_bit")
    parser.choice("--merge-into", into, "full", "the weights as they came, or as four bits say (default: full)")
    parser.add_argument("--base", metavar="MODEL", help="the adapter's base, if it is not where the adapter says")
    parser.choice("--dtype", DTYPES, "bfloat16", "of merged weights")
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the folder to the hub")
    parser.add_argument("--public", action="store_true", help="where everybody sees it (default: a private one)")
    options = parser.read(argv)
    if not options.merge and options.merge_into != "full":
        raise UserError(f"--merge-into {options.merge_into}: only where an adapter is merged; add --merge")
    quiet_libraries()
    folder = export(options)
    say(f"exported to {folder}")
    if options.push_to_hub:
        say(f"uploaded to {push(folder, options.push_to_hub, private=not options.public)}")
    return 0


def export(asked: Namespace) -> Path:
    """Write the exported folder and return its path.

    Args:
        asked: the command's options.

    Raises:
        UserError: there is no such run, the run has no model, or the output folder already exists.
    """
    run = Path(asked.run)
    if not (run / "config.yaml").is_file():
        raise UserError(
            f"{run}: no run's folder, for there is no config.yaml; give a --trainer.default_root_dir of before"
        )
    name = "merged" if asked.merge else "model"
    out = Path(asked.output) if asked.output else run / f"export-{name}"
    if out.exists():
        raise UserError(f"{out}: it is there already; remove it, or name another folder")
    from leyden.checkpoint.find import find_checkpoint
    from leyden.models.export.model_card import card
    from leyden.models.restore import config_of, restored

    config, checkpoint = config_of(run / "config.yaml"), None
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary, TemporaryDirectory(dir=out.parent, prefix=".") as scratch:
        trained = run / "export"
        if asked.checkpoint is not None:
            place = (config.get("checkpoint") or {}).get("dirpath")
            checkpoint = find_checkpoint(asked.checkpoint, str(run), place, "--checkpoint")
            assert checkpoint is not None  # only `auto` may find none
            trained = Path(scratch) / "trained"
            restored(checkpoint, {} if asked.base is None else {"base": asked.base}, config).save(trained)
        if not trained.is_dir():
            raise UserError(f"{run}: it has no export, since it has not ended; add --checkpoint last")
        cost = None
        if asked.merge:
            policy, cost = _merged(str(trained), config, asked)
            policy.save(temporary)
            say(str(cost))
        else:
            shutil.copytree(trained, temporary)
            if asked.base is not None:
                rebase(temporary, asked.base)
        (temporary / "README.md").write_text(card(run, config, temporary, checkpoint, cost), encoding="utf-8")
    return out


def _merged(path: str, config: dict[str, Any], options: Namespace) -> Any:
    from leyden.models.export.merge_adapter import merged
    from leyden.models.restore import four_bits_of

    precision = four_bits_of(config)
    arguments = config.get("model", {}).get("init_args", {}).get("policy", {}).get("init_args", {})
    source = {name: arguments[name] for name in ("revision", "trust_remote_code") if arguments.get(name)}
    try:
        return merged(path, options.dtype, precision, options.merge_into, options.base, **source)
    except UserError as error:  # it names the flag of `fit`
        raise UserError(str(error).replace("--model.policy.base", "--base")) from None


def rebase(folder: Path, base: str) -> None:
    """Make the adapter in a folder name another base.

    Raises:
        UserError: there is no adapter, or no such base.
    """
    from leyden.paths import resolve

    file, origin = folder / "adapter_config.json", resolve(base)
    if not file.is_file():
        raise UserError(f"--base {base}: the model is a whole one, with no adapter; leave it out")
    config = json.loads(file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = os.path.abspath(origin) if Path(origin).is_dir() else origin
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def push(folder: Path, name: str, private: bool = True) -> str:
    """Upload a folder to a repository on the hub, created if it does not exist, and return its address.

    Raises:
        UserError: the hub cannot be reached, or denies this user write access.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload a model trained with Leyden")
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = first_line(error)[:160]
        raise UserError(
            f"--push-to-hub {name}: {reason}; log in by `hf auth login` or set HF_TOKEN, and see that the name is "
            f"yours. The folder is written: {folder}"
        ) from error
    return str(address)
