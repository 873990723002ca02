"""LoRA adapters: a directory that PEFT wrote, over a base model, merged into its weights while they are loaded."""

from embedq_consumer.engine.adapters.reading import ADAPTER_CONFIG, Adapter, LowRank, base_of, read_adapter

__all__ = ["ADAPTER_CONFIG", "Adapter", "LowRank", "base_of", "read_adapter"]
