"""Models with a LoRA: the merged model that is kept in a folder is of this adapter and this base, or it is made anew.

mergekit keeps it under both names alone. An adapter that is trained again keeps its name, and a merge that is killed
leaves half a model.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from huggingface_hub import hf_hub_download
from mergekit.common import ModelPath, ModelReference

from mergekit_act.files import file_hash, write_atomically
from mergekit_act.wording import one_line

__all__ = ["MergedModel", "adapter_problem"]

LOG = logging.getLogger(__name__)

_CONFIG = "adapter_config.json"
_MADE_FROM = "made_from.json"  # in the merged model's folder


@dataclass(frozen=True)
class MergedModel:
    """A model that an adapter is merged into, where mergekit looks for it.

    Attributes:
        reference: ``base+adapter``.
        cache: folder for such models.
        base: fingerprint of the base model, or its commit on the Hub.
        dtype: name of the dtype that the base is loaded in; None for its own.
    """

    reference: ModelReference
    cache: Path
    base: str
    dtype: str | None = None

    @property
    def folder(self) -> Path:
        """Where it is, or will be."""
        model, lora = self.reference.model, self.reference.lora
        if lora is None:
            raise ValueError(f"{self.reference} has no adapter")
        return self.cache / f"{model._unique_id()}_{lora._unique_id()}"

    def is_current(self) -> bool:
        """Whether it is there, whole, and was made from the adapter and the base as they are now."""
        try:
            found = json.loads((self.folder / _MADE_FROM).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # mergekit's own, or killed while it was made
            return False
        return bool(found == self._made_from())

    def make(self, *, trust_remote_code: bool = False) -> Path:
        """Merge the adapter into the base, unless that is there already.

        Several processes may ask for it at once; one makes it.

        Returns:
            The folder.

        Raises:
            FileNotFoundError: there is no such adapter.
            ValueError: the adapter does not fit the base.
        """
        self.cache.mkdir(parents=True, exist_ok=True)
        with FileLock(self.cache / f".{self.folder.name}.lock"):
            if self.is_current():
                return self.folder
            if self.folder.exists():
                LOG.warning(
                    "%s is not of %s as it is now, or was never finished; it is made anew", self.folder, self.reference
                )
            made_from = self._made_from()
            unfinished = self.cache / f".{self.folder.name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            try:
                merged = self.reference.merged(str(unfinished), trust_remote_code, self.dtype)
                write_atomically(
                    Path(merged.model.path) / _MADE_FROM, (json.dumps(made_from, indent=2) + "\n").encode()
                )
                shutil.rmtree(self.folder, ignore_errors=True)
                os.replace(merged.model.path, self.folder)
            except (ValueError, RuntimeError, KeyError, TypeError) as error:  # what PEFT and Transformers raise
                reason = one_line(error, 300)
                raise ValueError(f"{self.reference} could not be merged: {reason}") from error
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
        return self.folder

    def _made_from(self) -> dict[str, str | None]:
        lora = self.reference.lora
        return {
            "base": self.base,
            "adapter": None if lora is None else _fingerprint(lora),
            "dtype": self.dtype,
            "architecture": self.reference.override_architecture,
        }


def adapter_problem(path: str | Path, revision: str | None = None) -> str | None:
    """Why something that has no model's config is none, if it is an adapter; None if it is not even that.

    Args:
        path: a folder, or an id on the Hub.
        revision: on the Hub.
    """
    config = Path(path) / _CONFIG
    if not Path(path).exists():
        try:
            config = Path(hf_hub_download(str(path), _CONFIG, revision=revision))
        except (OSError, ValueError):
            return None
    if not config.is_file() or (config.parent / "config.json").is_file():
        return None
    try:
        base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    written = f"{base or 'BASE'}+{path}"
    return f'{path} is an adapter (LoRA), no model; write "{written}", its base model in front'[:1000]


def _fingerprint(adapter: ModelPath) -> str:
    """The commit of an adapter on the Hub; of a local one SHA-256 over its config and weights."""
    folder = Path(adapter.path)
    if not folder.exists():
        try:
            return Path(hf_hub_download(adapter.path, _CONFIG, revision=adapter.revision)).parent.name
        except (OSError, ValueError) as error:  # the client's own errors are of both kinds
            reason = one_line(error, 300)
            raise FileNotFoundError(
                f"{adapter} is no folder (relative to {os.getcwd()}) and no adapter that can be fetched: {reason}"
            ) from error
    files = sorted({folder / _CONFIG, *folder.glob("adapter_model*")})
    if not (folder / _CONFIG).is_file():
        raise FileNotFoundError(f"{folder} has no {_CONFIG}; expected a LoRA as PEFT saves it")
    named = [f"{path.name} {file_hash(path)}\n" for path in files if path.is_file()]
    return hashlib.sha256("".join(named).encode()).hexdigest()
