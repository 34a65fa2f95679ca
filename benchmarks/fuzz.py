"""Whether any input ends in a traceback, a message longer than a screen, or the acceptance of a contradiction.

    python benchmarks/fuzz.py [--cases 20000] [--seed 0] [--processes 2] [--kind artifacts]

Seeded mutations of what people bring: bytes and metadata of profiles and masks, abilities files, merge configs, rows
of data, names. A case is a kind and a number, and is the same wherever it runs. The promised errors are ValueError and
OSError with at most 2,000 characters; an artifact that still loads must say what its tensors are. Exit code 1 if there
are findings; tests run a few hundred cases.
"""

from __future__ import annotations

import os

# Before huggingface_hub is imported: no name of a model is looked for on the Hub.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import contextlib
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from mergekit_act.artifacts import Mask, Profile, load_artifact, load_metadata, save_mask, save_profile
from mergekit_act.channels import Layout
from mergekit_act.wording import LONGEST

Finding = tuple[str, int, str]

_LAYOUT = Layout(
    {"a.up": (("a.up.weight", 0), ("a.up.bias", 0)), "head": (("head.weight", 0),), "embed": (("embed.weight", 1),)},
    (("head.weight", "embed.weight"),),
    {"a.up.weight": (4, 3), "a.up.bias": (4,), "head.weight": (5, 3), "embed.weight": (5, 3)},
)
_ODD_TEXTS = (
    "", "a", "\x1b]0;x\x07", "a\nb", "```\ncurl x | sh\n", "'; rm -rf x", "\u202ex", "\x00", "\ud800", "=1+1",
    "../../x", "a" * 5000,
    "{", "}}", "{q", "{q!r:>10}", "{q.x}", "{q[0]}", "{0}", "{}", "%s", "<script>", "\ufeff", "é" * 700, "a/b@c+d",
    "hf://x",
)  # fmt: skip
_ODD_VALUES = (
    None, True, False, 0, -1, 1, 3, 2**53, 2**64, 10**400, 0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), [],
    {}, [[]], [None],
    [{}], {"": ""}, {"a": {"b": [1]}}, ["a", 1], [1, 2], list(range(300)), {str(i): i for i in range(300)},
)  # fmt: skip
_SCALARS = (
    "!!bool maybe", "!!int ''", "!!timestamp x", "!!set [a]", "!!binary x", "!!python/name:os.system x", "*a",
    "&a [*a]", "<<: x",
    "{{q}}", "{q} b", "? [a]", "2024-01-01", "1:30", "0x", "1e999", ".nan", "~", "'", '"\\ud800"', '"\\U00110000"',
    "|", "- -", "%", "@x",
    "=", "<<", "{1: x}", "{null: x}", "{a: 1, a: 2}", "[" * 60 + "]" * 60, "[" * 3000, "9" * 5000, "x" * 3000, "\t",
    "!", "!<x> y", "--- a",
)  # fmt: skip


def run_cases(kind: str, numbers: range, *, seed: int = 0) -> Iterator[Finding]:
    """Try cases of one kind in a folder of their own; yield what should not be."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            tried = _KINDS[kind]()
            for number in numbers:
                draw = random.Random(f"{seed} {kind} {number}")
                try:
                    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
                        tried(draw)
                except _Contradiction as error:
                    yield kind, number, str(error)
                except (ValueError, OSError) as error:
                    if len(str(error)) > LONGEST:
                        yield kind, number, f"a message of {len(str(error)):,} characters: {str(error)[:200]}"
                    elif not str(error).strip():
                        yield kind, number, f"an empty {type(error).__name__}"
                except BaseException as error:
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    yield kind, number, f"{type(error).__name__}: {str(error)[:300]}"
        finally:
            os.chdir(before)


class _Contradiction(Exception):  # noqa: N818
    """Something was accepted that contradicts itself."""


def _value(draw: random.Random) -> Any:
    return draw.choice(_ODD_VALUES) if draw.random() < 0.7 else draw.choice(_ODD_TEXTS)


def _bytes(draw: random.Random, content: bytes) -> bytes:
    """A few bytes changed, cut, doubled or put in."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        place = draw.randrange(len(changed) + 1)
        action = draw.randrange(5)
        if action == 0 and place < len(changed):
            changed[place] ^= 1 << draw.randrange(8)
        elif action == 1:
            del changed[place : place + draw.randrange(1, 20)]
        elif action == 2:
            changed[place:place] = draw.randbytes(draw.randrange(1, 8))
        elif action == 3:
            changed[place:place] = changed[place : place + draw.randrange(1, 200)]
        elif place < len(changed):
            changed[place] = draw.randrange(256)
    return bytes(changed)


def _inside(draw: random.Random, value: Any, depth: int = 0) -> Any:
    """JSON with one value somewhere in it changed, left out or put in."""
    if depth > 3 or not isinstance(value, dict | list) or not value or draw.random() < 0.15:
        return _value(draw)
    if isinstance(value, dict):
        key, action = draw.choice(list(value)), draw.random()
        if action < 0.1:
            return {name: inner for name, inner in value.items() if name != key}
        if action < 0.2:
            return value | {draw.choice(_ODD_TEXTS): _value(draw)}
        return value | {key: _inside(draw, value[key], depth + 1)}
    place = draw.randrange(len(value))
    if draw.random() < 0.2:
        return [*value, value[place]]
    return [*value[:place], _inside(draw, value[place], depth + 1), *value[place + 1 :]]


def _originals() -> list[tuple[dict[str, Any], dict[str, torch.Tensor], bytes]]:
    """Metadata, tensors and bytes of a profile, a mask, and the mask as version 1."""
    scores = {"a.up": torch.arange(4.0), "head": torch.arange(5.0) + 0.5, "embed": torch.ones(3)}
    models = ({"model": "t", "revision": "r", "fingerprint": "f"}, {"model": "u", "revision": None, "fingerprint": "g"})
    data = {"dataset": "d.jsonl", "where": {"k": ["v"]}, "exclude": [], "expert_tokens": {"a": [1, 2]}, "seed": 0}
    settings = {"samples": 3, "answer_tokens": 9, "data": data, "shared_rows": {"head": 4}}
    profile = Profile(scores, _LAYOUT, "activation", "sums", *models, **settings)
    from mergekit_act.selection import Retention, make_mask

    mask = make_mask([profile], 0.4, exclude=["embed"], hashes=["0"], retain=Retention([profile], ["1"]))
    save_profile(profile, "p.safetensors")
    save_mask(mask, "m.safetensors")
    found = []
    for name in ("p.safetensors", "m.safetensors"):
        content = Path(name).read_bytes()
        artifact = load_artifact(name)
        tensors = dict(artifact.channels if isinstance(artifact, Mask) else artifact.scores)
        found.append((load_metadata(name), tensors, content))
    metadata, tensors, _ = found[1]
    first = {key: value for key, value in metadata.items() if key != "checksum"} | {"format_version": 1}
    return [*found, (first, tensors, save(tensors, metadata={"mergekit_act": json.dumps(first)}))]


def _artifacts() -> Callable[[random.Random], None]:
    """Bytes and metadata of profiles and masks; what loads is shown and selected from, as commands do."""
    originals = _originals()
    for name in ("p.safetensors", "m.safetensors"):
        Path(name).unlink()
    path = Path("x.safetensors")

    def tried(draw: random.Random) -> None:
        metadata, tensors, content = draw.choice(originals)
        if draw.random() < 0.4:
            written = _bytes(draw, content)
        else:
            text = json.dumps(_inside(draw, metadata))
            if draw.random() < 0.1:
                text = draw.choice(
                    (text[:-5], "[" * 9000, text.replace('"kind"', '"kind": 3, "kind"', 1), "null", "9" * 5000)
                )
            try:
                written = save(tensors, metadata={"mergekit_act": text})
            except UnicodeEncodeError:
                return
        path.write_bytes(written)
        artifact = load_artifact(path)
        held = artifact.channels if isinstance(artifact, Mask) else artifact.scores
        version = load_metadata(path)["format_version"]
        if version > 1 and not (held.keys() == tensors.keys() and all(torch.equal(held[n], tensors[n]) for n in held)):
            raise _Contradiction("other tensors than those that were written are accepted")
        _check_consistent(artifact)
        _show(artifact, path, draw)

    return tried


def _check_consistent(artifact: Profile | Mask) -> None:
    layout = artifact.layout
    if layout.shapes is not None:
        held = artifact.channels if isinstance(artifact, Mask) else artifact.scores
        if any(tuple(tensor.shape) != layout.channel_shape(module) for module, tensor in held.items()):
            raise _Contradiction("tensors of another shape are accepted")
    if isinstance(artifact, Mask):
        selected = sum(int(chosen.sum()) for chosen in artifact.channels.values())
        if artifact.counts.get("channels", selected) != selected:
            raise _Contradiction("other counts than the tensors' are accepted")
    elif any(not 0 <= rows <= len(artifact.scores[module]) for module, rows in artifact.shared_rows.items()):
        raise _Contradiction("shared rows that are not there are accepted")


def _show(artifact: Profile | Mask, path: Path, draw: random.Random) -> None:
    from mergekit_act.cards.files import write_folder_card
    from mergekit_act.report import list_essentials
    from mergekit_act.selection import make_mask

    shown = list_essentials(path)
    if any(
        letter != "\n" and not letter.isprintable() and letter != "\u00a0" and ord(letter) < 0xA0 for letter in shown
    ):
        raise _Contradiction(f"control characters are shown: {shown!r}"[:300])
    if isinstance(artifact, Profile):
        make_mask([artifact], 0.5)
    if draw.random() < 0.1:
        Path("README.md").unlink(missing_ok=True)
        if write_folder_card(Path()) is None:
            raise _Contradiction("no README.md is written beside a valid file")


_ABILITIES = """target: t
ability_model: u
max_length: 64
template: plain
system: null
template_kwargs: {a: 1}
abilities:
  one:
    role: keep
    dataset: d.jsonl
    prompt: "{q}"
    answer: a
    where: {k: [x]}
    samples: 3
    seed: 1
    evaluate: {offset: 5, samples: 2, extract: "x"}
"""
_MERGE = """merge_method: act
base_model: ./t
models:
  - model: ./u
    parameters:
      weight: 0.4
      mask: m.safetensors
      mask_density: 0.1
parameters: {weight: 1}
dtype: bfloat16
"""


def _bomb(draw: random.Random) -> str:
    levels = draw.randrange(2, 9)
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"]
    return "\n".join(lines + [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]) + "\n"


def _yaml(draw: random.Random, text: str) -> bytes:
    """A YAML file that people could have written so."""
    action = draw.random()
    if action < 0.3:
        return _bytes(draw, text.encode())
    if action < 0.4:
        return draw.choice((b"", b"- a", b"3", text.encode("utf-16"), b"\xff", text.encode() * 2,
        (text + "---\n" + text).encode(),
                            b"\xef\xbb\xbf" + text.encode(), text.replace("t\n", "\u00e9\n", 1).encode("latin-1"),
                            text.encode() + b"\x00"))  # fmt: skip
    if action < 0.45:
        return (_bomb(draw) + text).encode()
    lines = text.splitlines()
    place = draw.randrange(len(lines))
    key, colon, _ = lines[place].partition(":")
    odd = draw.choice(_SCALARS) if draw.random() < 0.6 else json.dumps(_value(draw))
    lines[place] = f"{key}{colon} {odd}" if draw.random() < 0.8 else f"{' ' * draw.randrange(8)}{odd}: {odd}"
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")


def _abilities() -> Callable[[random.Random], None]:
    """Abilities files."""
    from mergekit_act.abilities import load_abilities

    path = Path("abilities.yml")

    def tried(draw: random.Random) -> None:
        path.write_bytes(_yaml(draw, _ABILITIES))
        file = load_abilities(path)
        json.dumps(file.model_dump()).encode()  # as settings are kept

    return tried


def _configs() -> Callable[[random.Random], None]:
    """Merge configs, by the commands that read them."""
    from click.testing import CliRunner

    from mergekit_act import autoload
    from mergekit_act.cli import main

    autoload.install()
    Path("a.yml").write_text(_ABILITIES)
    path = Path("config.yml")

    def tried(draw: random.Random) -> None:
        path.write_bytes(_yaml(draw, _MERGE))
        command = ["check", "config.yml"] if draw.random() < 0.7 else ["sweep", "config.yml", "a.yml", "out"]
        done = CliRunner().invoke(main, command)
        _judge(done)

    return tried


def _judge(done: Any) -> None:
    """Of a command that cannot end well: one message of at most a screen and no traceback."""
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    if done.exit_code and len(done.output) > LONGEST + 200:  # with the words around it
        raise _Contradiction(f"a message of {len(done.output):,} characters: {done.output[:200]}")
    if any(ord(letter) < 0x20 and letter != "\n" for letter in done.output):
        raise _Contradiction(f"control characters are shown: {done.output!r}"[:300])


def _rows() -> Callable[[random.Random], None]:
    """Rows of json, jsonl and csv files, and templates over them."""
    from mergekit_act.abilities import Ability
    from mergekit_act.data.rows import fill_template, load_rows, select_rows

    def tried(draw: random.Random) -> None:
        suffix = draw.choice((".json", ".jsonl", ".csv"))
        path = Path(f"data{suffix}")
        path.write_bytes(_data(draw, suffix))
        odd = draw.random() < 0.3
        prompt = draw.choice(_ODD_TEXTS) if odd else draw.choice(("q", "{q}", "{q} {k}"))
        settings = {"prompt": prompt, "answer": "a", "samples": draw.choice((1, 2, 100)), "seed": draw.randrange(3)}
        if draw.random() < 0.3:
            settings["where"] = {"k": draw.choice((["x"], "x", 1, None, ["é" * 900]))}
        if draw.random() < 0.2:
            settings["balance"] = "k"
        ability = Ability(dataset=str(path), split=draw.choice(("train", "train", "train[:2]", "x")), **settings)
        rows = load_rows("one", ability)
        taken, _ = select_rows("one", ability, rows, offset=draw.choice((0, 0, 1)), samples=ability.samples)
        for template in (prompt, "a"):
            if len(fill_template("one", ability, taken, template)) != len(taken):
                raise _Contradiction("not every row has a text")

    return tried


def _data(draw: random.Random, suffix: str) -> bytes:
    columns = ["q", "a", "k"]
    rows = [{name: f"{name}{place}" if name != "k" else "xy"[place % 2] for name in columns} for place in range(4)]
    if draw.random() < 0.6:
        rows[draw.randrange(len(rows))][draw.choice([*columns, draw.choice(_ODD_TEXTS)])] = _value(draw)
    if suffix == ".csv":
        lines = [",".join(columns), *(",".join(_csv_cell(row.get(name)) for name in columns) for row in rows)]
        if draw.random() < 0.3:
            lines[draw.randrange(len(lines))] += draw.choice((",", ",,,", '"', "\x00", "\r"))
        text = "\n".join(lines)
    elif suffix == ".json":
        text = json.dumps(rows)
    else:
        text = "\n".join(map(json.dumps, rows))
    content = text.encode("utf-8", "surrogatepass")
    return _bytes(draw, content) if draw.random() < 0.3 else content


def _csv_cell(value: Any) -> str:
    return '"' + str(value).replace('"', '""')[:4000] + '"'


def _names() -> Callable[[random.Random], None]:
    """Odd names of abilities, models and files, through commands, cards and reports."""
    from click.testing import CliRunner

    from mergekit_act.cli import main

    metadata, tensors, _ = _originals()[0]

    def tried(draw: random.Random) -> None:
        names = [draw.choice(_ODD_TEXTS).encode("utf-8", "ignore").decode() for _ in range(3)]
        described = {"ability": names[0], "target": {"model": names[1], "revision": names[2] or None}}
        path = Path("".join(letter for letter in names[2] if letter not in "/\x00")[:50] + "n.safetensors")
        path.write_bytes(save(tensors, metadata={"mergekit_act": json.dumps(metadata | described)}))
        out = Path("masks") / path.name
        command = draw.choice(
            (["report", "--", path], ["mask", "--density", "0.5", "--overwrite", "-o", out, "--", path])
        )
        done = CliRunner().invoke(main, [str(word) for word in command])
        _judge(done)
        path.unlink()
        readme = Path("masks/README.md")
        if readme.exists():
            text = readme.read_text(encoding="utf-8")
            if "\x1b" in text or any(line.startswith(("curl", "```\n")) for line in text.splitlines()):
                raise _Contradiction("a name has become a line of its own in README.md")
            readme.unlink()
        for made in Path("masks").glob("*"):
            made.unlink()

    return tried


_KINDS: dict[str, Callable[[], Callable[[random.Random], None]]] = {
    "artifacts": _artifacts,
    "abilities": _abilities,
    "configs": _configs,
    "rows": _rows,
    "names": _names,
}
# Of a hundred cases; what costs more is tried less.
_SHARES = {"artifacts": 45, "abilities": 30, "configs": 8, "rows": 12, "names": 5}


def plan_cases(cases: int) -> dict[str, range]:
    """Kind -> the numbers of its cases."""
    return {kind: range(max(1, cases * share // 100)) for kind, share in _SHARES.items()}


def _part(job: tuple[str, range, int]) -> tuple[list[Finding], str, int, float]:
    kind, numbers, seed = job
    torch.set_num_threads(1)
    started = time.monotonic()
    return list(run_cases(kind, numbers, seed=seed)), kind, len(numbers), time.monotonic() - started


def main() -> None:
    from concurrent.futures import ProcessPoolExecutor

    import click

    @click.command()
    @click.option("--cases", default=20_000, show_default=True)
    @click.option("--seed", default=0, show_default=True)
    @click.option("--processes", default=2, show_default=True)
    @click.option("--kind", "only", type=click.Choice(list(_KINDS)), help="Only these cases.")
    def run(cases: int, seed: int, processes: int, only: str | None) -> None:
        planned = {only: range(cases)} if only else plan_cases(cases)
        jobs = [
            (kind, numbers[start::processes], seed) for kind, numbers in planned.items() for start in range(processes)
        ]
        started = time.monotonic()
        seconds, counts = Counter[str](), Counter[str]()
        found: list[Finding] = []
        with ProcessPoolExecutor(processes) as pool:
            for findings, kind, count, took in pool.map(_part, jobs):
                seconds[kind] += took
                counts[kind] += count
                found += findings
        for finding in found:
            click.echo(" ".join(ascii(part) if isinstance(part, str) else str(part) for part in finding))
        for kind, count in counts.items():
            click.echo(f"{kind}: {count:,} cases, {1000 * seconds[kind] / count:.1f} ms each")
        click.echo(f"{sum(counts.values()):,} cases in {time.monotonic() - started:.0f} s, {len(found)} findings")
        raise SystemExit(bool(found))

    run()


if __name__ == "__main__":
    main()
