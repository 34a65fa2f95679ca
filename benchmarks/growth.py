"""How time and memory grow with samples, layers and width.

    python benchmarks/growth.py [--device cpu]

Profiles small random pairs streamed, each in a process of its own: twice and four times the samples and the layers,
twice the width. Memory is measured as benchmarks/streaming.py does. With samples it must not grow beyond the buffers
for hidden states, with layers not beyond the sums.
"""

from __future__ import annotations

import tempfile
from pathlib import Path


def main() -> None:
    import click
    import torch
    from random_pair import CONFIGS, make_pair, qwen2
    from streaming import measure, peaks_of

    from mergekit_act.streaming.memory import parse_bytes
    from mergekit_act.wording import table

    @click.command()
    @click.option("--device", default="cpu", show_default=True)
    @click.option("--budget", default="600MB", show_default=True)
    def run(device, budget) -> None:
        script = Path(__file__).with_name("streaming.py")
        base = {"samples": 32, "layers": 6, "width": 512}
        rows = []
        for name in base:
            for factor in (1, 2, 4):
                if (factor == 1 and rows) or (factor == 4 and name == "width"):
                    continue
                size = base | {name: base[name] * factor}
                width = size["width"]
                CONFIGS["grown"] = lambda width=width, layers=size["layers"]: qwen2(
                    width, layers, width // 64, width // 64, 4 * width, 32000, tied=False
                )
                with tempfile.TemporaryDirectory() as folder:
                    folders = make_pair("grown", Path(folder), torch.bfloat16)
                    settings = {
                        "folders": [str(path) for path in folders], "device": device, "dtype": "float32", "tokens": 128,
                        "samples": size["samples"], "batch_tokens": 1024, "budget": parse_bytes(budget),
                    }  # fmt: skip
                    found = measure(settings, script)
                rows.append([*map(str, size.values()), f"{found['seconds']:.1f}", *peaks_of([found])])
        print(f"float32 from bfloat16 files, {device}, 128 tokens a sample, budget {budget}; GB")
        print(table([*base, "seconds", "RssAnon", "RssFile", "their sum", "device"], rows))

    run()


if __name__ == "__main__":
    main()
