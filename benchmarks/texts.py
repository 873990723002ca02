"""The texts that benchmarks embed: the demo's sentences, varied until there are enough of them."""

from __future__ import annotations

from pathlib import Path

SENTENCES = Path(__file__).parent.parent / "demo" / "sentences.txt"


def sentences() -> list[str]:
    """The demo's sentences, of mixed lengths."""
    return SENTENCES.read_text().splitlines()


def distinct(count: int, salt: str) -> list[str]:
    """`count` different texts whose lengths are those of the sentences; another `salt` gives other texts."""
    known = sentences()
    return [f"{known[i % len(known)]} {salt}{i // len(known)}" for i in range(count)]
