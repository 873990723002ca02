"""What `embedq golden write` takes if no texts are given: some of many kinds, lengths and scripts, always the same."""

from __future__ import annotations

from typing import Final

BUILT_IN: Final = (
    "a",
    "bread",
    "How do I reset my password?",
    "The tide follows the moon, and is highest when sun and moon pull in one line.",
    "An offset is committed only after the work behind it is done.",
    "Either side may end this agreement with ninety days' notice in writing.",
    "def mean(values): return sum(values) / len(values)",
    "SELECT name, count(*) FROM orders WHERE created > '2024-01-01' GROUP BY name;",
    "https://example.com/path?query=1&page=2#top",
    "3.14159 2.71828 1.41421 -273.15 6.022e23",
    "Grüße aus München: Straße, Äpfel, Übermut.",
    "Où est la bibliothèque ? À côté de l'église.",
    "東京の天気は明日も晴れるでしょう。",
    "Кошка спит на подоконнике.",
    "القطة نائمة على النافذة",
    "🙂🚀👩‍🔬 e\u0301 \u00e9",
    "  two  spaces,\ttabs\nand lines  ",
    (
        "Glaciers grind rock into flour, which turns the lakes below them milky blue. The volcano had slept for four hundred years "
        "before it woke. Granite cools slowly, deep in the earth, so its crystals grow large, while basalt meets the air or the sea and "
        "has no time for them. Rivers sort what they carry by weight: first the stones, then the gravel, then the sand, and only where "
        "the water stands still the clay. So a section through old banks can be read from the bottom to the top like a diary."
    ),
)
"""Case, spaces, composed characters and scripts are what a wrong tokenizer gets wrong; a text of a hundred tokens is what wrong
positions, or a wrong pooling, do."""
