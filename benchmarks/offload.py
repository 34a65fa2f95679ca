"""Streamed profiling against bare forwards over accelerate's offload, in small micro-batches.

    python benchmarks/offload.py [--model qwen2.5-1.5b] [--budget 1.5GB] [--device cpu] [--rounds 3]

Without streaming, a pair that does not fit would be run by accelerate, which loads every layer again for every batch.
Times, each in a process of its own, alternating: bare forwards of both models (head at the answers) resident, with
accelerate's disk offload and with its CPU offload; and the profiler, resident and within a budget. Set-up is excluded
for the bare forwards, and included for the profiler. Prints how much of what accelerate's disk offload adds to the
resident forwards is won back.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from streaming import measure, memory_of, peaks_of


def child(settings: dict) -> None:
    """Run the batches through both models once; print the memory before and the seconds."""
    import torch

    before = memory_of("self")
    import transformers
    from accelerate import cpu_offload, disk_offload
    from forwards import bare_forward
    from random_pair import random_ability

    from mergekit_act.abilities.batches import cut_batches

    device, dtype = settings["device"], getattr(torch, settings["dtype"])
    models = []
    for folder in settings["folders"]:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        if settings["offload"] == "disk":
            disk_offload(model, f"{folder}-offload-{settings['dtype']}", execution_device=torch.device(device))
        elif settings["offload"] == "cpu":
            cpu_offload(model, execution_device=torch.device(device))
        else:
            model.to(device)
        models.append(model)
    ability = random_ability(settings["samples"], settings["tokens"], models[0].config.vocab_size)
    batches = [batch.to(device) for batch in cut_batches(ability.samples, settings["batch_tokens"])]
    print(json.dumps({"before": before}), flush=True)
    started = time.perf_counter()
    with torch.inference_mode():
        for batch in batches:
            for model in models:
                bare_forward(model, batch, full_head=False)
    if device != "cpu":
        torch.accelerator.synchronize()
    peak = torch.cuda.max_memory_allocated() if device.startswith("cuda") else 0
    print(json.dumps({"seconds": time.perf_counter() - started, "device": peak}))


def read_through(*folders: str) -> None:
    """Bring files into the page cache, as far as they fit."""
    for folder in folders:
        for path in Path(folder).glob("*"):
            if path.suffix in (".safetensors", ".dat"):
                with open(path, "rb", buffering=0) as file:
                    while file.read(1 << 24):
                        pass


def main() -> None:
    import click
    from random_pair import CONFIGS, pair_in

    from mergekit_act.devices import default_dtype
    from mergekit_act.streaming.memory import parse_bytes
    from mergekit_act.wording import table

    @click.command()
    @click.option("--model", type=click.Choice(list(CONFIGS)), default="qwen2.5-1.5b", show_default=True)
    @click.option("--folder", help="Where the pair is made, or is from an earlier run.  [default: a temporary one]")
    @click.option("--budget", default="1.5GB", show_default=True)
    @click.option("--device", default="cpu", show_default=True)
    @click.option("--samples", default=8, show_default=True)
    @click.option("--tokens", default=256, show_default=True)
    @click.option("--batch-tokens", default=512, show_default=True)
    @click.option("--rounds", default=3, show_default=True)
    def run(model, folder, budget, device, samples, tokens, batch_tokens, rounds) -> None:
        dtype = str(default_dtype(device)).removeprefix("torch.")
        with tempfile.TemporaryDirectory() as temporary:
            common = {
                "folders": pair_in(Path(folder or temporary), model), "device": device, "dtype": dtype,
                "samples": samples, "tokens": tokens, "batch_tokens": batch_tokens,
            }  # fmt: skip
            modes = {
                "bare forwards, resident": {"offload": None},
                "bare forwards, accelerate disk": {"offload": "disk"},
                "bare forwards, accelerate CPU": {"offload": "cpu"},
                "profile, resident": {"budget": 10**15},
                f"profile, budget {budget}": {"budget": parse_bytes(budget)},
            }
            results: dict[str, list[dict]] = {name: [] for name in modes}
            for _ in range(rounds):
                for name, mode in modes.items():
                    read_through(*common["folders"], *(f"{f}-offload-{dtype}" for f in common["folders"]))
                    script = Path(__file__ if "offload" in mode else Path(__file__).with_name("streaming.py"))
                    results[name].append(measure(common | mode, script))
        seconds = {name: statistics.median(result["seconds"] for result in each) for name, each in results.items()}
        rows = []
        for name, each in results.items():
            peaks = peaks_of(each)
            rows.append([name, f"{seconds[name]:.1f}", *peaks])
        print(
            f"{model}, {dtype}, {device}, {samples} samples of {tokens} tokens, half answer, micro-batches of "
            f"{batch_tokens} tokens, medians of {rounds} alternating rounds; GB"
        )
        print(table(["", "seconds", "RssAnon", "RssFile", "their sum", "device"], rows))
        bare, disk, _, _, streamed = seconds.values()
        print(
            f"to bare resident forwards disk offload adds {disk - bare:.1f} s, streaming and scoring "
            f"{streamed - bare:.1f} s: {1 - (streamed - bare) / (disk - bare):.0%} is won back"
        )

    run()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(json.loads(sys.argv[2]))
    else:
        main()
