"""What is asked for most is kept, whatever comes between; and memory is bounded."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from embedq_consumer.lifecycle.warming.most_used import MostUsed, Wanted, wanted_of
from embedq_shared.messages import Chunking, Job


def want(text: str) -> Wanted:
    [found] = wanted_of(Job(input=text))
    return found


def used(most: int, texts: str, *, now: float = 0.0) -> MostUsed:
    found = MostUsed(most)
    for text in texts:
        found.use(want(text), now)
    return found


def top(found: MostUsed) -> list[str]:
    return [wanted.text for wanted in found.top()]


def test_the_most_used_come_first_and_what_was_asked_for_once_does_not_come() -> None:
    assert top(used(9, "cabbcbd")) == ["b", "c"]


def test_a_flood_of_texts_that_come_once_drives_out_nothing_that_is_used() -> None:
    found = used(4, "aabb")
    for number in range(1000):
        found.use(want(f"once {number}"), 0.0)
        if number % 3 == 0:
            found.use(want("a"), 0.0)
    assert len(found) == 4
    assert top(found)[0] == "a"
    assert not [text for text in top(found) if text.startswith("once")], "its count is another text's"


@given(texts=st.lists(st.sampled_from("aaaabbbcdefghij"), max_size=300), most=st.integers(1, 12))
def test_whatever_has_more_than_its_share_of_all_uses_is_kept_and_no_count_is_too_low(
    texts: list[str], most: int
) -> None:
    found = used(most, "".join(texts))
    assert len(found) <= most
    true = Counter(texts)
    kept = {wanted.text: count for wanted, count in found._counts.items()}
    for text, uses in true.items():
        if uses > len(texts) / most:
            assert text in kept
        if text in kept:
            assert kept[text] >= uses
    for wanted in found.top():
        surely = found._counts[wanted] - found._taken_over.get(wanted, 0)
        assert surely <= true[wanted.text]


@given(
    uses=st.lists(st.tuples(st.sampled_from("abcdef"), st.floats(0, 9000)), max_size=80),
    most=st.integers(1, 4),
)
def test_its_parts_agree_whatever_is_used_and_forgotten(uses: list[tuple[str, float]], most: int) -> None:
    found = MostUsed(most)
    now = 0.0
    for text, pause in uses:
        now += pause
        found.use(want(text), now)
        by_count = {wanted: count for count, alike in found._by_count.items() for wanted in alike}
        assert by_count == found._counts
        assert found._least == min(found._counts.values())
        assert set(found._taken_over) <= set(found._counts)


def test_uses_of_an_hour_ago_count_half_and_what_was_asked_for_yesterday_is_forgotten() -> None:
    found = used(9, "aaaaaabb")
    found.use(want("c"), 3600.0)
    found.use(want("c"), 3600.0)
    assert top(found) == ["a", "c"]
    found.use(want("c"), 24 * 3600.0)
    assert len(found) == 1


def test_whatever_a_vector_depends_on_makes_another_one_of_it() -> None:
    jobs = [
        Job(input="a"),
        Job(input="a", input_type="query"),
        Job(input="a", instruction="find"),
        Job(input="a", dimensions=32),
        Job(input="a", dtype="int8"),
        Job(input="a", truncate="end"),
    ]
    assert len({wanted for job in jobs for wanted in wanted_of(job)}) == len(jobs)


def test_documents_and_texts_in_pieces_are_not_kept_in_mind() -> None:
    assert wanted_of(Job(input=["a" * 1025, "b"])) == wanted_of(Job(input="b"))
    assert wanted_of(Job(input="a" * 1000, instruction="b" * 100)) == []
    assert wanted_of(Job(input="a", chunk=Chunking(mode="mean"))) == []
