"""Rotary positions that depend on how long a text is (`longrope`, `dynamic`): each text of a packed row gets what it gets alone.

transformers chooses the frequencies by the longest position of a call, and here a call is a row of many texts. So for these
types it is asked for the frequencies of each length, once, and its module is called for the texts of one length at a time.
Whether a module depends on length is not believed but tried, for every number that its configuration names.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import lru_cache
from typing import Any, Final

import msgspec
import torch
from torch import Tensor

from embedq_consumer.engine.kernels.attention import Packing

__all__ = ["FIXED", "by_text", "scaled_length", "thresholds"]

FIXED: Final = frozenset({"default", "linear", "llama3", "proportional", "yarn"})
"""The types whose frequencies are the same for every text."""
_SHORT: Final = 0
"""The key of the frequencies that short texts get."""
_LENGTHS_KEPT: Final = 1024
"""Lengths whose frequencies are kept; each has half a head's numbers."""
_CLOSE: Final = 1e-6
"""Radians a position: what float32 leaves of an angle where frequencies come from another device."""

_Angles = tuple[Tensor, ...]


class _Part(msgspec.Struct, frozen=True):
    """Tokens `begin` to `end` of a row, whose texts all get the frequencies under `key`."""

    begin: int
    end: int
    key: int


def thresholds(config: Any) -> list[int]:
    """The lengths after which texts get other frequencies, ascending: none for most models."""
    found = set()
    for parameters in _parameters(config).values():
        kind = _kind(parameters)
        if kind == "dynamic":
            found.add(int(config.max_position_embeddings))
        elif kind is not None and isinstance(
            known := parameters.get("original_max_position_embeddings"), int
        ):
            found.add(known)
    return sorted(found)


def scaled_length(config: Any) -> int | None:
    """The longest text for which a `dynamic` model is made, which is `factor` times its `max_position_embeddings`; None for others."""
    # Layers with a window never see further than that.
    found = [each for name, each in _parameters(config).items() if name != "sliding_attention"]
    if not found or any(_kind(each) != "dynamic" for each in found):
        return None
    return int(min(float(each["factor"]) for each in found) * int(config.max_position_embeddings))


def by_text(model: Any, longest: int) -> Callable[[Packing | None], None]:
    """Make the rotary positions of transformers' `model` those of each text alone, for texts of up to `longest` tokens.

    Returns what has to be told the packing before each call of the model. Where there is none, texts of one length are
    expected, unpacked.

    Raises:
        NotImplementedError: they depend on the call in a way that is not known here.
    """
    changed = [found for module in _rotary_modules(model) if (found := _changed(module, longest))]

    def tell(packing: Packing | None) -> None:
        for rotary in changed:
            rotary.packing = packing

    return tell


class _RotaryByText:
    """Takes the place of the `forward` of transformers' rotary `module` for the layer types `kinds`.

    Frequencies are computed once for a length, on the device and without waiting for it.
    """

    packing: Packing | None = None

    def __init__(self, module: torch.nn.Module, kinds: Mapping[str | None, str]) -> None:
        self._module: Any = module
        self._kinds = kinds
        self._thresholds = {
            layer_type: _threshold(self._module.config, layer_type, kind)
            for layer_type, kind in kinds.items()
        }
        # Without transformers' own update of the frequencies, which looks at the whole call.
        self._forward = inspect.unwrap(type(module).forward)
        self._frequencies = lru_cache(_LENGTHS_KEPT)(self._computed)

    def __call__(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        more = {} if layer_type is None else {"layer_type": layer_type}
        if layer_type not in self._kinds:
            return self._forward(self._module, x, position_ids, **more)
        name = f"{_prefix(layer_type)}inv_freq"
        before = getattr(self._module, name)
        parts = []
        try:
            for part in self._parts(layer_type, position_ids.shape[-1]):
                setattr(self._module, name, self._frequencies(layer_type, part.key))
                parts.append(self._forward(self._module, x, position_ids[..., part.begin : part.end], **more))
        finally:
            setattr(self._module, name, before)
        if len(parts) == 1:
            return parts[0]
        if isinstance(parts[0], Tensor):
            return torch.cat(parts, dim=-2)
        return tuple(torch.cat(each, dim=-2) for each in zip(*parts, strict=True))

    def _parts(self, layer_type: str | None, tokens: int) -> list[_Part]:
        """The row of so many tokens by frequencies: neighbors with the same ones together."""
        found: list[_Part] = []
        begin = 0
        for end, reach in ((tokens, tokens),) if self.packing is None else self.packing.reaches:
            key = self._key(layer_type, reach)
            if found and found[-1].key == key:
                found[-1] = _Part(found[-1].begin, end, key)
            else:
                found.append(_Part(begin, end, key))
            begin = end
        return found

    def _key(self, layer_type: str | None, reach: int) -> int:
        threshold = self._thresholds[layer_type]
        if reach <= threshold:
            return _SHORT
        return reach if self._kinds[layer_type] == "dynamic" else threshold + 1

    def _computed(self, layer_type: str | None, key: int) -> Tensor:
        """The frequencies of texts that are `key` tokens long."""
        module = self._module
        original: Tensor = getattr(module, f"{_prefix(layer_type)}original_inv_freq")
        if key == _SHORT:
            return original
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        # As transformers calls them, but on the host, and copied from there: nothing waits for the device.
        kind = self._kinds[layer_type]
        length = torch.tensor(key) if kind == "dynamic" else key
        more = {} if layer_type is None else {"layer_type": layer_type}
        frequencies: Tensor
        frequencies, _ = ROPE_INIT_FUNCTIONS[kind](module.config, torch.device("cpu"), seq_len=length, **more)
        return frequencies.to(original.device, non_blocking=True)


def _changed(module: torch.nn.Module, longest: int) -> _RotaryByText | None:
    """What takes the place of `module`'s forward from now on; None if it may stay.

    Raises:
        NotImplementedError: it depends on the call in a way that is not known here.
    """
    kinds = _kinds(module)
    lengths = _telling_lengths(_config_of(module), longest)
    moving = {
        layer_type: kind for layer_type, kind in kinds.items() if _depends(module, layer_type, kind, lengths)
    }
    if not moving:
        return None
    names = ", ".join(sorted({str(kind) for kind in moving.values()}))
    refused = NotImplementedError(
        f"rope_type {names}: {type(module).__name__} depends on the longest text of a call"
    )
    known = {
        layer_type: kind for layer_type, kind in moving.items() if kind is not None and kind not in FIXED
    }
    if known != moving:
        raise refused
    try:
        rotary = _RotaryByText(module, known)
        right = all(
            _is_right(module, rotary, layer_type, length) for layer_type in known for length in lengths
        )
    except (AttributeError, KeyError, TypeError) as error:  # it is made in another way than those known here
        raise refused from error
    if not right:
        raise refused
    module.forward = rotary
    return rotary


def _depends(
    module: torch.nn.Module, layer_type: str | None, kind: str | None, lengths: Collection[int]
) -> bool:
    """Whether a text of one of `lengths` has other angles at its first tokens than the shortest has."""
    try:
        first = [_alone(module, layer_type, [0, 1, 2, n - 1])[:3] for n in lengths if n > 3]
    except Exception as error:
        if kind in FIXED:
            return False  # it takes other arguments, and the proof of the whole model is left
        raise NotImplementedError(f"rope_type {kind}: {type(module).__name__} cannot be tried") from error
    return any(
        not torch.equal(one, other) for each in first for one, other in zip(each, first[0], strict=True)
    )


def _is_right(module: torch.nn.Module, rotary: _RotaryByText, layer_type: str | None, length: int) -> bool:
    """Whether a short text, one of `length`, and another short one have the angles in a row that each has alone."""
    texts = [[0, 1, 2], [0, 1, length // 2, length - 1], [0]]
    wanted = [_alone(module, layer_type, positions) for positions in texts]
    ends = [3, 7, 8]
    reaches = tuple((end, positions[-1] + 1) for end, positions in zip(ends, texts, strict=True))
    rotary.packing = msgspec.structs.replace(Packing.of([3, 4, 1], torch.device("cpu")), reaches=reaches)
    try:
        with torch.inference_mode():
            found = _flat(rotary(*_arguments(module, [each for text in texts for each in text]), layer_type))
    finally:
        rotary.packing = None
    return torch.allclose(found, torch.cat(wanted), rtol=0, atol=_CLOSE * max(length, 10))


@torch.inference_mode()
def _alone(module: torch.nn.Module, layer_type: str | None, positions: list[int]) -> Tensor:
    """The angles of one text by transformers' own code in a fresh module: (tokens, …), real."""
    config = _config_of(module)
    fresh = copy.deepcopy(module, {id(config): config})
    more = {} if layer_type is None else {"layer_type": layer_type}
    fresh(*_arguments(module, [0]), **more)  # forgets the long texts of former calls
    return _flat(fresh(*_arguments(module, positions), **more))


def _arguments(module: torch.nn.Module, positions: list[int]) -> tuple[Tensor, Tensor]:
    device = next(module.buffers()).device
    return torch.empty(1, len(positions), 1, device=device), torch.tensor([positions], device=device)


def _flat(angles: Any) -> Tensor:
    parts = [angles] if isinstance(angles, Tensor) else list(angles)
    parts = [torch.view_as_real(part).flatten(-2) if part.is_complex() else part for part in parts]
    return torch.cat([part.float() for part in parts], dim=-1).flatten(0, -2)


def _rotary_modules(model: Any) -> Iterator[torch.nn.Module]:
    for module in model.modules():
        if isinstance(module.forward, _RotaryByText):
            continue
        takes = inspect.signature(module.forward).parameters
        if hasattr(module, "rope_type") and "position_ids" in takes and any(True for _ in module.buffers()):
            yield module


def _telling_lengths(config: Any, longest: int) -> list[int]:
    """Lengths of up to `longest` tokens that show a dependence: about every number that the configuration names."""
    fields = config.to_dict()
    numbers = {1 << power for power in range(2, 24)} | {longest}
    for name, value in fields.items():
        numbers |= set(_integers(value if "rope" in name or not isinstance(value, dict | list) else None))
    near = {number + step for number in numbers for step in (-1, 0, 1)}
    return sorted(number for number in near if 3 < number <= longest) or [longest]


def _integers(value: Any) -> Iterator[int]:
    match value:
        case bool():
            return
        case int():
            yield value
        case float() if value.is_integer():
            yield int(value)
        case dict():
            for each in value.values():
                yield from _integers(each)
        case _:
            return


def _kinds(module: Any) -> dict[str | None, str | None]:
    """The rotary type of each layer type; the key is None where all layers have one."""
    kinds = module.rope_type
    return dict(kinds) if isinstance(kinds, dict) else {None: kinds}


def _config_of(module: Any) -> Any:
    return module.config


def _parameters(config: Any) -> dict[str | None, Mapping[str, Any]]:
    """The rotary parameters of each layer type; the key is None where all layers have the same."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if any(isinstance(each, Mapping) for each in parameters.values()):
        return {name: each for name, each in parameters.items() if isinstance(each, Mapping)}
    return {None: parameters} if parameters else {}


def _kind(parameters: Mapping[str, Any]) -> str | None:
    kind = parameters.get("rope_type", parameters.get("type"))
    return None if kind is None else str(kind)


def _threshold(config: Any, layer_type: str | None, kind: str) -> int:
    """The longest text that gets the frequencies of short ones."""
    if kind == "dynamic":
        return int(config.max_position_embeddings)
    parameters = _parameters(config)
    return int(
        parameters[layer_type if layer_type in parameters else None]["original_max_position_embeddings"]
    )


def _prefix(layer_type: str | None) -> str:
    return "" if layer_type is None else f"{layer_type}_"
