"""Coverage and staleness of a target: from its manifest, and beside its source as it is now."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import Result
from prometheus_client.parser import text_string_to_metric_families

from embedq_batch import Columns
from embedq_batch.content.rows import Problem
from embedq_batch.corpus.figures import Figures, standing
from embedq_batch.corpus.shown import lines, metrics, share
from embedq_batch.corpus_command import show
from embedq_batch.manifest.plan import Done, Failed
from embedq_sdk.cli.commands import status
from embedq_shared.messages import ErrorBody
from tests.helpers.batch_runs import a_table, invoked, run
from tests.helpers.fake_service import NEW, OLD, Answer, FakeService, Received

TEXTS = {f"r{n}": f"text {n}" for n in range(100)}
COLUMNS = Columns(id="id")


def a_source(path: Path, texts: dict[str, Any]) -> str:
    return a_table(path, list(texts.values()), id=list(texts))


def asked(monkeypatch: pytest.MonkeyPatch, service: FakeService, *arguments: str) -> Result:
    """`embedq status` with these arguments; the package that it finds is the one here, installed or not."""
    monkeypatch.setattr("embedq_sdk.cli.commands._corpus_status", lambda: show)
    return invoked(status, *arguments, service=service)


@pytest.mark.parametrize(
    ("text", "done", "failed", "stands"),
    [
        ("a", Done(b"h", OLD, 1), None, "current"),
        ("a", Done(b"h", NEW, 1), None, "older"),
        ("a", Done(b"other", OLD, 1), None, "changed"),
        ("a", Done(b"other", OLD, 1), Failed(b"h", 1), "changed"),
        ("a", None, Failed(b"h", 1), "failed"),
        ("a", None, Failed(b"other", 1), "missing"),
        ("a", None, None, "missing"),
        (Problem("missing_text", "no text"), None, None, "failed"),
    ],
)
def test_a_row_stands_in_one_way(text: Any, done: Any, failed: Any, stands: str) -> None:
    assert standing(text, b"h", done, failed, OLD) == stands


def test_what_is_nearly_all_is_not_said_to_be_all() -> None:
    assert (share(1.0), share(0.999999), share(0.5)) == ("100 %", "99.99 %", "50.00 %")


def test_a_corpus_is_counted_beside_its_source_as_it_is_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "in.parquet", str(tmp_path / "out.parquet")
    service = FakeService()
    service.behave = lambda job: [failing(service, job)]
    asyncio.run(run(a_source(source, TEXTS | {"bad": "bad"}), out, service, columns=COLUMNS))
    texts = TEXTS | {"bad": "bad", "new": "new", "r3": "changed", "null": None}
    del texts["r7"], texts["r8"]
    a_source(source, texts)

    done = asked(monkeypatch, FakeService(), "--corpus", out, "--from", str(source), "--json")
    found = msgspec.json.decode(done.stdout, type=Figures)

    assert done.exit_code == 0
    assert (found.rows, found.current, found.changed, found.older) == (101, 97, 1, 0)
    assert (found.missing, found.failed, found.gone) == (1, 2, 2)
    assert (found.coverage, found.stale) == (97 / 101, 1)
    assert (found.version, found.model, found.complete) == (OLD, "default", True)

    done = asked(monkeypatch, FakeService(version=NEW), "--corpus", out, "--from", str(source), "--json")
    found = msgspec.json.decode(done.stdout, type=Figures)
    assert (found.current, found.older, found.changed, found.stale, found.coverage) == (0, 97, 1, 98, 0.0)
    assert (found.version, found.versions) == (NEW, {OLD: 100})


def failing(service: FakeService, job: Received) -> Answer:
    """An error for the text `bad`, in whatever job it is."""
    good = service.good(job)
    if job.texts == ["embedq"]:
        return good
    data = [
        msgspec.structs.replace(
            datum, embedding=None, error=ErrorBody.of("text_too_long", "expected less", f"input[{n}]")
        )
        if text == "bad"
        else datum
        for n, (text, datum) in enumerate(zip(job.texts, good.data, strict=True))
    ]
    return msgspec.structs.replace(good, data=data)


def test_without_the_source_the_last_pass_counts_and_lines_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "out.parquet")
    asyncio.run(run(a_source(tmp_path / "in.parquet", TEXTS), out, columns=COLUMNS))

    told = asked(monkeypatch, FakeService(version=NEW), "--corpus", out).stdout

    assert "coverage 0.00 %: 0 of 100 rows under sha256:bbbbbbbbbbbb (default)" in told
    assert "stale 100: 100 of an older model, 0 changed (as of the last pass; --from SOURCE" in told


def test_a_run_that_is_stopped_covers_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the rows that the source said it has, those that came before the end are there."""
    monkeypatch.setattr("embedq_batch.running.runner._WRITE_ROWS", 10)
    monkeypatch.setattr("embedq_batch.running.writing._FLUSH_ROWS", 10)
    out = str(tmp_path / "out.parquet")
    service = FakeService()

    def twenty(job: Received) -> list[Answer]:
        if len(service.received) > 3:
            return [service.failure(job, ErrorBody.of("unknown_model", "unloaded", "model"))]
        return [service.good(job)]

    service.behave = twenty
    with pytest.raises(Exception, match="unloaded"):
        asyncio.run(
            run(a_source(tmp_path / "in.parquet", TEXTS), out, service, columns=COLUMNS, job_texts=10)
        )

    done = asked(monkeypatch, FakeService(), "--corpus", out, "--json")
    found = msgspec.json.decode(done.stdout, type=Figures)

    assert (found.rows, found.current, found.missing, found.complete) == (100, 20, 80, False)
    assert "its run is not complete" in "\n".join(lines(found))


def test_a_service_that_says_nothing_leaves_the_manifests_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "out.parquet")
    asyncio.run(run(a_source(tmp_path / "in.parquet", TEXTS), out, columns=COLUMNS))
    silent = FakeService(behave=lambda job: None)
    monkeypatch.setattr("embedq_batch.corpus_command._ANSWER_S", 0.05)

    done = asked(monkeypatch, silent, "--corpus", out)

    assert "which version default has now is not known" in done.stderr
    assert "coverage 100 %: 100 of 100 rows under sha256:aaaaaaaaaaaa" in done.stdout


def test_figures_are_metrics_too() -> None:
    found = Figures(
        target='qdrant:db#"docs"',
        source="rows.parquet",
        model="new",
        version=NEW,
        rows=10,
        current=4,
        older=3,
        changed=1,
        failed=1,
        missing=1,
        gone=2,
        versions={NEW: 4, OLD: 3},
        vectors=8,
        stored=9,
        stored_current=4,
        complete=True,
    )
    values = {
        (sample.name, sample.labels.get("standing") or sample.labels.get("current")): sample.value
        for family in text_string_to_metric_families(metrics(found).decode())
        for sample in family.samples
        if (sample.labels["target"], sample.labels["model"]) == ('qdrant:db#"docs"', "new")
    }

    assert values == {
        ("embedq_corpus_rows", "current"): 4,
        ("embedq_corpus_rows", "older"): 3,
        ("embedq_corpus_rows", "changed"): 1,
        ("embedq_corpus_rows", "failed"): 1,
        ("embedq_corpus_rows", "missing"): 1,
        ("embedq_corpus_coverage_ratio", None): 0.4,
        ("embedq_corpus_stale_rows", None): 4,
        ("embedq_corpus_gone_rows", None): 2,
        ("embedq_corpus_complete", None): 1,
        ("embedq_corpus_stored_vectors", "true"): 4,
        ("embedq_corpus_stored_vectors", "false"): 5,
    }
    told = "\n".join(lines(found))
    assert "in the store: 9 vectors, 4 of them of this version, its manifest says 8" in told


def test_a_target_that_nobody_made_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = asked(monkeypatch, FakeService(), "--corpus", str(tmp_path / "out.parquet"))

    assert done.exit_code == 1
    assert "expected a manifest" in done.stderr
    refused = asked(monkeypatch, FakeService(), "--metrics")
    assert refused.exit_code == 2
    assert "--from and --metrics are for --corpus" in refused.stderr


def test_without_the_package_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedq_sdk.cli.commands.importlib.metadata.entry_points", lambda **_: [])

    done = invoked(status, "--corpus", "out.parquet")

    assert done.exit_code == 2
    assert "pip install 'embedq[batch]'" in done.stderr
