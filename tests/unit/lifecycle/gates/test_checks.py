"""What a model's vectors must satisfy."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from embedq_consumer.lifecycle.gates.checks import (
    ModelRejected,
    check_finite,
    check_similarity,
    check_version,
)

UNIT = np.array([[1.0, 0.0], [0.0, -1.0]], dtype=np.float32)


def turned(degrees: float) -> npt.NDArray[np.float32]:
    """`UNIT` with its second vector turned."""
    angle = math.radians(degrees)
    return np.array([[1.0, 0.0], [math.sin(angle), -math.cos(angle)]], dtype=np.float32)


def test_finite_unit_vectors_pass() -> None:
    check_finite(UNIT)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.5, 2.0])
def test_one_component_that_is_not_finite_or_spoils_the_length_fails(bad: float) -> None:
    vectors = UNIT.copy()
    vectors[1, 1] = bad
    with pytest.raises(ModelRejected, match=r"^check: expected finite vectors of length 1"):
        check_finite(vectors)


def test_any_version_passes_where_none_is_asked_for() -> None:
    check_version(None, "sha256:x")
    check_version("sha256:x", "sha256:x")


def test_another_version_than_asked_for_fails() -> None:
    with pytest.raises(ModelRejected, match=r"^digest: expected sha256:y, the directory has sha256:x$"):
        check_version("sha256:y", "sha256:x")


def test_the_least_similar_text_decides() -> None:
    check_similarity(0.86, UNIT, turned(30))
    with pytest.raises(
        ModelRejected, match=r"^min_cosine: expected at least 0\.87 to the old model, got 0\.8660$"
    ):
        check_similarity(0.87, UNIT, turned(30))


def test_models_of_other_dimensions_cannot_be_compared() -> None:
    with pytest.raises(ModelRejected, match="of 2 dimensions, as the old model has, got 3"):
        check_similarity(-1.0, UNIT, np.ones((2, 3), dtype=np.float32))
