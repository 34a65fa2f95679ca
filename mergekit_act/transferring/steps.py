"""Commands in a row: each is given again only if what it reads has changed."""

from __future__ import annotations

import gc
import hashlib
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from mergekit_act.files import file_hash, file_state, write_atomically
from mergekit_act.versions import installed_versions

__all__ = ["Step", "Steps", "read_state"]

_OF_A_MODEL = ("*.safetensors", "*.bin", "config.json", "adapter_config.json", "tokenizer*", "chat_template*")

_OF = {"target", "ability_model", "file", "abilities"}
_STEP = {"digest", "device", "more", "done", "overwrites"}

Echo = Callable[[str], None]
Run = Callable[[Sequence[str]], None]


@dataclass(frozen=True)
class Step:
    """A command.

    Attributes:
        name: of the step.
        words: the command, as a user gives it, but for ``more`` and ``aside``.
        reads: files and models that its result depends on; names of the Hub count by themselves.
        writes: files that are there once it is done.
        again: whether it goes on by itself after an interruption (``resumes``), refuses once it is done (``ends``), or
            begins anew in any case; it is told to overwrite what is of other inputs, and keeps what is of these.
        content: of a file that is not read as a whole, what is.
        more: further words, that only choose among what the step has measured: with others it goes on from there.
        aside: further words, on which no result depends.
    """

    name: str
    words: Sequence[str]
    reads: Sequence[str | Path]
    writes: Sequence[Path]
    again: Literal["resumes", "ends", "anew"] = "anew"
    content: Any = None
    more: Sequence[str] = ()
    aside: Sequence[str] = ()

    def __str__(self) -> str:
        return shlex.join(self.command)

    @property
    def command(self) -> list[str]:
        """All its words."""
        return [*map(str, self.words), *self.more, *self.aside]

    def digest(self) -> str:
        """Of ``words``, and of all that they read."""
        given = [*map(str, self.words), installed_versions("mergekit", "torch", "transformers"), self.content]
        found = hashlib.sha256(json.dumps(given, default=str).encode())
        for name in self.reads:
            found.update(json.dumps(_state(Path(name)), default=str).encode())
        return found.hexdigest()


def _state(path: Path) -> Any:
    """What changes when a file, a model or a folder of data does; of weights and data their dates and sizes."""
    if path.is_file():
        return [path.name, file_hash(path) if path.stat().st_size < 1 << 26 else file_state(path)]
    if path.is_dir():
        is_model = any((path / name).exists() for name in ("config.json", "adapter_config.json"))
        found = (file for pattern in _OF_A_MODEL for file in path.glob(pattern)) if is_model else path.rglob("*")
        return [[file.name, *file_state(file)] for file in sorted(found) if file.is_file()]
    return str(path)


def read_state(path: Path) -> dict[str, Any]:
    """What a transfer has kept of itself: what it is ``of``, and its ``steps``.

    Raises:
        ValueError: the file is none of this version.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        is_ours = content["of"].keys() >= _OF and all(one.keys() >= _STEP for one in content["steps"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        is_ours = False
    if not is_ours:
        raise ValueError(f"{path} is no state of a transfer by this version; name another folder")
    return content


class Steps:
    """Runs steps, and knows what was run before.

    Args:
        path: a JSON file that says of each step what it was run on.
        run: runs a command.
        echo: prints a line.
        device: where models run, which unfinished work depends on.
        of: what the steps are of, for the file.
    """

    def __init__(self, path: Path, run: Run, echo: Echo, *, device: str, of: Mapping[str, Any]) -> None:
        self._path, self._run, self._echo, self._device, self._of = path, run, echo, device, of
        self._known = read_state(path)["steps"] if path.exists() else {}
        self._write()

    def is_done(self, step: Step) -> bool:
        """Whether it was run to its end on what it reads now, and chose as it would."""
        known = self._known.get(step.name, {"done": False})
        if not known["done"] or known["more"] != list(step.more):
            return False
        return known["digest"] == step.digest() and all(path.exists() for path in step.writes)

    def take(self, step: Step) -> None:
        """Run a step, unless it is done."""
        if self.is_done(step):
            self._echo(f"\n$ {step}\n  done before, from the same files")
            return
        digest, known = step.digest(), self._known.get(step.name)
        begun: dict[str, Any] = {"digest": digest, "device": self._device}
        of_others = known is not None and (any(known[name] != begun[name] for name in begun) or known["overwrites"])
        is_left = {  # by this step, on the same files
            "resumes": False,
            "ends": (known is not None and known["done"]) or all(path.exists() for path in step.writes),
            "anew": known is not None or all(path.exists() for path in step.writes),
        }
        overwrite = of_others or is_left[step.again]
        can_overwrite = step.words[0] == "mergekit-act"
        begun |= {"more": list(step.more)}
        self._known[step.name] = begun | {"done": False, "overwrites": overwrite}  # until it is done
        self._write()
        words = [*step.command, *(["--overwrite"] if overwrite and can_overwrite else [])]
        self._echo(f"\n$ {shlex.join(words)}")
        self._run(words)
        self._known[step.name] = begun | {"done": True, "overwrites": False}
        self._write()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _write(self) -> None:
        content = {"of": self._of, "steps": self._known}
        write_atomically(self._path, (json.dumps(content, indent=2) + "\n").encode(), overwrite=True)
