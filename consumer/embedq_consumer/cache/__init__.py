"""Vectors that Redis remembers, so that an equal text is not computed again."""

from embedq_consumer.cache.entries import CachedVector, EntryCodec, cache_key
from embedq_consumer.cache.redis_link import RedisOptions
from embedq_consumer.cache.secret import BadCacheSetting, SecretSource, load_secret
from embedq_consumer.cache.vector_cache import CacheOptions, VectorCache

__all__ = [
    "BadCacheSetting",
    "CacheOptions",
    "CachedVector",
    "EntryCodec",
    "RedisOptions",
    "SecretSource",
    "VectorCache",
    "cache_key",
    "load_secret",
]
