"""Inputs become micro-batches: equal texts share one computation, and a token budget decides what runs together.

In the order of a text's trip: `text_queue` (equal ones join in `single_flight`, the first is tokenized by `tokenizer_pool`, a lone one before
the cache has answered: `head_start`),
`batcher` (which texts run next), `prefetch` (when the next micro-batch is formed) and `batch_loop` (forms it), `batch_runner` (computes
it; `windows` puts chunked texts together). `token_budget` says how much fits, `input_errors` why a text gets no vector.
"""

from embedq_consumer.batching.batch_loop import BatchLoop
from embedq_consumer.batching.batch_runner import AssembledText, BatchRunner, ComputedText
from embedq_consumer.batching.batcher import Batcher, BatchPolicy
from embedq_consumer.batching.single_flight import JobInput, QueuedText, Settled, SingleFlight
from embedq_consumer.batching.text_queue import Early, First, TextQueue
from embedq_consumer.batching.token_budget import Budget, TokenBudget, find_budget
from embedq_consumer.batching.windows import Vectors

__all__ = [
    "AssembledText",
    "BatchLoop",
    "BatchPolicy",
    "BatchRunner",
    "Batcher",
    "Budget",
    "ComputedText",
    "Early",
    "First",
    "JobInput",
    "QueuedText",
    "Settled",
    "SingleFlight",
    "TextQueue",
    "TokenBudget",
    "Vectors",
    "find_budget",
]
