"""A model directory is regular files below its root, none larger than its kind may be, and nobody else's code."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_consumer.engine import ModelError
from embedq_consumer.engine.safety import files
from embedq_consumer.engine.safety.bounds import HEADER_BYTES, NUMBERS, limit_of, too_large
from embedq_consumer.engine.safety.files import confines_of, open_regular, read_bounded, survey
from embedq_consumer.engine.safety.foreign import foreign_config, foreign_tokenizer
from embedq_consumer.engine.safety.headers import read_header
from embedq_consumer.engine.safety.panics import Panic, panics_caught

MIB = 1024 * 1024


def surveyed(directory: Path, root: Path | None = None) -> None:
    survey(directory, confines_of(directory, root))


# -- bounds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("config.json", 4 * MIB),
        ("special_tokens_map.json", 4 * MIB),
        ("tokenizer.json", 64 * MIB),
        ("tokenizer_config.json", 64 * MIB),
        ("vocab.txt", 64 * MIB),
        ("spiece.model", 64 * MIB),
        ("model.safetensors.index.json", 16 * MIB),
        ("chat_template.jinja", 4 * MIB),
        ("model.safetensors", None),
        ("README.md", None),
    ],
)
def test_each_kind_of_file_has_its_bound(name: str, limit: int | None) -> None:
    assert limit_of(name) == limit


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_no_model_has_are_refused_wherever_the_configuration_has_them(name: str) -> None:
    most = NUMBERS[name]
    assert too_large({name: most}) is None
    for value in (most + 1, -1, 1.5, "7", True, 1e300):
        assert too_large({name: value}) == f"{name}: expected a number from 0 to {most}"
        assert (
            too_large({"text_config": {name: value}})
            == f"text_config.{name}: expected a number from 0 to {most}"
        )


# -- files -------------------------------------------------------------------------------------------------------------


def test_only_regular_files_are_opened_and_none_makes_anybody_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    with listener:
        for name, kind in (
            ("pipe", "a named pipe"),
            ("folder", "a directory"),
            ("socket", "a socket"),
            ("/dev/zero", "a device"),
        ):
            with (
                pytest.raises(ModelError, match=f"expected a regular file, it is {kind}"),
                open_regular(tmp_path / name),
            ):
                pass
    for name in ("missing", "regular/below"):
        (tmp_path / "regular").touch()
        with pytest.raises(ModelError, match=f"{name}: missing"), open_regular(tmp_path / name):
            pass


def test_no_more_is_read_than_may_be_and_what_grows_meanwhile_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(b"x" * 100)
    assert read_bounded(file, 100) == b"x" * 100
    with pytest.raises(ModelError, match=r"expected at most 99 bytes, it has 100"):
        read_bounded(file, 99)
    with file.open("ab") as end:
        end.truncate(5_000_000_000)
    with pytest.raises(ModelError, match="expected at most 4,194,304 bytes, it has 5,000,000,000"):
        read_bounded(file)
    monkeypatch.setattr(files, "refuse_size", lambda *_: None)  # as if it had been small a moment ago
    assert len(read_bounded(file, 1000)) == 1001


def test_a_directory_of_regular_files_passes_whatever_lies_in_hidden_folders(tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "1_Pooling").mkdir(parents=True)
    (model / "1_Pooling" / "config.json").write_text("{}")
    (model / ".git").mkdir()
    os.mkfifo(model / ".git" / "pipe")
    (model / "gone.json").symlink_to("nowhere")
    with (model / "README.md").open("wb") as readme:
        readme.truncate(10_000_000_000)
    surveyed(model)


@pytest.mark.parametrize("name", ["config.json", "1_Pooling/anything"])
def test_a_pipe_anywhere_in_it_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "1_Pooling").mkdir()
    os.mkfifo(tmp_path / name)
    with pytest.raises(ModelError, match=f"{name}: expected a regular file, it is a named pipe"):
        surveyed(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "sub/special_tokens_map.json"])
def test_a_sparse_file_is_refused_before_it_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "sub").mkdir()
    with (tmp_path / name).open("wb") as file:
        file.truncate(3_000_000_000)
    with pytest.raises(ModelError, match=f"{name}: expected at most .* bytes, it has 3,000,000,000"):
        surveyed(tmp_path)


def test_links_stay_below_the_root_and_are_judged_by_what_they_lead_to(tmp_path: Path) -> None:
    root = tmp_path / "models"
    model = root / "a"
    model.mkdir(parents=True)
    (root / "shared.json").write_text("{}")
    (tmp_path / "secret.json").write_text("{}")
    (model / "config.json").symlink_to("../shared.json")
    surveyed(model, root)
    with pytest.raises(ModelError, match=r"a link to .*shared\.json, outside of the model root"):
        surveyed(model)  # without a root, the directory itself is it
    for target, reason in (
        ("../../secret.json", "outside of the model root"),
        ("/dev/zero", "a link to /dev/zero, outside of the model root"),
        ("/proc/self/environ", "outside of the model root"),
        ("..", "expected at most 6 folders|outside"),
        ("config.json", "cannot be read"),
    ):
        (model / "config.json").unlink()
        (model / "config.json").symlink_to(target)
        with pytest.raises(ModelError, match=reason):
            surveyed(model, root)
    os.mkfifo(root / "pipe")
    (model / "config.json").unlink()
    (model / "config.json").symlink_to("../pipe")
    with pytest.raises(ModelError, match="it is a named pipe"):
        surveyed(model, root)


def test_a_snapshot_of_hugging_faces_cache_links_to_its_own_blobs_and_to_no_others(tmp_path: Path) -> None:
    for repository in ("models--one", "models--two"):
        (tmp_path / repository / "snapshots" / "rev").mkdir(parents=True)
        (tmp_path / repository / "blobs").mkdir()
        (tmp_path / repository / "blobs" / "abc").write_text("{}")
    snapshot = tmp_path / "models--one" / "snapshots" / "rev"
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    surveyed(snapshot)
    surveyed(snapshot, snapshot.parent)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../../models--two/blobs/abc")
    with pytest.raises(ModelError, match="outside of the model root"):
        surveyed(snapshot)
    surveyed(snapshot, tmp_path)


def test_a_wrong_path_with_more_files_than_any_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MOST_ENTRIES", 20)
    for number in range(20):
        (tmp_path / f"{number}").touch()
    surveyed(tmp_path)
    (tmp_path / "one more").touch()
    with pytest.raises(ModelError, match="expected at most 20 files"):
        surveyed(tmp_path)


# -- headers -----------------------------------------------------------------------------------------------------------


def write_header(file: Path, header: object, data: int = 0) -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded)
    with file.open("ab") as stream:
        stream.truncate(8 + len(encoded) + data)
    return file


def tensor(*shape: int, at: int = 0, size: int | None = None, dtype: str = "F32") -> dict[str, Any]:
    count = 4
    for n in shape:
        count *= n
    return {
        "dtype": dtype,
        "shape": list(shape),
        "data_offsets": [at, at + (count if size is None else size)],
    }


def test_a_header_says_where_each_tensor_lies(tmp_path: Path) -> None:
    header = {"b": tensor(2, 3, at=8), "a": tensor(2), "__metadata__": {"format": "pt"}}
    found = read_header(write_header(tmp_path / "w", header, 32))
    data = (tmp_path / "w").stat().st_size - 32
    assert [(each.name, each.shape, each.begin - data, each.end - data) for each in found] == [
        ("a", (2,), 0, 8),
        ("b", (2, 3), 8, 32),
    ]


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        ({"a": tensor(2, size=100)}, 100, "its bytes are not as many as its shape needs"),
        ({"a": tensor(1 << 40, size=8)}, 8, "its bytes are not as many as its shape needs"),
        ({"a": tensor(2)}, 4, "cut short"),
        ({"a": tensor(2)}, 5_000_000_000, "cut short: it has 5000000"),
        ({"a": tensor(2), "b": tensor(2, at=4)}, 12, "right after the one before"),
        ({"a": tensor(2, at=8)}, 16, "right after the one before"),
        ({"a": tensor(2, dtype="F128")}, 8, "dtype 'F128' is unknown"),
        ({"a": tensor(-2)}, 0, "not a safetensors header"),
        ({"a": {"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 4]}}, 4, "not a safetensors header"),
        ({"a": {"dtype": "F32", "shape": [10**30], "data_offsets": [0, 4]}}, 4, "not a safetensors header"),
        ({"a": 7}, 0, "not a safetensors header"),
        ([], 0, "not a safetensors header"),
        (b"{" * 100_000, 0, "not a safetensors header"),
        (b'{"a":' * 100_000, 0, "not a safetensors header"),
        (b"\xff\xfe", 0, "not a safetensors header"),
    ],
)
def test_a_header_that_is_not_true_is_refused(tmp_path: Path, header: object, data: int, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        read_header(write_header(tmp_path / "w", header, data))


def test_a_header_that_claims_gigabytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "w"
    with file.open("wb") as stream:
        stream.write((6_000_000_000).to_bytes(8, "little"))
        stream.truncate(7_000_000_000)
    with pytest.raises(ModelError, match=f"a header of at most {HEADER_BYTES:,} bytes, it has 6,000,000,000"):
        read_header(file)


# -- code and files from elsewhere -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"attn_implementation": "nobody/kernel"},
            "attn_implementation: 'nobody/kernel' is a kernel from a hub",
        ),
        ({"_attn_implementation": "nobody/kernel@v1:f"}, "is a kernel from a hub"),
        ({"attn_implementation": "paged|nobody/kernel"}, "is a kernel from a hub"),
        ({"attn_implementation": {"text_config": "nobody/kernel"}}, "is a kernel from a hub"),
        ({"text_config": {"_attn_implementation_internal": "a/b"}}, "'a/b' is a kernel from a hub"),
        ({"experts_implementation": "a/b"}, "experts_implementation"),
        ({"use_kernels": True}, "use_kernels: kernels from a hub are never loaded"),
        ({"quantization_config": {"kernel_config": {"x": "a/b"}}}, "kernel_config: kernels from a hub"),
        ({"auto_map": {"AutoModel": "modeling.X"}}, "auto_map: the model needs code from its own directory"),
        (
            {"auto_map": {"AutoConfig": "a/b--conf.X"}},
            r"auto_map: the model needs code from a hub \(AutoConfig\)",
        ),
        ({"auto_map": "a/b--conf.X"}, "auto_map: the model needs code from a hub"),
        ({"configuration_files": ["config.9.json"]}, "configuration_files: the model's own files alone"),
        ({"transformers_weights": "../other.safetensors"}, "transformers_weights"),
    ],
)
def test_a_configuration_that_asks_for_others_code_or_files_is_refused(
    fields: dict[str, Any], reason: str
) -> None:
    found = foreign_config({"model_type": "bert", **fields})
    assert found is not None
    assert re.search(reason, found)


@pytest.mark.parametrize(
    "fields",
    [
        {"attn_implementation": "sdpa"},
        {"_attn_implementation": None},
        {"use_kernels": False},
        {"auto_map": {}},
        {"auto_map": {"AutoConfig": "configuration_phi.PhiConfig"}},
        {"_name_or_path": "org/repo"},
    ],
)
def test_what_ordinary_configurations_say_passes(fields: dict[str, Any]) -> None:
    assert foreign_config(fields) is None


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"auto_map": {"AutoTokenizer": ["tokenization.X", None]}}, "auto_map"),
        ({"auto_map": ["tokenization.X", None]}, "auto_map"),
        ({"fast_tokenizer_files": ["tokenizer.9.json"]}, "fast_tokenizer_files"),
        ({"merges_file": "/dev/zero"}, "merges_file"),
        ({"vocab_file": "../other/vocab.txt"}, "vocab_file"),
        ({"init_inputs": ["/etc/passwd"]}, "init_inputs"),
    ],
)
def test_a_tokenizer_that_asks_for_others_code_or_files_is_refused(
    fields: dict[str, Any], field: str
) -> None:
    assert (foreign_tokenizer(fields) or "").startswith(f"{field}: ")


def test_paths_that_a_tokenizer_kept_from_where_it_was_saved_pass() -> None:
    saved = "/home/somebody/.cache/huggingface/abc"
    assert (
        foreign_tokenizer(
            {
                "special_tokens_map_file": saved,
                "tokenizer_file": saved,
                "name_or_path": "org/repo",
                "vocab_file": "vocab.txt",
                "init_inputs": [],
            }
        )
        is None
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=5) | st.sampled_from(["auto_map", "x_implementation"]), inner, max_size=3
        )
    ),
    max_leaves=10,
)


@given(
    st.dictionaries(
        st.text(max_size=5) | st.sampled_from(["auto_map", "text_config", "use_kernels", *NUMBERS]),
        JSON,
        max_size=5,
    )
)
def test_no_configuration_makes_the_checks_raise(config: dict[str, Any]) -> None:
    for check in (foreign_config, foreign_tokenizer, too_large):
        found = check(config)
        assert found is None or ": " in found


# -- panics ------------------------------------------------------------------------------------------------------------


class PanicException(BaseException):
    """Named as pyo3's, which no library exports."""


def test_a_panic_becomes_an_ordinary_error_and_nothing_else_changes() -> None:
    with pytest.raises(Panic, match=r"^index out of bounds$"), panics_caught():
        raise PanicException("index out of bounds\nnote: run with RUST_BACKTRACE=1")
    for error in (KeyError("x"), KeyboardInterrupt(), GeneratorExit()):
        with pytest.raises(type(error)), panics_caught():
            raise error
