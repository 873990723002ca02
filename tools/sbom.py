"""Writes a software bill of materials: the packages that the service, the SDK and the command line run on, as CycloneDX.

`python -m tools.sbom PATH` reads the environment that it runs in. What only tests, benchmarks and `embedq dev` use is left
out: it is not in the image.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import requires
from pathlib import Path
from typing import Any, Final

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT: Final = Path(__file__).parents[1]
_EXTRAS: Final = ("cli", "cpu", "gateway")
"""What the image installs besides the dependencies that everybody needs."""


class BadBill(Exception):
    """What came out is not CycloneDX."""


def needed(requirements: Iterable[str]) -> set[str]:
    """The installed packages that requirements ask for, and all that those ask for, by the names that the index compares.

    The generator's own graph has every extra of every package, and so the tests of some.
    """
    found: set[tuple[str, str]] = set()
    left = [(each, "") for each in requirements]
    while left:
        text, extra = left.pop()
        asked = Requirement(text)
        if asked.marker is not None and not asked.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(asked.name)
        for each in {"", *asked.extras}:
            if (name, each) not in found:
                found.add((name, each))
                left += [(needs, each) for needs in requires(name) or []]
    return {name for name, _ in found}


def shipped(bill: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """The bill with the packages of these names, and nothing else."""
    kept = {each["bom-ref"] for each in bill["components"] if canonicalize_name(each["name"]) in names}
    root = bill["metadata"]["component"]["bom-ref"]
    graph = [each for each in bill["dependencies"] if each["ref"] in kept | {root}]
    return bill | {
        "components": [each for each in bill["components"] if each["bom-ref"] in kept],
        "dependencies": [
            each | {"dependsOn": [ref for ref in each["dependsOn"] if ref in kept]}
            if "dependsOn" in each
            else each
            for each in graph
        ],
    }


def check(bill: str) -> None:
    """That a bill is well-formed.

    Raises:
        BadBill: it is not.
    """
    version = SchemaVersion.from_version(json.loads(bill)["specVersion"])
    if (error := JsonStrictValidator(version).validate_str(bill)) is not None:
        raise BadBill(str(error))


def make() -> str:
    """The bill of this environment.

    Raises:
        BadBill: it would not be well-formed.
    """
    project = ROOT / "pyproject.toml"
    command = [
        sys.executable,
        "-m",
        "cyclonedx_py",
        "environment",
        sys.executable,
        "--pyproject",
        str(project),
    ]
    done = subprocess.run(
        [*command, "--mc-type", "application", "--output-reproducible", "--no-validate"],
        capture_output=True,
        text=True,
        check=True,
    )
    described = tomllib.loads(project.read_text())["project"]
    extras = described["optional-dependencies"]
    direct = [*described["dependencies"], *(each for extra in _EXTRAS for each in extras[extra])]
    bill = json.dumps(shipped(json.loads(done.stdout), needed(direct)), indent=1)
    check(bill)
    return bill


def main() -> int:
    """The command."""
    path = Path(sys.argv[1])
    bill = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(bill)
    sys.stdout.write(f"{path}: {len(json.loads(bill)['components'])} packages\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
