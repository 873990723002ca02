"""The aliases that a replica serves: each a `ServedModel` of its own, on one device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from embedq_consumer.batching.text_queue import TextQueue
from embedq_consumer.engine import Encoder
from embedq_consumer.fairness import InteractiveTraffic
from embedq_consumer.lifecycle.device import Device
from embedq_consumer.lifecycle.model_slot import Loader
from embedq_consumer.lifecycle.residents import Residents
from embedq_consumer.lifecycle.served_model import ModelOptions, ServedModel
from embedq_consumer.lifecycle.status_reporter import Publish
from embedq_consumer.lifecycle.warming.cache_warmer import Cache
from embedq_consumer.telemetry.metrics import Metrics
from embedq_consumer.threads import CLOSE_S
from embedq_shared.fleet import Routes
from embedq_shared.messages import Job

_Tell = Callable[[Mapping[str, object]], None]


class AliasOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The aliases of a replica, the first of them being the one that its status is by its name alone."""

    aliases: Sequence[ModelOptions]
    kept_models: int = 0
    """Models that may stay in memory while no alias serves them."""
    pinned: frozenset[Path] = frozenset()
    """Directories, links resolved, whose models stay once they were served."""


class ServedModels:
    """Iterates over the served models, in the order of the settings.

    Invariant: a model that several aliases serve is in memory once; each alias has its own queue, micro-batches and budget.
    """

    # More than six parameters: those of a served model; one caller.
    def __init__(
        self,
        options: AliasOptions,
        loader: Loader,
        publish: Publish,
        metrics: Metrics,
        show_facts: _Tell,
        traffic: InteractiveTraffic | None = None,
        cache: Cache | None = None,
    ) -> None:
        several = len(options.aliases) > 1
        self._device = Device(
            Residents(options.kept_models, options.pinned),
            shares=several or options.kept_models > 0 or bool(options.pinned),
        )
        self._metrics = metrics
        self._show_facts = show_facts
        self._budgets: dict[str, int] = {}
        self.routes = Routes()
        """The aliases that are shares of others, and those of other pools; the first alias's control topic fills it."""
        self._by_alias = {
            one.alias: ServedModel(
                one,
                loader,
                publish,
                metrics,
                self._teller(one) if several else show_facts,
                traffic,
                self._device,
                self.routes if one.first else None,
                cache,
            )
            for one in options.aliases
        }
        self.queues: Mapping[str, TextQueue] = {alias: one.queue for alias, one in self._by_alias.items()}
        """Where the texts of each alias wait."""
        metrics.reload_running.set_function(lambda: max(one.reload_running_s for one in self))

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._by_alias.values())

    def encoders(self) -> dict[str, Encoder]:
        """The model of each alias that accepts new jobs.

        Raises:
            NoModel: one has none right now; nothing may be polled then.
        """
        return {alias: one.encoder() for alias, one in self._by_alias.items()}

    def note_dimensions(self, alias: str, dimensions: int) -> None:
        """A job asks for an alias's vectors of this length."""
        self._by_alias[alias].note_dimensions(dimensions)

    def note_use(self, alias: str, job: Job) -> None:
        """An interactive job is admitted for an alias."""
        self._by_alias[alias].note_use(job)

    @property
    def busy_since(self) -> dict[str, float | None]:
        """Monotonic seconds since when the oldest call of native code runs, by what it does; None while none does."""
        found: dict[str, float | None] = {}
        for one in self:
            for work, since in one.busy_since.items():
                others = found.get(work)
                found[work] = min((each for each in (since, others) if each is not None), default=None)
        return found

    def close(self, within_s: float = CLOSE_S) -> None:
        """End the threads. What runs longer than this is left behind."""
        until = time.monotonic() + within_s
        for one in self:
            one.close(until - time.monotonic())
        self._device.close(until - time.monotonic())

    def _teller(self, options: ModelOptions) -> _Tell:
        """What shows the facts of one alias of several. The metric of the budget is that of the smallest."""

        def tell(facts: Mapping[str, object]) -> None:
            self._show_facts({f"{name} of {options.alias}": value for name, value in facts.items()})
            budget = facts.get("max_batch_tokens")
            if isinstance(budget, int):
                self._budgets[options.alias] = budget
                self._metrics.batch_budget.set(min(self._budgets.values()))

        return tell
