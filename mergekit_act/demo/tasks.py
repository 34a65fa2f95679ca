"""Four invented languages and three domains: addition, a table of facts, the largest of three."""

from __future__ import annotations

import random
from dataclasses import dataclass

__all__ = ["DOMAINS", "LANGUAGES", "Row", "all_rows"]

# A language is an alphabet of sixteen digits; its name is the script they are taken from.
LANGUAGES = {
    "latin": "abcdefghijklmnop",
    "greek": "αβγδεζηθικλμνξοπ",
    "cyrillic": "абвгдежзийклмноп",
    "hebrew": "אבגדהוזחטיכלמנסע",
}
DOMAINS = ("math", "facts", "logic")
_FACTS = 64


@dataclass(frozen=True)
class Row:
    """A question in one language and domain, and its answer."""

    language: str
    domain: str
    prompt: str
    answer: str


def all_rows(seed: int = 0) -> list[Row]:
    """Every question of every language and domain: 256 sums, 64 facts, 256 triples each."""
    rows = []
    for place, (language, digits) in enumerate(LANGUAGES.items()):
        generator = random.Random(seed * len(LANGUAGES) + place)
        pairs = [(a, b) for a in range(16) for b in range(16)]
        for a, b in pairs:
            rows.append(Row(language, "math", f"{digits[a]}+{digits[b]}", digits[(a + b) % 16]))
        for a, b in generator.sample(pairs, _FACTS):
            answer = "".join(generator.choices(digits, k=2))
            rows.append(Row(language, "facts", f"?{digits[a]}{digits[b]}", answer))
        for triple in generator.sample([(a, b, c) for a, b in pairs for c in range(16)], 256):
            rows.append(Row(language, "logic", "!" + "".join(digits[x] for x in triple), digits[max(triple)]))
    return rows
