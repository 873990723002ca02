"""How a command ends: an exit code, and one line for whoever typed it."""

from __future__ import annotations

import pytest

from embedq_sdk.cli.running import run
from embedq_sdk.cli.text_sources import BadSource
from embedq_sdk.errors import InvalidArgument, KafkaRefused, KafkaUnavailable, TopicMissing


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (KafkaUnavailable(servers="a:1", reason="gone"), 3, "Kafka at a:1 does not answer: gone"),
        (KafkaRefused(servers="a:1", reason="no"), 3, "Kafka at a:1 refuses this client: no"),
        (InvalidArgument(argument="a", expected="b", got="c"), 2, "`a`: expected b, got c"),
        (BadSource("t.jsonl: line 3: bad"), 2, "t.jsonl: line 3: bad"),
        (TopicMissing(servers="a:1", topic="t"), 1, "Kafka at a:1 has no topic t"),
        (
            FileNotFoundError(2, "No such file or directory", "/nosuch/x.npy"),
            1,
            "/nosuch/x.npy: No such file",
        ),
        (OSError(28, "No space left on device"), 1, "[Errno 28] No space left on device"),
    ],
)
def test_what_a_user_can_put_right_is_one_line_and_a_code(
    error: Exception, code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async def work() -> int:
        raise error

    with pytest.raises(SystemExit) as end:
        run(work())
    assert end.value.code == code
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.startswith(f"embedq: {told}")
    assert written.err.count("\n") == 1


def test_a_bug_keeps_its_traceback_and_a_closed_pipe_is_clicks_to_end() -> None:
    for error in (ZeroDivisionError(), BrokenPipeError(32, "Broken pipe")):

        async def work(error: Exception = error) -> int:
            raise error

        with pytest.raises(type(error)):
            run(work())
