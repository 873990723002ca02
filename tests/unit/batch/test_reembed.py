"""`embedq reembed` from file to file: the texts of what serves, or of where they came from, under a new model beside it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from embedq_batch import Columns
from embedq_batch.reembed_command import reembed
from embedq_batch.switch_command import switch
from embedq_sdk.job_options import JobOptions, late
from embedq_shared.messages import ErrorBody
from tests.helpers.batch_runs import a_table, assert_vectors, invoked, run, two_models, vectors_in
from tests.helpers.fake_service import NEW, OLD, Answer, Received, changed

TEXTS = {f"r{n}": f"text {n}" for n in range(100)}


def served_now(folder: Path, texts: dict[str, str]) -> str:
    """A file of the old model's vectors, which has its texts."""
    source = a_table(folder / "in.parquet", list(texts.values()), id=list(texts), year=[1] * len(texts))
    columns = Columns(id="id", keep=("text", "year"))
    asyncio.run(
        run(source, str(folder / "old.parquet"), columns=columns, only_changed=True, delete_missing=True)
    )
    return str(folder / "old.parquet")


def test_a_stores_own_texts_become_vectors_of_a_new_model_beside_it(tmp_path: Path) -> None:
    old, new, link = (
        served_now(tmp_path, TEXTS),
        str(tmp_path / "new.parquet"),
        str(tmp_path / "docs.parquet"),
    )
    assert invoked(switch, link, "--to", old).exit_code == 0

    done = invoked(reembed, "--of", old, "--to", new, "--model", "new", "--switch", link)

    assert done.exit_code == 0, done.output
    assert_vectors(new, TEXTS, NEW)
    assert "coverage 100 %: 100 of 100 rows under sha256:bbbbbbbbbbbb (new)" in done.output
    assert "stale 0" in done.output
    assert_vectors(link, TEXTS, NEW)
    assert f"back: embedq switch {link} --to {old}" in done.output
    assert_vectors(old, TEXTS, OLD)

    assert invoked(switch, link, "--to", old).exit_code == 0
    assert_vectors(link, TEXTS, OLD)


def test_the_same_command_follows_what_changed_meanwhile(tmp_path: Path) -> None:
    command = ("--of", served_now(tmp_path, TEXTS), "--to", str(tmp_path / "new.parquet"), "--model", "new")
    invoked(reembed, *command)
    texts = TEXTS | {"r3": "changed", "more": "more"}
    del texts["r7"]
    served_now(tmp_path, texts)
    service = two_models()

    done = invoked(reembed, *command, service=service)

    assert done.exit_code == 0, done.output
    sent = sorted(text for job in service.received for text in job.texts)
    assert sent == ["changed", "embedq", "more"]
    assert_vectors(tmp_path / "new.parquet", texts, NEW)


def test_columns_and_job_are_the_old_runs_where_nobody_says_otherwise(tmp_path: Path) -> None:
    source = a_table(tmp_path / "in.parquet", ["one", "two"], title=["A", "B"], id=["a", "b"])
    job = JobOptions(lane="bulk", input_type="document", chunk=late(10))
    columns = Columns(template="{title}: {text}", id="id")
    old = str(tmp_path / "old.parquet")
    asyncio.run(run(source, old, columns=columns, job=job))
    service = two_models()

    done = invoked(
        reembed,
        *("--of", old, "--from", source, "--to", str(tmp_path / "new.parquet"), "--model", "new"),
        service=service,
    )

    assert done.exit_code == 0, done.output
    asked = service.received[-1]
    assert sorted(asked.texts) == ["A: one", "B: two"]
    assert (asked.job.input_type, asked.job.chunk, asked.job.model) == ("document", late(10), "new")


def test_the_text_of_a_row_with_many_vectors_is_embedded_once(tmp_path: Path) -> None:
    source = a_table(tmp_path / "in.parquet", ["a" * 25, "b" * 5], id=["x", "y"])
    old = str(tmp_path / "old.parquet")
    job = JobOptions(lane="bulk", chunk=late(10))
    asyncio.run(run(source, old, columns=Columns(id="id", keep=("text",)), job=job))
    service = two_models()

    done = invoked(
        reembed, "--of", old, "--to", str(tmp_path / "new.parquet"), "--model", "new", service=service
    )

    assert done.exit_code == 0, done.output
    sent = sorted(text for job in service.received for text in job.texts)
    assert sent == ["a" * 25, "b" * 5, "embedq"]
    assert vectors_in(tmp_path / "new.parquet").keys() == {"x#0", "x#1", "x#2", "y#0"}


def test_a_name_is_not_switched_to_what_lacks_rows(tmp_path: Path) -> None:
    old, link = served_now(tmp_path, TEXTS), str(tmp_path / "docs.parquet")
    invoked(switch, link, "--to", old)
    service = two_models()
    good = service.behave
    assert good is not None

    def without_the_last(job: Received) -> list[Answer] | None:
        answers = good(job)
        if len(job.texts) < 2 or answers is None:
            return answers
        (answer,) = answers
        data = list(answer.data)  # type: ignore[union-attr]
        data[-1] = msgspec.structs.replace(
            data[-1], embedding=None, error=ErrorBody.of("text_too_long", "expected less", "input")
        )
        return [changed(answer, data=data)]  # type: ignore[arg-type]

    service.behave = without_the_last
    done = invoked(
        reembed,
        *("--of", old, "--to", str(tmp_path / "new.parquet"), "--model", "new", "--switch", link),
        service=service,
    )

    assert done.exit_code == 1
    assert "is not switched" in done.output
    assert_vectors(link, TEXTS, OLD)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--of", "{old}", "--to", "{new}"), "--from says where the texts came from"),
        (("--of", "{old}", "--to", "{old}"), "--to takes a new one beside it"),
        (("--of", "x.xlsx", "--to", "{new}"), "`to`: expected"),
    ],
)
def test_what_a_user_can_put_right_is_one_line(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    source = a_table(tmp_path / "in.parquet", ["one"], id=["a"])
    old = str(tmp_path / "old.parquet")
    asyncio.run(run(source, old, columns=Columns(id="id")))

    done = invoked(reembed, *(each.format(old=old, new=tmp_path / "new.parquet") for each in arguments))

    assert done.exit_code in (1, 2)
    assert said in done.output


def test_a_pointer_file_names_what_has_no_aliases_and_goes_back(tmp_path: Path) -> None:
    old = served_now(tmp_path, TEXTS)
    new, name = str(tmp_path / "new.parquet"), str(tmp_path / "docs.json")
    invoked(switch, name, "--to", old)

    done = invoked(reembed, "--of", old, "--to", new, "--model", "new", "--switch", name)

    assert done.exit_code == 0, done.output
    assert msgspec.json.decode((tmp_path / "docs.json").read_bytes()) == {
        "target": new,
        "model": "new",
        "model_version": NEW,
        "before": old,
    }
    assert f"back: embedq switch {name} --to {old}" in done.output
    invoked(switch, name, "--to", old)
    assert msgspec.json.decode((tmp_path / "docs.json").read_bytes())["target"] == old
    (tmp_path / "dear.json").write_text("{}")
    refused = invoked(switch, str(tmp_path / "dear.json"), "--to", old)
    assert refused.exit_code == 1
    assert "not a pointer" in refused.output
