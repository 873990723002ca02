"""Names the images of deploy/Dockerfile and docker-compose.yml by the digests that their registries report now.

`python -m tools.pin_images` rewrites the files; it needs `docker buildx` or `crane`, and the network. `--check` asks nobody
and exits with 1 where an image has no digest.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
FILES: Final = (ROOT / "deploy/Dockerfile", ROOT / "docker-compose.yml")

_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
# `image: NAME:TAG[@DIGEST]` in Compose, `ARG …_IMAGE=NAME:TAG[@DIGEST]` in the Dockerfile.
_IMAGE: Final = re.compile(
    r"^(?P<before>\s*image:\s+|ARG \w+_IMAGE=)(?P<name>[\w./-]+:[\w.-]+)(?P<digest>@\S+)?(?P<after>.*)$",
    re.MULTILINE,
)
_BUILT_HERE: Final = frozenset({"embedq:local", "embedq-gateway:local"})


class NoDigest(Exception):
    """A registry, or the tool that asks it, gave no digest; the message says for which image."""


def images(text: str) -> list[tuple[str, str | None]]:
    """The images that a file names, each with its digest or None; not those that are built from this repository."""
    found = [(match["name"], (match["digest"] or "").lstrip("@") or None) for match in _IMAGE.finditer(text)]
    return [(name, digest) for name, digest in found if name not in _BUILT_HERE]


def pinned(text: str, digest_of: Callable[[str], str]) -> str:
    """The same file with each image's digest as `digest_of` reports it."""

    def one(match: re.Match[str]) -> str:
        name = match["name"]
        digest = "" if name in _BUILT_HERE else f"@{digest_of(name)}"
        return f"{match['before']}{name}{digest}{match['after']}"

    return _IMAGE.sub(one, text)


def digest_in(output: str) -> str | None:
    """The digest of an image's index in what `docker buildx imagetools inspect` or `crane digest` prints.

    It is the first: those of its platforms come after it.
    """
    found = _DIGEST.search(output)
    return None if found is None else found[0]


def ask_registry(image: str) -> str:
    """The digest that the image's registry reports now.

    Raises:
        NoDigest: there is no tool to ask with, or it gave none.
    """
    if shutil.which("crane"):
        command = ["crane", "digest", image]
    elif shutil.which("docker"):
        command = ["docker", "buildx", "imagetools", "inspect", image]
    else:
        raise NoDigest(f"{image}: neither crane nor docker is installed")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    digest = digest_in(done.stdout) if done.returncode == 0 else None
    if digest is None:
        raise NoDigest(f"{image}: {' '.join(command[:2])} gave no digest: {done.stderr.strip()[:200]}")
    return digest


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say which image has no digest")
    if parser.parse_args().check:
        missing = [name for file in FILES for name, digest in images(file.read_text()) if digest is None]
        for name in missing:
            sys.stderr.write(f"{name} has no digest; run `make pin-images`\n")
        return 1 if missing else 0
    try:
        changed = {file: pinned(file.read_text(), ask_registry) for file in FILES}
    except NoDigest as error:
        sys.stderr.write(f"{error}\n")
        return 1
    for file, text in changed.items():
        file.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
