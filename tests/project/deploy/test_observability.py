"""Prometheus' configuration, its alerts and the Grafana dashboards, against the metrics that service and gateway have."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from embedq_consumer.telemetry.lane_seconds import LaneSeconds
from embedq_consumer.telemetry.metrics import Metrics
from embedq_gateway.operations.metrics import GatewayMetrics
from tests.helpers.support import patient

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
DASHBOARDS = [json.loads(path.read_text()) for path in sorted((DEPLOY / "grafana/dashboards").glob("*.json"))]
ALERTS = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
DATASOURCE = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())[
    "datasources"
][0]

NAME = re.compile(r"\b(embedq_\w+|process_\w+|python_\w+)")
SELECTOR = re.compile(r"\b(embedq_\w+)\{([^}]*)\}")
LABEL = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"((?:[^"\\]|\\.)*)"')
GROUPING = re.compile(r"\b(?:by|without)\s*\(([^)]*)\)")

NOT_SHOWN = {"python_info"}
"""Metrics that no panel and no alert need."""

promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (it comes with Prometheus)"
)


def panels() -> list[dict[str, Any]]:
    return [panel for dashboard in DASHBOARDS for panel in dashboard["panels"] if panel["type"] != "row"]


@cache
def ours() -> tuple[Metrics, GatewayMetrics]:
    """Of the service and of the gateway: their names, which no test changes."""
    return Metrics(), GatewayMetrics(None)


def registries() -> list[CollectorRegistry]:
    return [each.registry for each in ours()]


def expressions() -> Iterator[tuple[str, str]]:
    """(where, PromQL) of everything that asks Prometheus."""
    for panel in panels():
        for target in panel["targets"]:
            yield f"panel {panel['title']}", target["expr"]
    for dashboard in DASHBOARDS:
        for variable in dashboard["templating"]["list"]:
            yield f"variable {variable['name']}", variable["query"]["query"]
        for annotation in dashboard["annotations"]["list"]:
            yield f"annotation {annotation['name']}", annotation["expr"]
    for rule in RULES:
        yield f"alert {rule['alert']}", rule["expr"]


@cache
def metrics() -> dict[str, str]:
    """Each sample name that is exposed, and the metric that it belongs to."""
    names: dict[str, str] = {}
    for family in (family for registry in registries() for family in registry.collect()):
        suffixes = {
            "counter": ["_total"],
            "histogram": ["_bucket", "_sum", "_count"],
            "info": ["_info"],
            "gauge": [""],
        }[family.type]
        names |= {family.name + suffix: family.name for suffix in suffixes}
    return names


@cache
def labels() -> dict[str, set[str]]:
    """The labels of each metric of ours."""
    known: dict[str, set[str]] = {}
    for value in (value for each in ours() for value in vars(each).values()):
        if isinstance(value, Counter | Gauge | Histogram | Info):
            known[value._name] = set(value._labelnames)
        elif isinstance(value, LaneSeconds):
            known[value.name] = {"lane"}
    return known


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_everything_asked_for_exists(where: str, expression: str) -> None:
    asked = set(NAME.findall(expression))
    assert asked or "up{" in expression, f"{where} asks for no metric"
    assert asked <= metrics().keys()


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_every_label_asked_for_is_one_that_the_metric_has(where: str, expression: str) -> None:
    of_prometheus = {"instance", "job"}
    of_info = {"model_version"}
    family, known = metrics(), labels()
    for name, selector in SELECTOR.findall(expression):
        for label, _ in LABEL.findall(selector):
            of_histograms = {"le"} if name.endswith("_bucket") else set()
            has = known[family[name]] | of_histograms | of_prometheus | of_info
            assert label in has, f"{where}: {name}{{{label}}}"
    grouped = {label.strip() for group in GROUPING.findall(expression) for label in group.split(",")}
    has = {label for name in NAME.findall(expression) for label in known.get(family[name], set())}
    assert grouped <= has | of_prometheus | of_info | {"le"}, where


@cache
def written() -> dict[tuple[str, str], set[str]]:
    """The values of each metric's labels that are there from the start."""
    found: dict[tuple[str, str], set[str]] = {}
    for family in (family for registry in registries() for family in registry.collect()):
        for sample in family.samples:
            for label, value in sample.labels.items():
                found.setdefault((family.name, label), set()).add(value)
    return found


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_every_label_value_asked_for_is_one_that_is_written(where: str, expression: str) -> None:
    """Labels of ours whose values are a short list are all there from the start, so a mistyped value shows."""
    for name, selector in SELECTOR.findall(expression):
        for label, pattern in LABEL.findall(selector):
            values = written().get((metrics()[name], label))
            if values:
                for alternative in pattern.split("|"):
                    assert any(re.fullmatch(alternative, value) for value in values), (
                        f"{where}: {alternative}"
                    )


def test_every_metric_is_shown_or_watched() -> None:
    asked = {name for _, expression in expressions() for name in NAME.findall(expression)}
    shown = {family for sample, family in metrics().items() if sample in asked}
    unseen = set(metrics().values()) - shown
    assert {name for name in unseen if name.startswith("embedq_")} == set()
    assert unseen - {name for name in unseen if name.startswith("process_")} <= NOT_SHOWN


def test_every_panel_has_a_unit_a_description_and_the_provisioned_datasource() -> None:
    for panel in panels():
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": DATASOURCE["uid"]}, panel["title"]


def test_every_query_of_a_panel_follows_the_chosen_replicas() -> None:
    for panel in panels():
        for target in panel["targets"]:
            for match in re.finditer(r"\b(?:embedq|process)_\w+(\{[^}]*\})?", target["expr"]):
                assert match[1], f"{panel['title']}: {match[0]}"
                assert 'instance=~"$instance"' in match[1], panel["title"]


def test_no_two_panels_lie_on_each_other_and_none_is_wider_than_the_page() -> None:
    for dashboard in DASHBOARDS:
        taken: set[tuple[int, int]] = set()
        for panel in dashboard["panels"]:
            at = panel["gridPos"]
            cells = {
                (x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
            }
            assert max(x for x, _ in cells) < 24, panel["title"]
            assert not taken & cells, panel["title"]
            taken |= cells
        assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    assert len({dashboard["uid"] for dashboard in DASHBOARDS}) == len(DASHBOARDS)


def test_every_alert_says_how_bad_it_is_and_what_to_look_at() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}, rule["alert"]
        assert rule["annotations"].keys() == {"summary", "description"}, rule["alert"]


def run_promtool(*arguments: str | Path) -> None:
    done = subprocess.run(
        ["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=patient(100), check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@promtool
def test_promtool_accepts_the_configuration_and_the_alerts() -> None:
    run_promtool("check", "config", DEPLOY / "prometheus/prometheus.yml")


@promtool
def test_each_alert_fires_when_it_should_and_not_otherwise() -> None:
    run_promtool("test", "rules", Path(__file__).parent / "alerts_test.yml")


def test_each_alert_has_a_case_in_which_it_fires() -> None:
    cases = (Path(__file__).parent / "alerts_test.yml").read_text()
    assert [rule["alert"] for rule in RULES if f'alertname="{rule["alert"]}"' not in cases] == []


@promtool
def test_promtool_parses_every_query_of_the_dashboard(tmp_path: Path) -> None:
    rules = [
        {"record": f"query_{n}", "expr": target["expr"].replace("$__rate_interval", "1m")}
        for n, target in enumerate(target for panel in panels() for target in panel["targets"])
    ]
    file = tmp_path / "queries.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    run_promtool("check", "rules", file)
