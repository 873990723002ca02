"""Which prompt is prepended to a job's texts. Pure."""

from __future__ import annotations

from embedq_consumer.engine.api import Encoder
from embedq_shared.messages import Job


def prompt_for(job: Job, encoder: Encoder) -> str:
    """The prompt of each text. The template is Qwen3-Embedding's: a space after `Instruct:`, none after `Query:`."""
    if job.instruction is not None:
        return f"Instruct: {job.instruction}\nQuery:"
    if job.input_type is not None:
        return encoder.prompts.get(job.input_type, "")
    return encoder.default_prompt
