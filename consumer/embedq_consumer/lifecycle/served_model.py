"""Everything of one alias: its model, the texts that wait for it, and what changes the model and reports on it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import msgspec
import structlog

from embedq_consumer.batching.batch_loop import BatchLoop
from embedq_consumer.batching.batch_runner import BatchRunner, Results
from embedq_consumer.batching.batcher import Batcher, BatchPolicy
from embedq_consumer.batching.head_start import HeadStart
from embedq_consumer.batching.single_flight import QueuedText, SingleFlight
from embedq_consumer.batching.text_queue import TextQueue
from embedq_consumer.batching.token_budget import TokenBudget
from embedq_consumer.engine import Encoder
from embedq_consumer.fairness import InteractiveTraffic
from embedq_consumer.lifecycle.device import Device
from embedq_consumer.lifecycle.gates.dimensions import DimensionsInUse
from embedq_consumer.lifecycle.gates.load_attempts import LoadAttempts
from embedq_consumer.lifecycle.gates.model_root import ModelRoot
from embedq_consumer.lifecycle.model_slot import Loader, ModelSlot
from embedq_consumer.lifecycle.reloader import Commands, Hold, Reloader, Turn, everybodys_turn
from embedq_consumer.lifecycle.status_reporter import Publish, Serving, StatusReporter
from embedq_consumer.lifecycle.trial import Gates, Trial, TrialLimits
from embedq_consumer.lifecycle.warming.cache_warmer import Cache, CacheWarmer, WarmOptions
from embedq_consumer.telemetry.metrics import Metrics
from embedq_consumer.telemetry.process_memory import machine_bytes, resident_bytes
from embedq_consumer.threads import CLOSE_S
from embedq_shared.fleet import Routes
from embedq_shared.messages import Control, Job
from embedq_shared.topics import Topics

log = structlog.get_logger()

_MEMORY_EVERY_S: Final = 5.0
"""Well within the minutes that an alert waits; a look takes a fraction of a millisecond between two micro-batches."""


class BatchOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How large a micro-batch may be, and how long texts wait for one."""

    max_tokens: int
    max_items: int
    max_wait_s: float
    bulk_max_wait_s: float
    late: bool = False
    """Each is formed shortly before the one that runs is done. For a CPU: it has the next one at once, while a GPU that waits for the event
    loop loses more than whoever comes gains."""


class ModelOptions(msgspec.Struct, frozen=True, kw_only=True):
    """One alias of one replica: which model serves it, and within which limits."""

    alias: str
    first: bool = True
    """Whether its status is the one by the replica's name alone."""
    replica: str
    topics: Topics
    configured: Path
    """The model to begin with as long as no command names another one; links resolved."""
    root: Path
    """Models of commands lie below it; links resolved."""
    batches: BatchOptions
    drain_timeout_s: float
    """A reload that waits longer than this for the jobs in flight fails, and the old model goes on."""
    load_timeout_s: float
    """A load that takes longer than this is given up."""
    stall_timeout_s: float
    """A micro-batch that takes longer than this while a model stands its trial ends the process."""
    attempts: Path | None
    """A folder that outlives the process, for the loads that do not; None: nothing is noted."""
    warming: WarmOptions | None = None
    """None: the cache is not warmed, and no text is kept in mind."""


class ServedModel:
    """One object per alias. A second alias is a second object; two share the device alone, and what is in its memory.

    Its parts: `slot` holds the model, `queue` the texts that wait for it, `reporter` owns the status. Only `start` and
    `follow` change the slot, and only `run_batches` takes from the queue.
    """

    # More than six parameters: each is another part, and a struct of them would be made for this call alone.
    def __init__(
        self,
        options: ModelOptions,
        loader: Loader,
        publish: Publish,
        metrics: Metrics,
        show_facts: Callable[[Mapping[str, object]], None],
        traffic: InteractiveTraffic | None = None,
        device: Device | None = None,
        routes: Routes | None = None,
        cache: Cache | None = None,
    ) -> None:
        """`show_facts` takes what operators should know of the budget, such as `Health.tell`. While `traffic` comes, bulk runs
        in small micro-batches. `device`: None for one of its own. `routes` has the splits that its status tells of. `cache` is warmed
        as the options say."""
        self.alias = options.alias
        self.routes = routes
        batches = options.batches
        self._late = batches.late
        self._metrics = metrics
        self._configured = options.configured
        self._root = options.root
        self._memory: tuple[int | None, int | None] = None, None
        self.slot = ModelSlot(loader, device, load_timeout_s=options.load_timeout_s)
        self._flights = SingleFlight()
        self._batcher = Batcher[QueuedText](
            BatchPolicy(
                max_tokens=batches.max_tokens,
                max_items=batches.max_items,
                max_wait=batches.max_wait_s,
                bulk_max_wait=batches.bulk_max_wait_s,
                traffic=traffic,
            )
        )
        self._budget = TokenBudget(self._batcher, metrics, show_facts)
        self._head_start = HeadStart()
        # A CPU alone: there the round trip to the cache is short beside the work, and a run of its own needs no graph.
        start = self.slot.start if batches.late else None
        self.queue = TextQueue(self._flights, self._batcher, self._budget, metrics, self._head_start, start)
        self.reporter = StatusReporter(
            options.topics,
            options.replica,
            options.alias,
            publish,
            metrics,
            serving=self._serving,
            first=options.first,
        )
        self._dimensions = DimensionsInUse()
        self._warmer: CacheWarmer | None = None
        if options.warming is not None and cache is not None:
            self._warmer = CacheWarmer(options.warming, cache, self.slot, self.reporter, metrics)
        trial = Trial(
            self.slot,
            Gates(
                root=ModelRoot(options.root),
                attempts=LoadAttempts(options.attempts),
                dimensions=self._dimensions,
            ),
            self.reporter,
            TrialLimits(
                batch_tokens=batches.max_tokens,
                batch_items=batches.max_items,
                stall_timeout_s=options.stall_timeout_s,
            ),
            self._warmer,
        )
        self._reloader = Reloader(
            self.slot,
            trial,
            self._budget,
            self.reporter,
            metrics,
            drain_timeout_s=options.drain_timeout_s,
        )

    async def start(self, desired: Control | None) -> None:
        """Load the model to begin with: the one that the newest command names, or else the configured one.

        Raises:
            ModelError, ModelRejected: none may serve.
        """
        await self._reloader.start(desired, self._configured)

    def encoder(self) -> Encoder:
        """The model that accepts new jobs.

        Raises:
            NoModel: none serves right now; nothing may be polled then.
        """
        return self.slot.loaded.encoder

    async def run_batches(self, results: Results, tasks: asyncio.TaskGroup) -> None:
        """Take micro-batches from the queue in order, compute them and hand on their results, until cancelled."""
        runner = BatchRunner(self._flights, self.slot, self._budget, results, self._metrics)
        await BatchLoop(
            self._batcher,
            runner.run,
            self._metrics,
            tasks,
            late=self._late,
            head_start=self._head_start,
        ).run()

    async def follow(self, commands: Commands, hold: Hold, turn: Turn = everybodys_turn) -> None:
        """Reload as commands say, until cancelled. The swap runs inside `hold`, where nothing is in flight."""
        await self._reloader.follow(commands, hold, turn)

    def note_dimensions(self, dimensions: int) -> None:
        """A job asks for vectors of this length: no command's model may give shorter ones for a while."""
        self._dimensions.note(dimensions, time.monotonic())

    def note_use(self, job: Job) -> None:
        """An interactive job is admitted: what is asked for most is kept in mind, if the cache is to be warmed."""
        if self._warmer is not None:
            self._warmer.note(job)

    async def watch_memory(self) -> None:
        """Measure the device's memory again and again, until cancelled; on a CPU this process's."""
        while True:
            if (memory := await self.slot.memory()) is not None:
                self._metrics.gpu_used.set(memory.used)
                self._metrics.gpu_total.set(memory.total)
                self._metrics.gpu_reserved.set(memory.reserved)
                self._metrics.gpu_peak.set(memory.peak)
                self._memory = memory.used, memory.total
                log.debug("memory", **msgspec.structs.asdict(memory))
            else:
                self._memory = used, total = await asyncio.to_thread(resident_bytes), machine_bytes()
                log.debug("memory", used=used, total=total)
            await asyncio.sleep(_MEMORY_EVERY_S)

    def _serving(self) -> Serving | None:
        """What a status says of the model that serves."""
        if (loaded := self.slot.serving) is None:
            return None
        used, total = self._memory
        return Serving(
            dimensions=loaded.encoder.hidden_size,
            max_tokens=loaded.encoder.max_tokens,
            path=_name_of(loaded.path, self._root),
            memory_used=used,
            memory_total=total,
            splits={} if self.routes is None else self.routes.splits.weights(),
            served_s=round(self.slot.served_s, 3),
            first_error_s=None if (first := self.slot.first_error_s) is None else round(first, 3),
        )

    @property
    def reload_running_s(self) -> float:
        """Seconds of the reload under way; 0 while there is none. Any thread may ask."""
        return self._reloader.running_s

    @property
    def busy_since(self) -> dict[str, float | None]:
        """Monotonic seconds since when the oldest call of native code runs, by what it does; None while none does."""
        return {"compute": self.slot.busy_since, "tokenize": self.queue.busy_since}

    def close(self, within_s: float = CLOSE_S) -> None:
        """End the threads. What runs longer than this is left behind."""
        until = time.monotonic() + within_s
        self.queue.close(within_s)
        self.slot.close(until - time.monotonic())


def _name_of(path: Path, root: Path) -> str | None:
    """What a command calls this directory; None for one that lies elsewhere, or is the root itself."""
    if path == root or not path.is_relative_to(root):
        return None
    return path.relative_to(root).as_posix()
