"""Model references: what they name, and where it is on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import LocalEntryNotFoundError
from mergekit.common import ModelPath, ModelReference

from mergekit_act.checkpoints.adapters import adapter_problem
from mergekit_act.wording import one_line

__all__ = ["local_folder", "model_name", "parse_reference", "read_config"]


def local_folder(reference: ModelReference, cache_dir: str | None = None) -> Path:
    """Where the files of a reference without LoRA are on this machine, fetched if need be.

    mergekit asks the Hub which files there are, also with ``HF_HUB_OFFLINE=1``.

    Raises:
        FileNotFoundError: the Hub is switched off and its cache does not have the model.
    """
    if os.path.exists(reference.model.path) or not HF_HUB_OFFLINE:
        return Path(reference.local_path(cache_dir=cache_dir))
    try:
        return Path(
            snapshot_download(
                reference.model.path, revision=reference.model.revision, cache_dir=cache_dir, local_files_only=True
            )
        )
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{reference} is not in the Hub's cache, and HF_HUB_OFFLINE is set; unset it, or give a local folder"
        ) from error


def parse_reference(reference: str) -> ModelReference:
    """A model reference of the form ``user/repo@revision``, a path, or either with ``+lora``.

    What exists is a path, whatever characters it has; mergekit would split it.

    Raises:
        ValueError: it has no such form, or several.
    """
    if os.path.exists(reference):
        return ModelReference(model=ModelPath(path=reference))
    parts = reference.split("+")
    splits = [("+".join(parts[:place]), "+".join(parts[place:])) for place in range(1, len(parts))]
    if len(splits) > 1:
        splits = [pair for pair in splits if all(map(os.path.exists, pair))]
        if len(splits) != 1:
            raise ValueError(f'"{reference}" cannot be parsed; expected MODEL or MODEL+LORA, paths or Hub ids')
    model, lora = splits[0] if splits else (reference, None)
    return ModelReference(model=_model_path(model), lora=None if lora is None else _model_path(lora))


def _model_path(written: str) -> ModelPath:
    if os.path.exists(written):
        return ModelPath(path=written)
    if not written or written.count("@") > 1:
        raise ValueError(f'"{written}" is no model; expected a path, or a Hub id with at most one @ before a revision')
    path, _, revision = written.partition("@")
    return ModelPath(path=path, revision=revision or None)


def model_name(path: str) -> tuple[str, str | None]:
    """A model's name for people, and its revision if the path tells: folders of the Hub's cache do."""
    if not os.path.exists(path):
        return path, None
    folder = Path(path).resolve()
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/"), folder.name
    return folder.name, None


def read_config(reference: str | ModelReference, *, trust_remote_code: bool = False) -> Any:
    """The config of a model reference; its weights need not be there.

    Raises:
        FileNotFoundError: there is no such model folder, it has no config.json, or is an adapter.
    """
    parsed = parse_reference(reference) if isinstance(reference, str) else reference
    path = Path(parsed.model.path)
    if path.is_dir() and not (path / "config.json").is_file():
        expected = f"{path} has no config.json; expected a model folder as save_pretrained writes it"
        raise FileNotFoundError(adapter_problem(path) or expected)
    if not path.exists() and parsed.model.path.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"{parsed.model.path} does not exist (relative to {os.getcwd()}); expected a model folder or a Hub id"
        )
    try:
        return parsed.config(trust_remote_code=trust_remote_code)
    except OSError as error:  # not on the Hub, or the Hub is out of reach
        nowhere = "" if path.exists() else f", and there is no such folder in {os.getcwd()}"
        reason = f"{reference} has no config that can be loaded: {one_line(error).rstrip('.')}{nowhere}"
        raise FileNotFoundError(adapter_problem(parsed.model.path, parsed.model.revision) or reason) from error
