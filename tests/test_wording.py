"""How odd text is shown."""

from __future__ import annotations

import json

from mergekit_act.wording import LONGEST, enumerate_some, escape, shorten


def test_control_characters_are_written_out():
    assert escape("a\x1b]0;t\x07\nb\x9b\u202e\ud800\x7fé→") == "a\\x1b]0;t\\x07\\nb\\u009b\\u202e\\ud800\\u007fé→"
    assert escape("a\nb\t", keep="\n") == "a\nb\\t"
    printed = json.dumps({"a": "\x9b\u200f\x00"}, ensure_ascii=False)
    assert json.loads(escape(printed, keep="\n")) == {"a": "\x9b\u200f\x00"}


def test_long_text_keeps_its_beginning_and_its_end():
    text = "begin" + "x" * 10_000 + "end"
    short = shorten(text)
    assert len(short) <= LONGEST
    assert short.startswith("begin")
    assert short.endswith("end")
    assert " characters more … " in short
    assert shorten("short") == "short"


def test_lists_are_cut():
    assert enumerate_some(range(3)) == "0, 1, 2"
    assert enumerate_some(range(30)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, and 20 more"
    assert len(enumerate_some(["x" * 9000] * 20)) < LONGEST
