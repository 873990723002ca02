"""API keys: who may do what, and how much."""

from embedq_gateway.keys.caller import ANYBODY, Admission, Caller
from embedq_gateway.keys.door import Door, key_in
from embedq_gateway.keys.exposure import Exposed, check_exposure, is_loopback, is_same_site
from embedq_gateway.keys.key_file import KeyEntry, KeyFileError, Scope, read_keys

__all__ = [
    "ANYBODY",
    "Admission",
    "Caller",
    "Door",
    "Exposed",
    "KeyEntry",
    "KeyFileError",
    "Scope",
    "check_exposure",
    "is_loopback",
    "is_same_site",
    "key_in",
    "read_keys",
]
