"""The demo, from its first command to its last table, with models that have hardly been trained."""

from __future__ import annotations

from mergekit_act.cli.running import run_words
from mergekit_act.demo import run_demo, story


def test_every_command_of_the_demo_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(story, "THREADS", 1)  # other tests have the other core
    monkeypatch.setattr(story, "FINETUNING", ("--micro-batch", "16", *story.FINETUNING[-1:]))
    out = tmp_path / "demo"
    lines: list[str] = []
    run_demo(out, run=run_words, echo=lines.append, quiet=True, steps=dict.fromkeys(("base", "ability", "target"), 2))
    said = "\n".join(lines)
    commands = [line.split()[1:3] for line in said.splitlines() if line.startswith("$ ")]
    assert {name for _, name in commands} >= {"profile", "mask", "finetune", "evaluate", "card", "report"}
    header, *rows = said.partition("not profiled, after ")[2].splitlines()[2:]
    for name in ("target", "ability", "ACT", "attribution", "random", "weight", "task arithmetic", "SFT", "ACT, SFT"):
        assert name in header
    labels = [row.split("  ")[0] for row in rows if row]
    assert labels[labels.index("kept: math, two languages") + 1] == "recovered: facts"
    assert (out / "report" / "report.html").is_file()
    assert "## Evaluation" in (out / "merged" / "act" / "README.md").read_text(encoding="utf-8")
    assert "moved" in lines[-1]
