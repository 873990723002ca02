"""Figures as lines for people, and as Prometheus's text format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from embedq_batch.corpus.figures import STANDINGS, Figures

_SHORT: Final = 19
"""Characters of a model version that tell two apart."""


def lines(found: Figures) -> Iterator[str]:
    """What `embedq status --corpus` shows."""
    read = "" if found.source is None else f", beside {found.source}"
    yield f"{found.target}{read}"
    version = "no vectors" if found.version is None else found.version[:_SHORT]
    yield f"  coverage {share(found.coverage)}: {found.current:,} of {found.rows:,} rows under {version} ({found.model})"
    since = "" if found.source else " (as of the last pass; --from SOURCE compares anew)"
    if not found.recorded:
        since = " (no manifest knows what the source has)"
    yield f"  stale {found.stale:,}: {found.older:,} of an older model, {found.changed:,} changed{since}"
    yield f"  {found.missing:,} missing, {found.failed:,} failed, {found.gone:,} that the source no longer has"
    if found.stored is not None:
        differs = "" if found.stored == found.vectors else f", its manifest says {found.vectors:,}"
        yield f"  in the store: {found.stored:,} vectors, {found.stored_current or 0:,} of them of this version{differs}"
    if not found.complete:
        yield "  its run is not complete"


def share(part: float) -> str:
    """A share in percent that says 100 % of nothing less."""
    return "100 %" if part == 1 else f"{min(99.99, part * 100):.2f} %"


def metrics(found: Figures) -> bytes:
    """The figures in Prometheus's text format, such as the node exporter takes from files."""
    registry = CollectorRegistry()
    names = ("target", "model")
    values = (found.target, found.model)
    rows = Gauge(
        "embedq_corpus_rows",
        "Rows of the source, by how the target stands with each.",
        (*names, "standing"),
        registry=registry,
    )
    for standing in STANDINGS:
        rows.labels(*values, standing).set(getattr(found, standing))
    for name, text, value in (
        ("coverage_ratio", "Share of the source's rows that the target has as they are now.", found.coverage),
        ("stale_rows", "Rows of an older model version or of content that changed.", found.stale),
        ("gone_rows", "Rows of the target that the source no longer has.", found.gone),
        ("complete", "1 when no run is under way, or stopped before its end.", float(found.complete)),
    ):
        Gauge(f"embedq_corpus_{name}", text, names, registry=registry).labels(*values).set(value)
    stored = Gauge(
        "embedq_corpus_stored_vectors",
        "Vectors, as the store says itself.",
        (*names, "current"),
        registry=registry,
    )
    if found.stored is not None and found.stored_current is not None:
        stored.labels(*values, "true").set(found.stored_current)
        stored.labels(*values, "false").set(found.stored - found.stored_current)
    return generate_latest(registry)
