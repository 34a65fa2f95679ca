"""The reader of YAML files: what people write, and what is refused with its line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from mergekit_act.cli import main
from mergekit_act.yaml_files import SeveralDocumentsError, parse_yaml, read_yaml


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"]
    return "\n".join(lines + [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)])


def test_plain_values_anchors_and_merged_keys_are_taken():
    text = "a: &a {x: 1, y: [1.5, true, null, é]}\nb:\n  <<: *a\n  x: 2\nday: 2024-07-26\nsign: =\n"
    found = parse_yaml(text, "f")
    assert found["b"] == {"x": 2, "y": [1.5, True, None, "é"]}
    assert (found["day"], found["sign"]) == ("2024-07-26", "=")  # dates stay the texts that they are


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 1\nb: !!bool maybe", '"maybe" cannot be read as !!bool (line 2)'),
        ("a: !!int ''", '"" cannot be read as !!int (line 1)'),
        ("a: " + "9" * 5000, "cannot be read as !!int (line 1)"),
        ("a: !!set [b]", "!!set is not taken; expected texts, numbers, lists and mappings (line 1)"),
        ("a: !!python/name:os.system x", "!!python/name:os.system is not taken"),
        ("a: !!map x", "expected a mapping, found !!map (line 1)"),
        ("1: x", "the key 1 is no text; write it in quotes (line 1)"),
        ("a: {null: x}", "the key null is no text"),
        ("? [a]\n: x", "a list or mapping cannot be a key (line 1)"),
        ("a: 1\nb: 2\na: 3", 'key "a" stands twice in one mapping (line 3)'),
        ("a: {{q}}", "a list or mapping cannot be a key (line 1); a text with braces goes in quotes"),
        ("a: {q} and more", "(line 1); a text with braces goes in quotes"),
        ("a: " + "[" * 1000 + "]" * 1000, "it is nested more than 50 deep (line 1)"),
        ("a: &a [*a]", "an alias stands inside of what it names (line 1)"),
        (bomb(9), "with its aliases it has more than 100,000 values (line 6)"),
        ("\n".join(["a0: &a0 x", *(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 99))]), "nested more than 50 deep"),
        ("a: *b", "found undefined alias 'b' (line 1)"),
        ("a: 1\nb: \x00", "the character U+0000 is not allowed (line 2)"),
        ('a: "\\ud800"', "has half a character (line 1)"),
        ('a: "\\U00110000"', "f is not valid YAML: "),
    ],
    ids=lambda text: text[:20],
)
def test_what_is_not_plain_is_refused_with_its_line(text, told):
    with pytest.raises(ValueError, match="f is not valid YAML") as caught:
        parse_yaml(text, "f")
    assert told in str(caught.value)
    assert len(str(caught.value)) < 800
    assert str(caught.value).isprintable()


def test_several_documents():
    with pytest.raises(SeveralDocumentsError, match=r"f holds several documents \(line 2\); expected one"):
        parse_yaml("a: 1\n---\nb: 2", "f")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"a: 1\nb: caf\xe9", "it is not UTF-8, byte 0xe9 in line 2; save it as UTF-8"),
        ("a: é".encode("utf-16"), "it is not UTF-8, byte 0xff in line 1"),
        (b"", "it is empty; expected a mapping"),
        (b"# nothing", "it is empty"),
        (b"- a", "it is a list; expected a mapping"),
        (b"a: " + b"x" * 1_000_000, "it is larger than 1,000,000 bytes"),
    ],
    ids=lambda content: repr(content[:12]),
)
def test_files_that_are_none(tmp_path, content, told):
    (tmp_path / "c.yml").write_bytes(content)
    with pytest.raises(ValueError, match=r"c\.yml is no merge config: ") as caught:
        read_yaml(tmp_path / "c.yml", "merge config")
    assert told in str(caught.value)
    (tmp_path / "c.yml").write_bytes(b"\xef\xbb\xbfa: 1\r\n")
    assert read_yaml(tmp_path / "c.yml", "merge config") == {"a": 1}


@pytest.mark.parametrize(
    "command", [["check", "x.yml"], ["profile", "x.yml", "out"], ["sweep", "x.yml", "x.yml", "out"]]
)
def test_every_command_reads_so(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    for made, told in (
        (lambda: os.mkfifo("x.yml"), "it is not a regular file"),  # to read it would wait for ever
        (lambda: os.mkdir("x.yml"), "it is a folder"),
        (lambda: Path("x.yml").write_text("1: x\nextra: y\n"), "the key 1 is no text"),
        (lambda: Path("x.yml").write_text(bomb(9)), "more than 100,000 values"),
    ):
        made()
        done = CliRunner().invoke(main, command)
        assert (done.exit_code, told in done.output) == (1, True), done.output
        assert done.output.count("\n") == 1
        os.rmdir("x.yml") if os.path.isdir("x.yml") else os.unlink("x.yml")
