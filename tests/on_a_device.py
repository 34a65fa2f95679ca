"""mergekit-act in a process whose accelerator is the stand-in.

    python on_a_device.py COMMANDS.json

The file has a list of commands, each a list of arguments. Told is, for each, what was copied to and from the device.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import standin

standin.register()

from mergekit_act import devices  # noqa: E402
from mergekit_act.cli import main  # noqa: E402
from mergekit_act.profiling import sums  # noqa: E402

devices._WITHOUT_FLOAT64 |= {standin.NAME}
sums._DEVICE_BLOCK = sums._CPU_BLOCK  # its memory is small, or tiny models would never be streamed

if __name__ == "__main__":
    told = []
    for command in json.loads(Path(sys.argv[1]).read_text()):
        standin.crossings = standin.Crossings()
        main(command, standalone_mode=False)
        told.append(vars(standin.crossings))
    print(json.dumps(told))
