"""The pages for strangers say what the code does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from embedq_consumer.settings import Settings
from embedq_gateway.settings import GatewaySettings
from embedq_shared.secret import Secret
from tools import settings_page

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/*/spec/*.md"), *ROOT.glob("consumer/**/*.md")]
)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    inside = [link for link in links if not link.startswith(("http://", "https://"))]
    assert [link for link in inside if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_setting_that_a_page_names_exists(page: Path) -> None:
    others = {"kafka_version", "cache_dir", "test_patience"}
    text = page.read_text(encoding="utf-8")
    named = {found.removeprefix("EMBEDQ_").lower() for found in re.findall(r"`(EMBEDQ_[A-Z0-9_]+)", text)}
    fields = get_type_hints(Settings)
    fields |= {f"gateway_{field}": hint for field, hint in get_type_hints(GatewaySettings).items()}
    files = {f"{field}_file" for field, hint in fields.items() if hint is Secret}
    assert named <= fields.keys() | files | others


def test_the_settings_page_is_fresh() -> None:
    assert settings_page.PAGE.read_text(encoding="utf-8") == settings_page.page(), "run `make docs`"


def test_every_setting_says_what_it_means() -> None:
    rows = [row.split(" | ") for row in settings_page.page().splitlines() if row.startswith("| `EMBEDQ_")]
    assert len(rows) == len(Settings.__struct_fields__) + len(GatewaySettings.__struct_fields__)
    assert [row[0] for row in rows if len(row[-1].strip(" |")) < 10] == []


def test_operations_says_what_to_do_for_every_alert() -> None:
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text(encoding="utf-8"))
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(Embedq\w+)` \|[^|]+\|([^|]+)\|$", page, re.MULTILINE))
    assert set(rows) == alerts
    assert [alert for alert, action in rows.items() if len(action.strip()) < 20] == []
