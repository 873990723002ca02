"""Relative positions: what attention adds for the distance of two tokens, in buckets that widen with it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["by_distance", "log_buckets", "t5_buckets"]


def by_distance(most: int) -> Tensor:
    """All distances of two tokens of a text of `most` tokens: 1 - most … most - 1."""
    return torch.arange(1 - most, most)


def t5_buckets(most: int, *, buckets: int, max_distance: int) -> Tensor:
    """T5's and MPNet's bucket for each of `by_distance` (key after query counts as positive), int64 (2 · most - 1,).

    In float32 on the CPU, as transformers computes them, so that the borders between buckets are the same everywhere.
    """
    distance = by_distance(most)
    half = buckets // 2
    near = half // 2
    away = distance.abs().clamp(min=1)
    far = near + (
        torch.log(away.float() / near) / math.log(max_distance / near) * (half - near)
    ).long().clamp(max=half - 1 - near)
    return torch.where(away < near, distance.abs(), far) + (distance > 0).long() * half


def log_buckets(most: int, *, buckets: int, max_distance: int) -> Tensor:
    """DeBERTa-v2's bucket for each of `by_distance` (query after key counts as positive), int64 (2 · most - 1,), negative where
    the distance is; the distance itself, if there are no buckets."""
    distance = by_distance(most)
    if buckets <= 0 or max_distance <= 0:
        return distance
    middle = buckets // 2
    away = torch.where(distance.abs() < middle, torch.tensor(middle - 1), distance.abs())
    widest = torch.log(torch.tensor((max_distance - 1) / middle))
    far = torch.ceil(torch.log(away / middle) / widest * (middle - 1)) + middle
    return torch.where(away <= middle, distance, far * distance.sign()).long()
