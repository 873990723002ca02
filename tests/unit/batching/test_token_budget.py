"""The token budget: found by trying on a device that is too small, and lowered when memory runs out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
import pytest

from embedq_consumer.batching.batcher import Batcher, BatchPolicy
from embedq_consumer.batching.single_flight import QueuedText
from embedq_consumer.batching.token_budget import (
    LEAST,
    Budget,
    Conditions,
    Measured,
    TokenBudget,
    find_budget,
    part_fits,
)
from embedq_consumer.engine import Footprint, Memory, OutOfMemory, Tokens
from embedq_consumer.telemetry.metrics import Metrics
from tests.helpers.fake_models import FOOTPRINT
from tests.helpers.in_flight import Model
from tests.helpers.metric_values import sample_value


class Device(Model):
    """Runs micro-batches of up to `limit` tokens; each text takes `each_text` of it in addition to its own."""

    def __init__(
        self, limit: int, *, max_tokens: int = 32_768, each_text: int = 0, memory: bool = True
    ) -> None:
        super().__init__()
        self.max_tokens = max_tokens
        self.ran: list[list[int]] = []
        self._limit = limit
        self._each_text = each_text
        self._memory = memory

    def memory(self) -> Memory | None:
        return Memory(used=1, free=1, total=2, reserved=1, peak=1) if self._memory else None

    async def run(self, batch: Sequence[Tokens]) -> None:
        lengths = [len(tokens.ids) for tokens in batch]
        if sum(lengths) + self._each_text * len(batch) > self._limit:
            raise OutOfMemory("out of memory")
        self.ran.append(lengths)


async def found(device: Device, *, tokens: int = 16_384, max_items: int = 1024) -> Budget:
    ids = np.zeros(device.max_tokens, dtype=np.int32)
    return (await find_budget(device, device.run, ids, tokens=tokens, max_items=max_items)).budget


async def test_a_device_with_enough_memory_keeps_the_whole_budget_and_takes_the_longest_text() -> None:
    device = Device(limit=100_000)
    assert await found(device) == Budget(16_384, 32_768)
    assert device.ran == [[32_768], [16_384], [16] * 1024]


async def test_a_longest_text_that_does_not_fit_is_shortened_until_it_does() -> None:
    device = Device(limit=20_000)
    assert await found(device) == Budget(16_384, 18_432)
    assert device.ran[0] == [18_432]


async def test_a_budget_that_does_not_fit_is_halved_until_it_does() -> None:
    device = Device(limit=5_000, max_tokens=512)
    assert await found(device) == Budget(4_096, 512)
    assert device.ran[1:] == [[512] * 8, [16] * 256]


async def test_many_short_texts_are_tried_as_well_as_few_long_ones() -> None:
    device = Device(limit=20_000, max_tokens=512, each_text=16)
    assert await found(device) == Budget(8_192, 512)


async def test_a_text_is_never_longer_than_what_fits_even_within_a_micro_batch() -> None:
    device = Device(limit=1_000)
    assert await found(device) == Budget(512, 777)


async def test_a_device_that_runs_next_to_nothing_is_refused() -> None:
    with pytest.raises(OutOfMemory):
        await found(Device(limit=LEAST - 1))
    with pytest.raises(OutOfMemory):
        await found(Device(limit=LEAST - 1, memory=False))


async def test_a_processor_warms_up_with_one_full_micro_batch_and_is_not_tried_with_the_longest_text() -> (
    None
):
    device = Device(limit=100_000, memory=False)
    assert await found(device, tokens=2_048) == Budget(2_048, 32_768)
    assert device.ran == [[2_048], [16] * 128]


# -- what a trial says of other models -----------------------------------------------------------------------------------

SHAPE = msgspec.structs.replace(FOOTPRINT, max_tokens=32_768)


def memory(*, used: int, reserved: int, in_use: int, peak: int) -> Memory:
    """Of a device of 1,000 bytes."""
    return Memory(used=used, free=1000 - used + reserved - in_use, total=1000, reserved=reserved, peak=peak)


class Measuring(Device):
    """Looks at its memory give these."""

    def __init__(self, *looks: Memory, footprint: Footprint | None = SHAPE) -> None:
        super().__init__(limit=100_000)
        self.footprint = footprint
        self._looks = list(looks)

    def memory(self) -> Memory:
        return self._looks.pop(0)

    async def measured(self) -> Measured:
        ids = np.zeros(self.max_tokens, dtype=np.int32)
        return await find_budget(self, self.run, ids, tokens=16_384, max_items=1024)


FRESH = memory(used=300, reserved=250, in_use=200, peak=200)


@pytest.mark.parametrize(
    ("after", "takes"),
    [
        # PyTorch took 100 more, and had 50 that nobody used.
        (memory(used=400, reserved=350, in_use=200, peak=330), 150),
        # It gave back what it took before the end, of which 400 were in use at once.
        (memory(used=310, reserved=260, in_use=200, peak=600), 400),
        # Another process gave memory back meanwhile.
        (memory(used=100, reserved=350, in_use=200, peak=330), 130),
        (memory(used=100, reserved=50, in_use=200, peak=200), 0),
    ],
)
async def test_what_a_trial_took_is_what_was_in_use_or_what_the_device_has_less_of_since(
    after: Memory, takes: int
) -> None:
    found = await Measuring(FRESH, after).measured()
    assert found.takes == takes
    assert found.conditions == Conditions(footprint=SHAPE, tokens=16_384, max_items=1024)


async def test_it_says_nothing_of_others_where_nobody_knows_what_memory_depends_on() -> None:
    assert (await Measuring(FRESH, FRESH, footprint=None).measured()).conditions is None
    processor = Device(limit=100_000, memory=False)
    processor.footprint = SHAPE
    ids = np.zeros(512, dtype=np.int32)
    found = await find_budget(processor, processor.run, ids, tokens=1024, max_items=8)
    assert (found.conditions, found.takes) == (None, 0)


def test_a_trial_stands_for_another_one_under_equal_conditions_where_as_much_is_free() -> None:
    its = Conditions(footprint=SHAPE, tokens=16_384, max_items=1024)
    found = Measured(budget=Budget(16_384, 32_768), conditions=its, takes=100)
    assert found.is_for(its, free=100)
    assert not found.is_for(its, free=99)
    for other in (
        Conditions(footprint=SHAPE, tokens=8_192, max_items=1024),
        Conditions(footprint=SHAPE, tokens=16_384, max_items=512),
        Conditions(
            footprint=msgspec.structs.replace(SHAPE, architecture='{"a":1}'), tokens=16_384, max_items=1024
        ),
    ):
        assert not found.is_for(other, free=1000)


@pytest.mark.parametrize("found", [Budget(8_192, 32_768), Budget(16_384, 30_000)])
def test_a_trial_that_did_not_find_all_that_was_wished_for_stands_for_no_other(found: Budget) -> None:
    its = Conditions(footprint=SHAPE, tokens=16_384, max_items=1024)
    assert not Measured(budget=found, conditions=its).is_for(its, free=1000)


async def test_a_known_budget_is_warmed_up_by_micro_batches_like_those_of_bulk_beside_interactive_texts() -> (
    None
):
    device = Device(limit=4_096)
    ids = np.zeros(32_768, dtype=np.int32)
    assert await part_fits(device.run, ids, Budget(16_384, 32_768), 1024)
    assert device.ran == [[4_096], [16] * 256]


@pytest.mark.parametrize("tokens", [16_384, 512])
async def test_it_may_turn_out_that_they_do_not_fit(tokens: int) -> None:
    ids = np.zeros(32_768, dtype=np.int32)
    assert not await part_fits(Device(limit=255).run, ids, Budget(tokens, 32_768), 1024)


def budget(found: Budget) -> tuple[TokenBudget, Batcher[QueuedText], Metrics, dict[str, object]]:
    batcher = Batcher[QueuedText](
        BatchPolicy(max_tokens=16_384, max_items=10, max_wait=0.0, bulk_max_wait=5.0)
    )
    metrics = Metrics()
    facts: dict[str, object] = {}

    def tell(found: Mapping[str, object]) -> None:
        facts.update(found)

    made = TokenBudget(batcher, metrics, tell)
    made.serve(found)
    return made, batcher, metrics, facts


def test_a_model_that_serves_brings_its_budget() -> None:
    made, batcher, metrics, facts = budget(Budget(8_192, 20_000))
    assert batcher.max_tokens == 8_192
    assert made.longest == 20_000
    assert sample_value(metrics.registry, "embedq_batch_budget_tokens") == 8_192
    assert facts == {"max_batch_tokens": 8_192, "max_text_tokens": 20_000}


def test_a_micro_batch_that_ran_out_of_memory_halves_the_budget() -> None:
    made, batcher, metrics, facts = budget(Budget(8_192, 20_000))
    made.ran_out(8_000)
    assert batcher.max_tokens == 4_000
    assert sample_value(metrics.registry, "embedq_batch_budget_tokens") == 4_000
    assert facts == {"max_batch_tokens": 4_000, "max_text_tokens": 20_000}


def test_a_second_one_of_the_old_size_that_was_under_way_lowers_it_no_further() -> None:
    made, batcher, _, _ = budget(Budget(8_192, 20_000))
    made.ran_out(8_000)
    made.ran_out(8_100)
    assert batcher.max_tokens == 4_000


def test_the_budget_is_never_lowered_below_a_share_of_what_was_found() -> None:
    made, batcher, _, _ = budget(Budget(8_192, 20_000))
    for _ in range(2):
        made.ran_out(10)
        assert batcher.max_tokens == 1_024
    made.serve(Budget(512, 512))
    assert batcher.max_tokens == 512
