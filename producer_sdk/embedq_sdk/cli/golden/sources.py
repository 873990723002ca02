"""Whose vectors they are: those of a model directory, or of the model that serves."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from embedq_sdk.cli.kafka_options import KafkaTarget
from embedq_sdk.cli.text_sources import BadSource
from embedq_sdk.client import EmbedClient
from embedq_shared.messages import InputType

__all__ = ["Asked", "Directory", "Serving", "Source", "Vectors"]

_PROGRAM: Final = "embedq_consumer.verify.golden_vectors"
Vectors = list[npt.NDArray[np.float32]]


class Asked(NamedTuple):
    """A text to embed."""

    text: str
    input_type: InputType | None


class Source(Protocol):
    """Gives vectors."""

    async def vectors(self, texts: Sequence[Asked]) -> tuple[Vectors, str]:
        """The vector of each text, float32 (dimensions,), and the model version.

        Raises:
            EmbedError, BadSource: there are none.
        """


class Directory(NamedTuple):
    """A model directory, which a process of its own loads."""

    path: Path
    device: str
    quantization: str

    async def vectors(self, texts: Sequence[Asked]) -> tuple[Vectors, str]:
        asked = {
            "texts": [{"text": each.text, "input_type": each.input_type} for each in texts],
            "device": self.device,
            "quantization": self.quantization,
        }
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", _PROGRAM, str(self.path)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output, errors = await process.communicate(msgspec.json.encode(asked))
        if process.returncode != 0:
            raise BadSource(_why(errors.decode(errors="replace"), process.returncode))
        given = msgspec.json.decode(output, type=_Given)
        return [np.array(vector, dtype=np.float32) for vector in given.vectors], given.model_version


class Serving(NamedTuple):
    """The model that an alias serves."""

    kafka: KafkaTarget
    alias: str
    connect_timeout: float
    timeout: float

    async def vectors(self, texts: Sequence[Asked]) -> tuple[Vectors, str]:
        found: dict[Asked, npt.NDArray[np.float32]] = {}
        versions: set[str | None] = set()
        async with EmbedClient(
            self.kafka.servers,
            topic_prefix=self.kafka.prefix,
            connect_timeout=self.connect_timeout,
            **self.kafka.security,
        ) as client:
            for kind in {each.input_type for each in texts}:
                alike = [each for each in texts if each.input_type == kind]
                embedded = await client.embed_detailed(
                    [each.text for each in alike],
                    model=self.alias,
                    input_type=kind,
                    truncate="end",
                    timeout=self.timeout,
                )
                found |= dict(zip(alike, embedded.vectors, strict=True))
                versions |= set(embedded.model_versions)
        if len(versions) != 1 or None in versions:
            raise BadSource("the model changed meanwhile: try again once the reload is over")
        [version] = versions
        return [found[each] for each in texts], str(version)


class _Given(msgspec.Struct):
    model_version: str
    vectors: list[list[float]]


def _why(errors: str, code: int | None) -> str:
    """The reason in a process's last line."""
    if "No module named 'embedq_consumer'" in errors or "No module named 'torch'" in errors:
        return "--from needs the service's packages: pip install 'embedq[consumer]'"
    lines = errors.strip().splitlines()
    return lines[-1] if lines else f"loading the model ended with code {code}"
