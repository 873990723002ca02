"""The interfaces of text-embeddings-inference and Cohere: the same vectors in other shapes."""

from __future__ import annotations

import base64
from typing import Any

import msgspec
import numpy as np
import pytest

from embedq_shared.messages import ErrorBody
from embedq_shared.vectors import quantize
from tests.helpers.fake_gateway import MAX_TOKENS, Door, a_gateway
from tests.helpers.fake_service import OLD, Answer, Received, changed, expected

# -- text-embeddings-inference ---------------------------------------------------------------------------------------------


async def test_embed_gives_a_list_of_vectors_for_one_text_too(door: Door) -> None:
    for inputs in ("a b", ["a b"]):
        answer = await door.post("/embed", {"inputs": inputs})
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-embedq-model-version"] == OLD
        [vector] = answer.json()
        assert np.array(vector, dtype=np.float32).tobytes() == expected("a b").tobytes()


@pytest.mark.parametrize(
    ("more", "truncate"),
    [
        ({}, "end"),
        ({"truncate": None}, "end"),
        ({"truncate": True}, "end"),
        ({"truncate": True, "truncation_direction": "Left"}, "start"),
        ({"truncation_direction": "right"}, "end"),
        ({"truncate": False}, "error"),
    ],
)
async def test_what_is_too_long_is_cut_unless_told_otherwise(
    door: Door, more: dict[str, Any], truncate: str
) -> None:
    await door.post("/embed", {"inputs": "a"} | more)
    assert door.service.received[0].job.truncate == truncate


async def test_embed_passes_prompt_and_dimensions_on(door: Door) -> None:
    answer = await door.post(
        "/embed", {"inputs": ["a"], "prompt_name": "query", "dimensions": 32, "normalize": True}
    )
    assert len(answer.json()[0]) == 32
    job = door.service.received[0].job
    assert (job.input_type, job.dimensions) == ("query", 32)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "`inputs`"),
        ({"inputs": []}, "`inputs`"),
        ({"inputs": [[1, 2]]}, "`inputs[0]`"),
        ({"inputs": "a", "normalize": False}, "`normalize`"),
        ({"inputs": "a", "prompt_name": "passage"}, "`prompt_name`"),
        ({"inputs": "a", "dimensions": 3}, "`dimensions`"),
        ({"inputs": "a", "trunkate": True}, "`trunkate`"),
        ([], "JSON object"),
    ],
)
async def test_embed_says_what_was_expected_in_its_own_shape(door: Door, body: Any, named: str) -> None:
    answer = await door.post("/embed", body)
    assert answer.status_code == 400
    assert answer.json().keys() == {"error", "error_type"}
    assert named in answer.json()["error"]


async def test_an_input_that_fails_is_named_as_the_interface_names_it(door: Door) -> None:
    def fail(received: Received) -> list[Answer]:
        good = door.service.good(received)
        error = ErrorBody(
            code="text_too_long", message="expected at most 512 tokens, got 700", param="input[1]"
        )
        data = [
            msgspec.structs.replace(each, embedding=None, error=error) if each.index == 1 else each
            for each in good.data
        ]
        return [changed(good, data=data)]

    door.service.behave = fail
    tei = await door.post("/embed", {"inputs": ["a", "b"], "truncate": False})
    assert tei.json() == {
        "error": "`inputs[1]`: expected at most 512 tokens, got 700",
        "error_type": "Validation",
    }
    cohere = await door.post("/v2/embed", {"texts": ["a", "b"], "truncate": "NONE"})
    assert cohere.json()["message"] == "`texts[1]`: expected at most 512 tokens, got 700"


async def test_info_describes_the_default_model(door: Door) -> None:
    found = (await door.http.get("/info")).json()
    assert (found["model_id"], found["model_sha"], found["max_input_length"]) == ("default", OLD, MAX_TOKENS)
    door.see("r1", state="STOPPED")
    assert (await door.http.get("/info")).status_code == 503


# -- Cohere ----------------------------------------------------------------------------------------------------------------


async def test_cohere_gets_every_type_it_asks_for(door: Door) -> None:
    texts = ["a b", "c"]
    answer = await door.post(
        "/v2/embed",
        {
            "model": "default",
            "texts": texts,
            "input_type": "search_query",
            "embedding_types": ["float", "int8", "uint8", "binary", "ubinary", "base64"],
        },
        x_request_id="r-7",
    )
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert (found["id"], found["texts"], found["response_type"]) == ("r-7", texts, "embeddings_by_type")
    assert found["meta"] == {"billed_units": {"input_tokens": 3}, "api_version": {"version": "2"}}
    assert found["model_version"] == answer.headers["x-embedq-model-version"] == OLD
    by_type = found["embeddings"]
    for n, text in enumerate(texts):
        vector = expected(text)
        q = np.frombuffer(quantize(vector, "int8")[0], "i1")
        assert np.array(by_type["float"][n], np.float32).tobytes() == vector.tobytes()
        assert base64.b64decode(by_type["base64"][n]) == vector.tobytes()
        assert by_type["int8"][n] == q.tolist()
        assert by_type["uint8"][n] == [int(x) + 128 for x in q]
        assert by_type["ubinary"][n] == np.packbits(vector > 0).tolist()
        assert by_type["binary"][n] == [x - 128 for x in by_type["ubinary"][n]]
    assert door.service.received[0].job.input_type == "query"


@pytest.mark.parametrize(
    ("said", "meant"), [(None, "end"), ("END", "end"), ("START", "start"), ("NONE", "error")]
)
async def test_cohere_cuts_unless_told_otherwise(door: Door, said: str | None, meant: str) -> None:
    answer = await door.post("/v2/embed", {"texts": ["a"], "truncate": said, "output_dimension": 32})
    assert len(answer.json()["embeddings"]["float"][0]) == 32
    assert door.service.received[0].job.truncate == meant


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "`texts`"),
        ({"texts": []}, "`texts`"),
        ({"texts": "a"}, "`texts`"),
        ({"texts": [1]}, "`texts[0]`"),
        ({"texts": ["a"], "images": ["x"]}, "`images`"),
        ({"texts": ["a"], "input_type": "image"}, "`input_type`"),
        ({"texts": ["a"], "embedding_types": ["float64"]}, "`embedding_types"),
        ({"texts": ["a"], "output_dimension": 33, "embedding_types": ["binary"]}, "`output_dimension`"),
        ({"texts": ["a"], "model": ""}, "`model`"),
        ({"texts": ["a"], "text": 1}, "`text`"),
    ],
)
async def test_cohere_is_told_what_was_expected_in_its_own_shape(door: Door, body: Any, named: str) -> None:
    answer = await door.post("/v2/embed", body)
    assert answer.status_code == 400, answer.text
    assert answer.json().keys() == {"message", "code"}
    assert named in answer.json()["message"]


async def test_an_unknown_model_of_coheres_is_404(door: Door) -> None:
    answer = await door.post("/v2/embed", {"texts": ["a"], "model": "embed-v4.0"})
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_model")


async def test_the_default_alias_can_be_another_one() -> None:
    async with a_gateway(default_alias="mine") as door:
        door.see(alias="mine")
        await door.post("/embed", {"inputs": "a"})
        assert door.service.received[0].job.model == "mine"
