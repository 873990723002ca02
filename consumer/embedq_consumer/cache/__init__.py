"""Vectors that Redis remembers, so that an equal text is not computed again."""

from embedq_consumer.cache.entries import CachedVector, cache_key
from embedq_consumer.cache.vector_cache import CacheOptions, VectorCache

__all__ = ["CacheOptions", "CachedVector", "VectorCache", "cache_key"]
