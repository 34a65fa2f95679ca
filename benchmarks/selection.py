"""Rules of selection beside each other: what each recovers while the kept abilities stay.

    mergekit-act demo DEMO && python benchmarks/selection.py DEMO
    python benchmarks/real_pair.py REAL && python benchmarks/selection.py REAL --kept exact \\
        --exclude lm_head --exclude model.embed_tokens

FOLDER holds an abilities file with abilities to recover and to keep. Two fifths of its held-out samples are for
validation, the others for test. For every rule and share of parameters (1, 5, 20 %, and the best of all) the weight is
the largest at which the kept abilities have at least 97 % of what the target has on validation samples: right answers
(--kept exact), or likelihood. Told is what that point does on test samples, with 95 % bootstrap intervals. Answers
count as right if all their tokens are the most likely ones, which is what greedy decoding gives. What is measured is
kept in FOLDER/selection, and a rerun goes on from there.
"""

from __future__ import annotations

import copy
import json
import math
import os
import tempfile
from functools import partial
from pathlib import Path

import click
import numpy as np
import torch
from tqdm import tqdm

SHARES = (0.01, 0.05, 0.2)
FREE = (0.4,)  # for the best of all, besides these
FITTED = (0.05, 0.2, 0.4)
WEIGHTS = (1.0, 0.7, 0.5, 0.3)
KEPT = 0.97
VALIDATION = 0.4
HEADER = ["rule", "parameters", "density", "weight", "kept", "likelihood kept", "nll to recover", "exact"]


class Measured:
    """Scores of a model on held-out samples; what all samples begin with is computed once."""

    def __init__(self, held_out, parts):
        self.sets = {}
        for one in held_out:
            cut = round(VALIDATION * len(one.samples))
            for part, samples in (("validation", one.samples[:cut]), ("test", one.samples[cut:])):
                if part in parts:
                    self.sets[part, one.role, one.ability] = samples

    @torch.inference_mode()
    def scores(self, model, part):
        """(role, ability) -> ``[samples, 3]``: loss, answer tokens, whether all of them are the most likely."""
        return {key[1:]: torch.tensor(self._of(model, samples)) for key, samples in self.sets.items() if key[0] == part}

    def _of(self, model, samples):
        shortest = min(min(len(s.input_ids), int(s.is_answer.nonzero()[0]) - 1) for s in samples)
        first = torch.stack([s.input_ids[:shortest] for s in samples])
        same = int((first == first[0]).all(0).cumprod(0).sum())
        prefix = model(samples[0].input_ids[None, :same], use_cache=True).past_key_values if same else None
        order = sorted(range(len(samples)), key=lambda place: len(samples[place].input_ids))
        found = {}
        for start in range(0, len(order), 40):
            some = [samples[place] for place in order[start : start + 40]]
            ids = torch.nn.utils.rnn.pad_sequence([s.input_ids[same:] for s in some], batch_first=True)
            cache = None
            if same:
                cache = copy.deepcopy(prefix)
                cache.batch_repeat_interleave(len(some))
            hidden = model.base_model(ids, past_key_values=cache, use_cache=bool(same)).last_hidden_state
            for line, place in enumerate(order[start : start + 40]):
                answers = samples[place].is_answer.nonzero().flatten()
                logits = model.lm_head(hidden[line, answers - 1 - same]).float()
                labels = samples[place].input_ids[answers]
                loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
                found[place] = (float(loss), len(labels), float((logits.argmax(-1) == labels).all()))
        return [found[place] for place in range(len(samples))]


def summary(scores):
    """Means over the abilities of a role: kept, likelihood kept, nll, exact."""
    rows = {role: [s for (its, _), s in scores.items() if its == role] for role in ("recover", "keep")}
    nll = {role: np.mean([float(s[:, 0].sum() / s[:, 1].sum()) for s in own]) for role, own in rows.items()}
    exact = {role: np.mean([float(s[:, 2].mean()) for s in own]) for role, own in rows.items()}
    return {
        "kept": exact["keep"],
        "likelihood": math.exp(-nll["keep"]),
        "nll": nll["recover"],
        "exact": exact["recover"],
    }


def intervals(scores, rounds=2000):
    """95 % bootstrap intervals of the same, samples drawn anew within each ability."""
    generator = torch.Generator().manual_seed(0)
    drawn = [
        summary({key: s[torch.randint(len(s), (len(s),), generator=generator)] for key, s in scores.items()})
        for _ in range(rounds)
    ]
    return {name: np.quantile([one[name] for one in drawn], (0.025, 0.975)).tolist() for name in drawn[0]}


def rules(profiles, kept, exclude):
    """Name -> (profiles, options of make_mask)."""
    from mergekit_act.selection import Retention

    without = {"exclude": exclude}
    made = {
        "random": (profiles["random"], without),
        "weight": (profiles["weight"], without),
        "activation (paper)": (profiles["activation"], {}),
        "activation, centered logits": (profiles["centered"], {}),
        "activation without head": (profiles["activation"], without),
        "local": (profiles["local"], without),
        "attribution": (profiles["attribution"], without),
        "attribution over damage": (profiles["attribution"], without | {"retain": Retention(kept)}),
    }
    return made


def density_of(profiles, share, options):
    """The density per profile with which their union owns so much of the parameters."""
    from mergekit_act.selection import excluded_modules, rank_channels

    layout = profiles[0].layout
    sizes = torch.tensor([profiles[0].scores[module].numel() for module in layout.modules])
    owned = torch.repeat_interleave(torch.tensor([layout.parameters_per_channel(m) for m in layout.modules]), sizes)
    # A channel is in the union of the profiles' first k if its best rank is below k.
    ranks = torch.stack([rank_channels(profile, **options) for profile in profiles]).amin(0)
    ranked = ranks < len(ranks)
    total = torch.zeros(len(ranks), dtype=torch.long).index_add_(0, ranks[ranked], owned[ranked])
    k = max(1, int((total.cumsum(0) <= share * layout.parameter_count()).sum()))
    excluded = excluded_modules(layout, options.get("exclude", ()))
    taking_part = sum(int(n) for module, n in zip(layout.modules, sizes, strict=True) if module not in excluded)
    return min(1.0, (k + 0.5) / taking_part)


def make_profiles(file, folder):
    """Profiles by all criteria, and the inputs."""
    from mergekit_act.artifacts import load_profile
    from mergekit_act.profiling import ProfilingSettings, write_profiles

    kinds = {
        "random": {"criterion": "random"},
        "weight": {"criterion": "weight"},
        "activation": {},
        "centered": {"center_logits": True},
        "local": {"criterion": "local"},
        "attribution": {"criterion": "attribution", "inputs": True},
    }
    found = {}
    for name, settings in kinds.items():
        out = folder / name
        names = [name] if name in ("random", "weight") else list(file.abilities)
        if not all((out / f"{one}.safetensors").exists() for one in names):
            write_profiles(file, out, ProfilingSettings(dtype="float32", **settings))
        found[name] = {one: load_profile(out / f"{one}.safetensors") for one in names}
    return found


def stock_merges(file, folder):
    """mergekit's own methods: name -> the folder of a merge, made when it is asked for."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    def make(method, parameters):
        model = {"model": file.ability_model, "parameters": parameters}
        written = {"merge_method": method, "base_model": file.target, "models": [model], "dtype": "float32"}
        written["parameters"] = {"normalize": False}  # or the weight of a single model would do nothing
        run_merge(MergeConfiguration.model_validate(written), str(folder), MergeOptions(quiet=True, random_seed=0))
        return folder

    for method, more in (("ties", {}), ("dare_linear", {}), ("della_linear", {"epsilon": 0.1})):
        for density in (0.2, 0.5):
            for weight in (0.6, 0.3, 0.1):
                yield method, density, weight, partial(make, method, {"density": density, "weight": weight, **more})


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--abilities", default="abilities.yml", show_default=True)
@click.option("--kept", "kept_by", type=click.Choice(["exact", "likelihood"]), default="likelihood", show_default=True)
@click.option("--exclude", multiple=True, help="What all rules but the paper's leave out.")
@click.option("--only", multiple=True, help="Only rules whose name has this.")
@click.option("--fit-keep", default=None, type=float)
@click.option("--fit-ridge", default=None, type=float)
def main(folder: Path, abilities: str, kept_by: str, exclude, only, fit_keep, fit_ridge) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    from mergekit_act.abilities import Tokenizers, load_abilities
    from mergekit_act.artifacts import save_mask
    from mergekit_act.checkpoints import open_checkpoint
    from mergekit_act.evaluation import collect_held_out
    from mergekit_act.models import load_model
    from mergekit_act.planning import plan_merge
    from mergekit_act.selection import make_mask
    from mergekit_act.sweeping import PatchedModel
    from mergekit_act.wording import table

    os.chdir(folder)
    file = load_abilities(abilities)
    out = Path("selection")
    out.mkdir(exist_ok=True)
    profiles = make_profiles(file, out)
    roles = {name: ability.role for name, ability in file.abilities.items()}
    by_criterion = {
        criterion: list(own.values()) if criterion in own else [p for n, p in own.items() if roles[n] == "recover"]
        for criterion, own in profiles.items()
    }
    kept = [profile for name, profile in profiles["attribution"].items() if roles[name] == "keep"]
    held_out = collect_held_out(file, Tokenizers(file.target, file.ability_model))
    measured = Measured(held_out, ("validation", "test"))

    def load(source):
        return load_model(open_checkpoint(str(source)), device="cpu", dtype=torch.float32)

    model = load(file.target)
    patched = PatchedModel(model, torch.float32)
    store = out / "scores.jsonl"
    known = {}
    if store.exists():
        known = {one["key"]: one for one in map(json.loads, store.read_text().splitlines())}

    def score(key, part, model):
        key = f"{part} {key}"
        if key not in known:
            scores = measured.scores(model, part)
            one = {"key": key, **summary(scores)}
            one |= {"intervals": intervals(scores)} if part == "test" else {}
            known[key] = one
            with store.open("a") as lines:
                lines.write(json.dumps(one) + "\n")
        return known[key]

    target = {part: score("target", part, model) for part in ("validation", "test")}
    rows = [("target", "", "", "", target["test"])]
    key = "test ability model"
    own = known[key] if key in known else score("ability model", "test", load(file.ability_model))
    rows.append(("ability model", "", "", "", own))

    def enough(one):
        name = "kept" if kept_by == "exact" else "likelihood"
        return one[name] >= KEPT * target["validation"][name]

    points = []  # rule, share, density, weights, and what gives the model, within which it is a merge of a weight
    with tempfile.TemporaryDirectory() as temporary:
        mask_file = Path(temporary) / "mask.safetensors"
        planned: list[object] = [None]

        def act(rule, chosen, options, density, fit, weight):
            wanted = (rule, density, fit)
            if planned[0] != wanted:
                save_mask(make_mask(chosen, density, **options), mask_file, overwrite=True)
                own = {"weight": 1.0, "mask": str(mask_file)}
                if fit:
                    own |= {"fit": str(out / "attribution" / "fit" / "inputs.safetensors")}
                    own |= {} if fit_keep is None else {"fit_keep": fit_keep}
                    own |= {} if fit_ridge is None else {"fit_ridge": fit_ridge}
                models = [{"model": file.ability_model, "parameters": own}]
                written = {"merge_method": "act", "base_model": file.target, "models": models, "dtype": "float32"}
                config = MergeConfiguration.model_validate(written)
                ability = config.models[0].model
                patched.take(plan_merge(config, MergeOptions()))
                planned[:] = [wanted, ability]
            return patched.patched({planned[1]: weight})

        shown = f" (keep {fit_keep}, ridge {fit_ridge})" if (fit_keep, fit_ridge) != (None, None) else ""
        every = {"task arithmetic": (by_criterion["weight"], {}), **rules(by_criterion, kept, exclude)}
        for fit in (False, True):
            for rule, (chosen, options) in every.items():
                if fit and not options.get("exclude"):
                    if rule != "task arithmetic":
                        continue
                    rule, options = "all rows", {"exclude": exclude}
                name = f"{rule}, fitted{shown}" if fit else rule
                if only and not any(one in name for one in only):
                    continue
                shares = FITTED if fit else (*SHARES, *FREE)
                shares = (1.0,) if rule in ("task arithmetic", "all rows") else shares
                weights = (*WEIGHTS, 0.2, 0.1) if rule == "task arithmetic" else WEIGHTS
                for share in shares:
                    density = 1.0 if share == 1 else density_of(chosen, share, options)
                    points.append((name, share, density, weights, partial(act, rule, chosen, options, density, fit)))
        found = {}
        for name, share, density, weights, merge in tqdm(points):
            for weight in weights:
                key = f"{name} {share} {weight}"
                if f"validation {key}" not in known:
                    with merge(weight) as merged:
                        score(key, "validation", merged)
                one = (known[f"validation {key}"], share, density, weight, key, merge)
                found.setdefault(name, []).append(one)
                if enough(one[0]):
                    break
        for name, tried in found.items():
            by_share = [(f"{share:.0%}", [one for one in tried if one[1] == share]) for share in SHARES]
            for shown_share, some in (*by_share, ("free", tried)):
                allowed = [one for one in some if enough(one[0])]
                if not some:
                    continue
                if not allowed:
                    rows.append((name, shown_share, "", "none keeps enough", None))
                    continue
                best = min(allowed, key=lambda one: one[0]["nll"])
                _, share, density, weight, key, merge = best
                if f"test {key}" not in known:
                    with merge(weight) as merged:
                        score(key, "test", merged)
                shown_share = f"free: {share:.0%}" if shown_share == "free" else shown_share
                rows.append((name, shown_share, f"{density:.2%}", f"{weight:g}", known[f"test {key}"]))
        if not only:
            tried = {}
            for method, density, weight, make in stock_merges(file, Path(temporary) / "merge"):
                if any(enough(one[0]) for one in tried.get((method, density), ())):
                    continue
                key = f"{method} {density} {weight}"
                if f"validation {key}" not in known:
                    score(key, "validation", load(make()))
                tried.setdefault((method, density), []).append((known[f"validation {key}"], density, weight, key, make))
            for method in dict.fromkeys(method for method, _ in tried):
                own = [one for (its, _), some in tried.items() if its == method for one in some if enough(one[0])]
                if own:
                    _, density, weight, key, make = min(own, key=lambda one: one[0]["nll"])
                    if f"test {key}" not in known:
                        score(key, "test", load(make()))
                    rows.append((method, f"density {density:g}", "", f"{weight:g}", known[f"test {key}"]))
                else:
                    rows.append((method, "", "", "none keeps enough", None))
    print(table(HEADER, [[*row[:4], *(cells(row[4]) if row[4] else [""] * 4)] for row in rows]))


def cells(one):
    def shown(name, digits):
        low, high = one["intervals"][name]
        return f"{one[name]:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

    return [shown("kept", 2), shown("likelihood", 2), shown("nll", 2), shown("exact", 2)]


if __name__ == "__main__":
    main()
