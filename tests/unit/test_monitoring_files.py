"""The dashboard and the alert rules use metrics that exist."""

import json
import re
import shutil
import subprocess
from datetime import UTC, datetime
from typing import Any

import pytest
import yaml
from scrapes import full, samples
from support import ROOT

DASHBOARD, RULES = ROOT / "docs/grafana/sage.json", ROOT / "docs/prometheus/alerts.yml"


def expressions_of(value: Any) -> list[str]:
    """Return all values of the key `expr` in a JSON or YAML value."""
    if isinstance(value, list):
        return [found for part in value for found in expressions_of(part)]
    if isinstance(value, dict):
        own = [value["expr"]] if "expr" in value else []
        return own + [found for part in value.values() for found in expressions_of(part)]
    return []


@pytest.mark.parametrize(
    "content", [json.loads(DASHBOARD.read_text()), yaml.safe_load(RULES.read_text())], ids=["dashboard", "rules"]
)
def test_each_metric_of_the_dashboard_and_the_rules_exists(content: Any) -> None:
    existing = {name for name, _ in samples(full(datetime.now(UTC)), folders={"data": ROOT})}
    expressions = expressions_of(content)
    assert expressions
    for expression in expressions:
        names = set(re.findall(r"\bsage_\w+", expression))
        assert names or "up{" in expression
        assert names <= existing, expression


def test_each_panel_of_the_dashboard_has_its_own_id_and_place() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len({panel["id"] for panel in panels}) == len(places) == len(panels)


def test_each_rule_has_a_severity_and_texts_that_end_with_a_period() -> None:
    [group] = yaml.safe_load(RULES.read_text())["groups"]
    for rule in group["rules"]:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert all(text.endswith(".") for text in rule["annotations"].values())


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
def test_promtool_accepts_the_rules() -> None:
    subprocess.run(["promtool", "check", "rules", RULES], check=True, capture_output=True)
