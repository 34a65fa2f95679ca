"""The report: its numbers are those of the selection functions, its page stands alone."""

from __future__ import annotations

import csv
import os
import re
import shlex
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from oracle import plain_parameters, plain_top
from tiny import tiny_config

from mergekit_act.artifacts import Mask, Profile, save_mask, save_profile
from mergekit_act.channels import Layout, channel_layout
from mergekit_act.cli import main
from mergekit_act.groups import Groups
from mergekit_act.report import draw_losses
from mergekit_act.report.comparison import DENSITIES, load_comparison
from mergekit_act.selection import make_mask

ABILITIES = ("math-en", "math-ar", "science-en", "science-ar")
DENSITY = 0.05
DASH = "\N{EN DASH}"


def random_profile(layout: Layout, ability: str, *, seed: int, pair: str = "one", criterion: str = "activation"):
    """Scores with a part that all abilities of a language share, so that overlaps differ."""
    shared = torch.Generator().manual_seed(len(ability.rpartition("-")[2]) + ord(ability[-1]))
    own = torch.Generator().manual_seed(seed)
    scores = {
        module: torch.exp(
            torch.randn(layout.channel_shape(module), generator=shared)
            + torch.randn(layout.channel_shape(module), generator=own)
        )
        for module in layout.modules
    }
    models = (
        {"model": f"someone/{name}", "revision": "r", "fingerprint": pair + name} for name in ("target", "ability")
    )
    return Profile(scores, layout, criterion, ability, *models, samples=10 + seed, answer_tokens=100 + seed)


@pytest.fixture(scope="module", params=["qwen2", "qwen2-tied", "qwen3_moe"])
def made(request, tmp_path_factory) -> tuple[Path, dict[str, Profile], dict[str, Profile]]:
    """A report of two pairs and a weight profile, the profiles of the first pair, and those of the second."""
    layout = channel_layout(tiny_config(request.param))
    folder = tmp_path_factory.mktemp("report")
    first = {name: random_profile(layout, name, seed=seed) for seed, name in enumerate(ABILITIES)}
    first["weight"] = random_profile(layout, "weight", seed=9, criterion="weight")
    second = {name: random_profile(layout, name, seed=seed + 20, pair="two") for seed, name in enumerate(ABILITIES[:2])}
    for place, profiles in enumerate((first, second)):
        for name, profile in profiles.items():
            save_profile(profile, folder / f"pair{place}" / f"{name}.safetensors")
    paths = [str(folder / "pair0" / f"{name}.safetensors") for name in first]
    paths += [str(path) for path in sorted((folder / "pair1").glob("*"), reverse=True)]
    done = CliRunner().invoke(main, ["report", *paths, "-o", str(folder / "out"), "--density", str(DENSITY)])
    assert done.exit_code == 0, done.output
    return folder / "out", first, second


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_overlaps_are_counted_plainly(made):
    out, first, _ = made
    selections = {name: plain_top(first[name], DENSITY) for name in ABILITIES}
    total = first["math-en"].layout.channel_count()
    rows = rows_of(out / "overlap-1.csv")
    assert [row["ability"] for row in rows] == [*ABILITIES, "random"]
    for row in rows[:-1]:
        name = row["ability"]
        chosen = selections[name]
        for other in ABILITIES:
            common = len(chosen & selections[other])
            assert float(row[other]) == pytest.approx(common / len(chosen))
            assert int(row[f"{other} channels"]) == common
        domain, language = name.split("-")
        groups = {
            "union of the others": [other for other in ABILITIES if other != name],
            "union, other ending": [other for other in ABILITIES if not other.endswith(language)],
            "union, other beginning": [other for other in ABILITIES if not other.startswith(domain)],
        }
        for column, members in groups.items():
            union = set().union(*(selections[other] for other in members))
            assert float(row[column]) == pytest.approx(len(chosen & union) / len(chosen))
            assert float(row[f"{column} random"]) == pytest.approx(len(union) / total)
    assert float(rows[-1]["math-ar"]) == pytest.approx(len(selections["math-ar"]) / total)


def test_densities_move_what_masks_would(made):
    out, first, _ = made
    layout = first["math-en"].layout
    rows = {(row["ability"], float(row["density"])): row for row in rows_of(out / "densities-1.csv")}
    assert {density for _, density in rows} == set(DENSITIES)
    assert (DENSITIES[0], DENSITIES[-1]) == (0.001, 0.9)
    for density in DENSITIES:
        of = {name: plain_top(first[name], density) for name in ABILITIES}
        of["union of all"] = set().union(*of.values())
        for name, selection in of.items():
            row = rows[name, density]
            assert int(row["channels"]) == len(selection)
            assert int(row["parameters"]) == plain_parameters(selection, layout)
            assert float(row["of_parameters"]) == pytest.approx(int(row["parameters"]) / layout.parameter_count())


def test_composition_is_that_of_the_mask(made):
    out, first, _ = made
    layout = first["math-en"].layout
    union = set().union(*(plain_top(first[name], DENSITY) for name in ABILITIES))
    rows = rows_of(out / "composition-1.csv")
    total = rows.pop()
    assert int(total["channels"]) == len(union) == sum(int(row["channels"]) for row in rows)
    assert int(total["parameters"]) == plain_parameters(union, layout)
    down = {channel for channel in union if channel[0].endswith("down_proj")}
    (row,) = (row for row in rows if row["kind"].endswith("down_proj"))
    assert int(row["channels"]) == len(down)
    assert int(row["parameters"]) == plain_parameters(down, layout)
    modules = [row for row in rows_of(out / "composition-modules-1.csv") if row["mask"] == "science-ar"]
    chosen = Counter(module for module, _ in plain_top(first["science-ar"], DENSITY))
    assert {row["module"]: int(row["selected"]) for row in modules} == {m: chosen[m] for m in layout.modules}


def test_weights_and_consistency(made):
    out, first, second = made
    by_weight = plain_top(first["weight"], DENSITY)
    rows = {row["ability"]: row for row in rows_of(out / "controls-1.csv")}
    for name in ABILITIES:
        chosen = plain_top(first[name], DENSITY)
        assert float(rows[name]["weight"]) == pytest.approx(len(chosen & by_weight) / len(chosen))
    layout = first["weight"].layout
    assert float(rows["random"]["weight"]) == len(by_weight) / layout.channel_count()
    rows = {row["ability"]: row for row in rows_of(out / "consistency.csv")}
    assert list(rows) == ["math-en", "math-ar", "random"]
    for name in ABILITIES[:2]:
        one, other = plain_top(first[name], DENSITY), plain_top(second[name], DENSITY)
        assert float(rows[name]["overlap"]) == pytest.approx(len(one & other) / len(one))


def test_distributions_count_scores(made):
    out, first, _ = made
    profile = first["science-en"]
    (row,) = (row for row in rows_of(out / "distribution-1.csv") if row["ability"] == "science-en")
    scores = torch.cat([profile.scores[module].flatten() for module in profile.layout.modules]).sort(descending=True)[0]
    for density in (0.5, 0.1, 0.01):
        k = len(plain_top(profile, density))
        assert float(row[f"top_{density:g}"]) == pytest.approx(float(scores[k - 1]))
    k = len(plain_top(profile, DENSITY))
    assert float(row["share_of_sum"]) == pytest.approx(float(scores[:k].sum() / scores.sum()), rel=1e-5)
    assert (row["samples"], row["answer_tokens"]) == ("12", "102")
    curves = [row for row in rows_of(out / "distribution-curves-1.csv") if row["ability"] == "science-en"]
    groups = {
        "": list(profile.layout.modules),
        "1": [module for module in profile.layout.modules if ".layers.1." in module],
        "self_attn.q_proj": [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)],
        "lm_head": ["lm_head"],
    }
    for of, modules in groups.items():
        own = torch.cat([profile.scores[module].flatten() for module in modules])
        points = [row for row in curves if row["of"] == of and (row["by"] == "layer") == (of == "1")]
        assert len(points) == 100
        for point in points[:: len(points) // 7]:
            threshold = torch.tensor(float(point["threshold"]), dtype=torch.float32)
            assert float(point["fraction_above"]) == pytest.approx(float((own > threshold).float().mean()), abs=1e-6)


class Page(HTMLParser):
    """The tables, references and headings of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self._cell: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.add(tag)
        self.references += [found[key] for key in ("href", "src", "xlink:href") if key in found]
        self.ids += [found["id"]] if "id" in found else []
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self._cell = []

    def handle_endtag(self, tag):
        if tag in ("th", "td") and self._cell is not None:
            self.tables[-1][-1].append(" ".join(self._cell))
            self._cell = None

    def handle_data(self, data):
        if self._cell is not None and data.strip():
            self._cell.append(data.strip())


def test_the_page_has_the_papers_table_and_needs_nothing_else(made):
    out, first, _ = made
    text = (out / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.tags & {"script", "link", "img", "iframe", "object"}
    assert "@import" not in text
    assert not re.findall(r"url\((?!#)", text)
    assert len(page.ids) == len(set(page.ids))
    assert [name for name in page.references if "://" in name] == ["https://arxiv.org/abs/2601.09398"]
    for reference in (name for name in page.references if not name.startswith(("data:", "https:"))):
        inside = reference.startswith("#")
        assert reference[1:] in page.ids if inside else (out / reference).is_file(), reference
    figures = {path.stem for path in out.glob("*.svg")}
    assert figures == {path.stem for path in out.glob("*.png")}
    assert {reference for reference in page.references if reference.endswith(".svg")} == {f"{f}.svg" for f in figures}
    expected = {"consistency", "densities-1", "overlap-1", "composition-1", "distribution-1", "distribution-1-weight"}
    assert expected | {f"distribution-1-{name}-{by}" for name in ABILITIES for by in ("layers", "kinds")} <= figures
    # Table 1 of the paper: below the diagonal overlap and count, then the union of both domains in the other language.
    header, *rows = next(table for table in page.tables if "union, other ending" in table[0])
    assert header[:5] == ["ability", *ABILITIES]
    selections = {name: plain_top(first[name], DENSITY) for name in ABILITIES}
    k = len(selections["math-en"])
    assert [row[0] for row in rows] == [*ABILITIES, "random"]
    for place, row in enumerate(rows[:-1]):
        common = [len(selections[row[0]] & selections[name]) for name in ABILITIES[: place + 1]]
        shown = [f"{100 * count / k:.1f} % ({count:,})" for count in common]
        assert row[1:5] == [*shown, *[DASH] * (3 - place)]
    other = len(selections["math-en"] & (selections["math-ar"] | selections["science-ar"]))
    assert rows[0][header.index("union, other ending")] == f"{100 * other / k:.1f} % ({other:,})"


def test_a_report_is_a_function_of_its_profiles(tmp_path):
    layout = channel_layout(tiny_config("qwen2"))
    for place, name in enumerate(("a", "b")):
        save_profile(random_profile(layout, name, seed=place), tmp_path / f"{name}.safetensors")
    command = ["report", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "-o"]
    for out in ("one", "two"):
        assert CliRunner().invoke(main, [*command, str(tmp_path / out)]).exit_code == 0
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    refused = CliRunner().invoke(main, [*command, str(tmp_path / "one")])
    assert refused.exit_code == 1
    assert "report.html exists. Choose another name or say --overwrite" in refused.output
    (tmp_path / "one" / "mine.csv").write_text("mine")
    only = ["report", str(tmp_path / "a.safetensors"), "-o", str(tmp_path / "one"), "--overwrite"]
    assert CliRunner().invoke(main, only).exit_code == 0
    left = {path.name for path in (tmp_path / "one").iterdir()}
    assert "distribution-a-kinds.svg" in left
    assert "mine.csv" in left
    assert not left & {"distribution-b-kinds.svg", "distribution-b-kinds.png", "overlap.csv"}


def heavy_head(layout: Layout) -> Profile:
    profile = random_profile(layout, "code", seed=3)
    return replace(profile, scores=dict(profile.scores) | {"lm_head": profile.scores["lm_head"] + 1000})


@pytest.mark.parametrize("name", ["qwen2", "qwen2-tied", "gpt2", "gpt_neox", "falcon"])
def test_the_head_is_found(name):
    assert channel_layout(tiny_config(name)).head == "lm_head"


def test_a_mask_in_the_head_is_warned_of(tmp_path):
    save_profile(heavy_head(channel_layout(tiny_config("qwen2"))), tmp_path / "code.safetensors")
    command = ["report", str(tmp_path / "code.safetensors"), "--density", "0.05"]
    done = CliRunner().invoke(main, [*command, "-o", str(tmp_path / "out")])
    warning = "100.00 % of the selected channels are rows of the LM head (lm_head)"
    assert warning in done.output
    assert warning in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert warning in CliRunner().invoke(main, command).output
    without = CliRunner().invoke(main, [*command, "--exclude", "lm_head", "-o", str(tmp_path / "out2")])
    assert "warning" not in without.output
    assert "Excluded: lm_head; " in (tmp_path / "out2" / "report.html").read_text(encoding="utf-8")
    mask = ["mask", str(tmp_path / "code.safetensors"), "-o", str(tmp_path / "m.safetensors"), "--density", "0.05"]
    mask += ["-v", "--retain", str(tmp_path / "code.safetensors"), "--retain-strength", "0"]
    done = CliRunner().invoke(main, mask)
    assert warning in done.output
    told = done.output.split("Without them: mergekit-act ")[-1].splitlines()[0]
    again = CliRunner().invoke(main, shlex.split(told))
    assert again.exit_code == 0, again.output
    assert "warning" not in again.output
    assert re.search(r"^nothing of (.*, )?lm_head$", again.output, re.MULTILINE)
    assert not any(line.startswith("lm_head") for line in again.output.splitlines())


def test_a_full_disk_leaves_figures_as_they_were_and_is_told(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / "loss.svg").write_text("earlier")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"loss\.svg could not be written: No space left on device"):
        draw_losses([(1, 3.0), (2, 2.0)], tmp_path / "loss")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["earlier"]


def test_control_characters_in_names_stay_out_of_pages_tables_and_figures(tmp_path):
    layout = channel_layout(tiny_config("qwen2"))
    for place, name in enumerate(("a\x1b[2J\nb", "plain")):
        made = replace(random_profile(layout, name, seed=place), target={"model": "t\x00\x9b", "fingerprint": "f"})
        save_profile(made, tmp_path / f"p{place}.safetensors")
    paths = [str(tmp_path / f"p{place}.safetensors") for place in range(2)]
    done = CliRunner().invoke(main, ["report", *paths, "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    files = [path for path in (tmp_path / "out").iterdir() if path.suffix != ".png"]
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert not [letter for letter in text if letter != "\n" and not letter.isprintable() and ord(letter) < 0xA0], (
            path
        )
    assert "a\\x1b[2J\\nb" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def small_layout() -> Layout:
    """Two layers of one matrix, [4, 2] each, and an embedding."""
    shapes = {"embed.weight": (3, 2), "layers.0.up.weight": (4, 2), "layers.1.up.weight": (4, 2)}
    owners = {"embed": (("embed.weight", 1),), "layers.0.up": (("layers.0.up.weight", 0),)}
    return Layout(owners | {"layers.1.up": (("layers.1.up.weight", 0),)}, shapes=shapes)


def small_profile() -> Profile:
    scores = {
        "embed": torch.tensor([0.5, 0.25]),
        "layers.0.up": torch.tensor([8.0, 1.0, 1.0, 1.0]),
        "layers.1.up": torch.tensor([9.0, 7.0, 2.0, 1.0]),
    }
    models = ({"model": "someone/target", "revision": "r"}, {"model": "ability"})
    data = {"dataset": "questions.jsonl"}
    return Profile(scores, small_layout(), "activation", "sums", *models, samples=5, answer_tokens=20, data=data)


def test_the_essentials_of_a_profile_and_a_mask(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_profile(small_profile(), "sums.safetensors")
    save_mask(make_mask([small_profile()], 0.3), "mask.safetensors")
    done = CliRunner().invoke(main, ["report", "sums.safetensors", "mask.safetensors", "--density", "0.3"])
    assert done.output == (
        'sums.safetensors: profile of "sums"\n'
        "  from ability (ability model) into someone/target (target)\n"
        "  5 samples, 20 answer tokens of questions.jsonl, in float32\n"
        "  scores from 1 (median), 9 (top 10 %), 9 (top 1 %), 9 (largest)\n"
        "  the top 30 %: 3 of 10 channels, 27.27 % of the parameters\n"
        "  module kinds: up (100 %)\n"
        "  layers: 1 (67 %), 0 (33 %)\n"
        "\n"
        "mask.safetensors: mask of sums (top 30 %)\n"
        "  from ability (ability model) into someone/target (target)\n"
        "  3 of 10 channels (30.00 %), 6 of 22 parameters (27.27 %)\n"
        "  module kinds: up (100 %)\n"
        "  layers: 1 (67 %), 0 (33 %)\n"
    )


def test_what_cannot_be_compared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_profile(small_profile(), "a.safetensors")
    save_profile(random_profile(channel_layout(tiny_config("qwen2")), "other", seed=1), "b.safetensors")
    save_profile(replace(small_profile(), ability="random", criterion="random"), "random.safetensors")
    save_mask(make_mask([small_profile()], 0.3), "mask.safetensors")
    cases = {
        ("a.safetensors", "b.safetensors"): "a.safetensors and b.safetensors are of models with different modules",
        ("a.safetensors", "./a.safetensors"): "a profile is named twice",
        ("mask.safetensors",): "mask.safetensors is a mask; expected a profile",
        ("random.safetensors",): "there is nothing to report of random scores alone",
        ("none.safetensors",): "none.safetensors does not exist",
        ("a.safetensors", "--density", "0"): "density is 0.0; expected a fraction in (0, 1]",
        ("a.safetensors", "--exclude", "*"): "no module is left after excluding *",
        ("a.safetensors", "--exclude", "lm_haed"): 'no module matches "lm_haed"',
    }
    for arguments, words in cases.items():
        done = CliRunner().invoke(main, ["report", *arguments, "-o", "out"])
        assert done.exit_code == 1, arguments
        assert words in done.output
    monkeypatch.setattr("mergekit_act.report.page.can_draw", lambda: False)
    done = CliRunner().invoke(main, ["report", "a.safetensors", "-o", "out"])
    assert 'pip install "mergekit-act[plots]"' in done.output
    assert not Path("out").exists()


def test_profiles_of_one_ability_are_told_apart(tmp_path):
    layout = channel_layout(tiny_config("qwen2"))
    for place, folder in enumerate(("few", "many")):
        save_profile(random_profile(layout, "sums", seed=place), tmp_path / folder / "sums.safetensors")
    paths = [tmp_path / folder / "sums.safetensors" for folder in ("few", "many")]
    (pair,) = load_comparison(paths, 0.01).pairs
    assert [scored.label for scored in pair.abilities] == [f"sums ({path})" for path in paths]
    done = CliRunner().invoke(main, ["report", *map(str, paths), "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert len(list((tmp_path / "out").glob("distribution-*-kinds.svg"))) == 2


def test_scores_that_are_all_zero_and_dead_channels(tmp_path):
    zero = replace(small_profile(), scores={module: scores * 0 for module, scores in small_profile().scores.items()})
    save_profile(zero, tmp_path / "zero.safetensors")
    save_profile(replace(small_profile(), ability="more"), tmp_path / "more.safetensors")
    paths = [str(tmp_path / f"{name}.safetensors") for name in ("zero", "more")]
    for chosen in (paths, paths[:1]):
        done = CliRunner().invoke(main, ["report", *chosen, "-o", str(tmp_path / f"out{len(chosen)}")])
        assert done.exit_code == 0, done.output
    assert CliRunner().invoke(main, ["report", paths[0]]).exit_code == 0


def test_a_mask_without_shapes_or_sources_is_told_too(tmp_path):
    layout = replace(small_layout(), shapes=None)
    save_mask(Mask({"embed": torch.tensor([True, False])}, layout), tmp_path / "m.safetensors")
    done = CliRunner().invoke(main, ["report", str(tmp_path / "m.safetensors"), "--density", "0.5"])
    assert "chosen when it was made; leave out --density and --exclude" in done.output
    done = CliRunner().invoke(main, ["report", str(tmp_path / "m.safetensors")])
    assert (done.exit_code, "1 channels" in done.output) == (0, True)


def test_every_pair_of_three_is_compared(tmp_path):
    layout = channel_layout(tiny_config("qwen2"))
    paths = []
    for place, pair in enumerate(("one", "two", "three")):
        paths.append(tmp_path / f"{pair}.safetensors")
        save_profile(random_profile(layout, "sums", seed=place, pair=pair), paths[-1])
    done = CliRunner().invoke(main, ["report", *map(str, paths), "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    rows = rows_of(tmp_path / "out" / "consistency.csv")
    names = [f"ability → target #{place}" for place in (1, 2, 3)]
    assert [(row["pair"], row["other_pair"]) for row in rows[:-1]] == list(combinations(names, 2))


def test_labels_are_shown_as_they_are_and_escaped(tmp_path):
    layout = channel_layout(tiny_config("qwen2"))
    names = ("_hidden", "a$b$", "<b>&\"'")
    for place, name in enumerate(names):
        save_profile(random_profile(layout, name, seed=place), tmp_path / f"p{place}.safetensors")
    paths = [str(tmp_path / f"p{place}.safetensors") for place in range(len(names))]
    done = CliRunner().invoke(main, ["report", *paths, "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert "b" not in page.tags
    assert [row[0] for row in page.tables[0][1:]] == list(names)
    drawn = (tmp_path / "out" / "distribution.svg").read_text(encoding="utf-8")
    assert "_hidden</text>" in drawn
    assert "a$b$</text>" in drawn


def test_short_names_are_not_ambiguous():
    layers = [f"model.decoder.layers.{layer}.{kind}" for layer in range(2) for kind in ("fc1", "final_layer_norm")]
    groups = Groups(["model.decoder.embed_tokens", *layers, "model.decoder.final_layer_norm", "lm_head"])
    assert groups.outside == ["embed_tokens", "model.decoder.final_layer_norm", "lm_head"]
    assert groups.kinds["final_layer_norm"] == [layers[1], layers[3]]
    assert groups.layers["1"] == layers[2:]
    assert list(Groups(["h.10.a", "h.9.a", "x"]).layers) == ["9", "10", "x"]


def test_a_vision_towers_blocks_are_not_the_decoder_layers():
    blocks = [f"model.visual.blocks.{block}.{kind}" for block in range(6) for kind in ("attn.qkv", "norm1", "norm2")]
    layers = [f"model.language_model.layers.{layer}.mlp" for layer in range(2)]
    merger = ["model.visual.merger.ln_q"]
    groups = Groups([*blocks, *merger, "model.language_model.embed_tokens", *layers, "model.language_model.norm"])
    assert [name for name in groups.layers if name.isdigit()] == ["0", "1"]
    assert groups.layers["1"] == layers[1:]
    assert "embed_tokens" in groups.outside
    assert groups.kinds["model.visual.blocks.*.attn.qkv"] == blocks[::3]


def test_excluded_modules_take_no_part(tmp_path):
    layout = channel_layout(tiny_config("qwen2-tied"))
    profiles = {name: random_profile(layout, name, seed=seed) for seed, name in enumerate(("math-en", "code-en"))}
    for name, profile in profiles.items():
        save_profile(profile, tmp_path / f"{name}.safetensors")
    paths = [str(tmp_path / f"{name}.safetensors") for name in profiles]
    exclude = ["lm_head", "*.down_proj"]
    options = [part for glob in exclude for part in ("--exclude", glob)]
    done = CliRunner().invoke(main, ["report", *paths, "-o", str(tmp_path / "out"), "--density", "0.1", *options])
    assert done.exit_code == 0, done.output
    kept = [module for module in layout.modules if module != "lm_head" and not module.endswith(".down_proj")]
    selections = [
        plain_top(replace(profile, scores={module: profile.scores[module] for module in kept}), 0.1)
        for profile in profiles.values()
    ]
    row = rows_of(tmp_path / "out" / "overlap.csv")[0]
    assert float(row["code-en"]) == pytest.approx(len(selections[0] & selections[1]) / len(selections[0]))
    (row,) = (
        r for r in rows_of(tmp_path / "out" / "densities.csv") if (r["ability"], r["density"]) == ("math-en", "0.1")
    )
    assert int(row["parameters"]) == plain_parameters(selections[0], layout)
    total = rows_of(tmp_path / "out" / "composition.csv")[-1]
    assert int(total["channels"]) == len(selections[0] | selections[1])


def test_labels_that_make_the_same_file_name_have_figures_of_their_own(tmp_path):
    layout = channel_layout(tiny_config("qwen2"))
    paths = []
    for place, folder in enumerate(("é", "è", "A", "a")):
        paths.append(tmp_path / folder / "sums.safetensors")
        save_profile(random_profile(layout, "sums", seed=place), paths[-1])
    assert CliRunner().invoke(main, ["report", *map(str, paths), "-o", str(tmp_path / "out")]).exit_code == 0
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert len(page.ids) == len(set(page.ids))
    drawn = [path.name.lower() for path in (tmp_path / "out").glob("distribution-*-kinds.svg")]
    assert len(set(drawn)) == 4


def test_masks_without_data_are_controls(tmp_path):
    layout = channel_layout(tiny_config("qwen2"))
    made = {
        "sums": random_profile(layout, "sums", seed=0),
        "weight": random_profile(layout, "weight", seed=1, criterion="weight"),
        "random": random_profile(layout, "random", seed=2, criterion="random"),
    }
    for name, profile in made.items():
        save_profile(profile, tmp_path / f"{name}.safetensors")
    paths = [str(tmp_path / f"{name}.safetensors") for name in made]
    assert CliRunner().invoke(main, ["report", *paths, "-o", str(tmp_path / "out")]).exit_code == 0
    (row, expected) = rows_of(tmp_path / "out" / "controls.csv")
    for name in ("weight", "random"):
        chosen, other = plain_top(made["sums"], 0.01), plain_top(made[name], 0.01)
        assert float(row[name]) == pytest.approx(len(chosen & other) / len(chosen))
        assert float(expected[name]) == pytest.approx(0.01, rel=0.2)
    assert CliRunner().invoke(main, ["report", paths[1], "-o", str(tmp_path / "out2")]).exit_code == 0
    assert (tmp_path / "out2" / "distribution-weight.svg").is_file()


def test_files_of_others_are_not_overwritten(tmp_path):
    save_profile(random_profile(channel_layout(tiny_config("qwen2")), "sums", seed=0), tmp_path / "sums.safetensors")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "densities.csv").write_text("mine")
    done = CliRunner().invoke(main, ["report", str(tmp_path / "sums.safetensors"), "-o", str(tmp_path / "out")])
    assert "densities.csv exists. Choose another name or say --overwrite" in done.output
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["densities.csv"]
