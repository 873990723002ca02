"""Images by digest, and the tool that looks the digests up."""

from __future__ import annotations

import re

import pytest

from tools import pin_images
from tools.pin_images import FILES, digest_in, images, pinned

A, B = "sha256:" + "a" * 64, "sha256:" + "b" * 64

COMPOSE = f"""
services:
  kafka:
    image: apache/kafka:4.1.0@{A} # the newest
  redis:
    image: redis:7.4-alpine
  consumer:
    image: embedq:local
"""
DOCKERFILE = (
    f"ARG PYTHON_IMAGE=python:3.12-slim@{A}\nFROM ${{PYTHON_IMAGE}} AS tools\nARG UV_VERSION=0.13.8\n"
)


def test_every_image_of_the_files_has_a_digest() -> None:
    found = [image for file in FILES for image in images(file.read_text())]
    assert len(found) == 5
    for name, digest in found:
        assert digest is not None, name
        assert re.fullmatch(r"sha256:[0-9a-f]{64}", digest), name


def test_no_stage_of_the_dockerfile_begins_from_anything_but_the_pinned_image_or_another_stage() -> None:
    text = FILES[0].read_text()
    stages = set(re.findall(r"^FROM \S+ AS (\w+)$", text, re.MULTILINE))
    begins = set(re.findall(r"^FROM (\S+)", text, re.MULTILINE))
    assert begins - stages == {"${PYTHON_IMAGE}"}


def test_images_are_found_with_and_without_a_digest_and_our_own_is_left_out() -> None:
    assert images(COMPOSE) == [("apache/kafka:4.1.0", A), ("redis:7.4-alpine", None)]
    assert images(DOCKERFILE) == [("python:3.12-slim", A)]


def test_pinning_replaces_and_adds_digests_and_changes_nothing_else() -> None:
    asked: list[str] = []

    def ask(name: str) -> str:
        asked.append(name)
        return B

    found = pinned(COMPOSE, ask)
    assert asked == ["apache/kafka:4.1.0", "redis:7.4-alpine"]
    assert images(found) == [("apache/kafka:4.1.0", B), ("redis:7.4-alpine", B)]
    assert found.replace(B, A).replace(f"alpine@{A}", "alpine") == COMPOSE
    assert pinned(DOCKERFILE, ask) == DOCKERFILE.replace(A, B)


def test_the_digest_of_the_index_is_read_from_what_either_tool_prints() -> None:
    buildx = f"""Name:      docker.io/library/redis:7.4.11-alpine
MediaType: application/vnd.oci.image.index.v1+json
Digest:    {A}

Manifests:
  Name:      docker.io/library/redis:7.4.11-alpine@{B}
  MediaType: application/vnd.oci.image.manifest.v1+json
  Platform:  linux/amd64
"""
    assert digest_in(buildx) == A
    assert digest_in(f"{A}\n") == A
    assert digest_in("ERROR: no such host") is None


def test_without_a_tool_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [file.read_text() for file in FILES]
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("sys.argv", ["pin_images"])
    assert pin_images.main() == 1
    assert "neither crane nor docker is installed" in capsys.readouterr().err
    assert [file.read_text() for file in FILES] == before
