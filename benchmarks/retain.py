"""Rankings that spare the target's abilities, beside plain ACT, on the demo's models.

    mergekit-act demo FOLDER && python benchmarks/retain.py FOLDER [--max-density 1]

Every ranking gets the same grid of densities and weights; told is the most that it recovers (likelihood of an answer
token, geometric mean over the four tables of facts, held-out questions) while the two mathematics keep a share of what
the target has. Rankings: s is a channel's score on an ability to recover, r the largest on those to retain, e the
median of their positive ones.
"""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import click
import torch

DENSITIES = (0.01, 0.02, *(percent / 100 for percent in range(5, 100, 5)))
WEIGHTS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2)
SHARES = (0.99, 0.98, 0.97, 0.95, 0.9)


def rankings(retained):
    """Name -> (what is done to a profile, the retention)."""
    from mergekit_act.selection import Retention

    def changed(function):
        def change(profile):
            modules = list(profile.scores)
            s = torch.cat([profile.scores[m].flatten() for m in modules])
            r = torch.stack([torch.cat([p.scores[m].flatten() for m in modules]) for p in retained]).amax(0)
            found = function(s, r, r[r > 0].median())
            parts = (found - found.min()).split([profile.scores[m].numel() for m in modules])
            scores = {m: part.view(profile.scores[m].shape) for m, part in zip(modules, parts, strict=True)}
            return replace(profile, scores=scores)

        return change

    def same(profile):
        return profile

    def quantile(values):
        return values.argsort().argsort() / len(values)

    made = {
        "s (plain ACT)": (same, None),
        "s - r / 2 (--retain)": (same, Retention(retained)),
        "s - r (--retain-strength 1)": (same, Retention(retained, strength=1.0)),
        "s - 2 r (--retain-strength 2)": (same, Retention(retained, strength=2.0)),
        "s / (r + e) (--retain-ranking ratio)": (same, Retention(retained, ranking="ratio")),
        "s / (r + e)^2": (changed(lambda s, r, e: s / (r + e) ** 2), None),
        "(s - r) / (s + r + e)": (changed(lambda s, r, e: (s - r) / (s + r + e)), None),
        "quantile(s) - quantile(r)": (changed(lambda s, r, _: quantile(s) - quantile(r)), None),
    }
    for density in (0.05, 0.2):
        made[f"s, without r's top {density:.0%}"] = (same, Retention(retained, ranking="score", density=density))
    return made


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--max-density", default=1.0, show_default=True)
def main(folder: Path, max_density: float) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    from mergekit_act.abilities import Tokenizers, load_abilities
    from mergekit_act.artifacts import load_profile, save_mask
    from mergekit_act.checkpoints import open_checkpoint
    from mergekit_act.evaluation import collect_held_out, score_answers
    from mergekit_act.models import load_model
    from mergekit_act.planning import plan_merge
    from mergekit_act.selection import make_mask
    from mergekit_act.sweep import PatchedModel
    from mergekit_act.wording import table

    os.chdir(folder)
    file = load_abilities("abilities.yml")
    held_out = collect_held_out(file, Tokenizers(file.target, file.ability_model))
    profiles = {name: load_profile(f"profiles/{name}.safetensors") for name in file.abilities}
    retained = [profiles[one.ability] for one in held_out if one.role == "keep"]
    recovered = [profiles[one.ability] for one in held_out if one.role == "recover"]
    patched = PatchedModel(load_model(open_checkpoint(file.target), device="cpu", dtype=torch.float32), torch.float32)

    def likelihoods():
        nll: dict[str, list[float]] = {"recover": [], "keep": []}
        for one in held_out:
            loss, tokens = score_answers(patched.model, one.samples)
            nll[one.role].append(float(loss.sum() / tokens.sum()))
        return tuple(math.exp(-sum(values) / len(values)) for values in nll.values())

    target, kept = likelihoods()
    rows = [["the target itself", *[f"{target:.3f}"] * len(SHARES)]]
    with tempfile.TemporaryDirectory() as temporary:
        for name, (change, retention) in rankings(retained).items():
            best = dict.fromkeys(SHARES, 0.0)
            for density in (density for density in DENSITIES if density <= max_density):
                path = f"{temporary}/mask.safetensors"
                mask = make_mask([change(profile) for profile in recovered], density, retain=retention)
                save_mask(mask, path, overwrite=True)
                model = {"model": file.ability_model, "parameters": {"weight": 1.0, "mask": path}}
                config = MergeConfiguration.model_validate(
                    {"merge_method": "act", "base_model": file.target, "models": [model], "dtype": "float32"}
                )
                ability = config.models[0].model
                patched.take(plan_merge(config, MergeOptions()))
                for weight in WEIGHTS:
                    with patched.patched({ability: weight}):
                        recover, keep = likelihoods()
                    for share in SHARES:
                        if keep >= share * kept:
                            best[share] = max(best[share], recover)
            rows.append([name, *(f"{best[share]:.3f}" for share in SHARES)])
    print(table(["recovered while keeping", *(f"{share:.0%}" for share in SHARES)], rows))


if __name__ == "__main__":
    main()
