"""Some of all architectures, and, in the long runs and with `make architectures`, all of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.architectures.sweep import judge, sweep
from tests.architectures.tiny_configs import Unmade, every_kind, make

PACKED = ("albert", "electra", "eurobert", "gte", "nomic_bert", "qwen2", "phi3", "cohere2", "olmo2")
"""Transformers' own layers, over a packed row."""
BY_LENGTH = (
    "deberta",  # its own attention
    "fnet",  # no attention at all
    "gpt_oss",  # sinks
    "longformer",
    "mamba",  # a state that goes on from token to token
    "mobilebert",
    "openai-gpt",
    "squeezebert",
    "xlnet",
)
"""Texts of one length at a time."""
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bros": ({}, "raises ValueError: You have to specify bbox"),
    "dpr": ({}, "raises AttributeError: .*last_hidden_state"),
    "funnel": ({}, "raises RuntimeError"),  # transformers fails on texts of few tokens
    "nystromformer": ({"num_landmarks": 4, "segment_means_seq_len": 64}, "raises RuntimeError"),
    "big_bird": ({"attention_type": "block_sparse"}, "attention_type: expected original_full"),
    "reformer": ({"attn_layers": ["local", "lsh", "local"]}, "attn_layers: expected local alone"),
    "bart": ({}, "is_encoder_decoder"),
}


@pytest.mark.parametrize("kind", PACKED)
def test_these_are_served_packed(kind: str, tmp_path: Path) -> None:
    found = judge(kind, tmp_path)
    assert found.verdict == "served", found
    assert "torch_sdpa" in found.detail


@pytest.mark.parametrize("kind", BY_LENGTH)
def test_these_are_served_by_length(kind: str, tmp_path: Path) -> None:
    found = judge(kind, tmp_path)
    assert found.verdict == "served", found
    assert "by_length" in found.detail


@pytest.mark.parametrize("kind", REFUSED)
def test_these_are_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    fields, message = REFUSED[kind]
    found = judge(kind, tmp_path, **fields)
    assert found.verdict == "refused", found
    assert found.detail.startswith(f"{tmp_path}/config.json: ")
    assert re.search(message, found.detail)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.soak) for part in range(1, 6))])
def test_no_architecture_escapes(part: int, tmp_path: Path) -> None:
    """A sixth of all, each of which is served with transformers' own vectors, or refused in one line."""
    found = sweep(every_kind()[part::6], tmp_path, lambda _: None)
    assert [each for each in found if each.verdict in ("wrong", "escaped")] == []
    # If most could not be made, this would show nothing.
    assert sum(each.verdict == "served" for each in found) >= 20


def test_every_name_here_is_an_architecture_of_transformers() -> None:
    assert {*PACKED, *BY_LENGTH, *REFUSED} <= set(every_kind())


def test_what_reads_no_tokens_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(Unmade, match="reads no token ids"):
        make("vit", tmp_path)
