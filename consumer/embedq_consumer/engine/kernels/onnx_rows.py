"""A BERT for rows of few tokens, run by ONNX Runtime where it is installed (the extra `cpu`).

For few tokens a product waits for its weights: ONNX Runtime's are laid out as they are read, which PyTorch's are not, and
its graph has a quarter of the steps. For many tokens PyTorch is ahead. Nothing here calls an operator of PyTorch's: the smallest norm
would wake its threads, which takes longer than the work where a text comes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Final, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedq_consumer.engine.kernels.attention import LengthRun

__all__ = ["Embeddings", "Layer", "OnnxBert"]

Pair = tuple[Tensor, Tensor]
"""Weight and bias."""
_OURS: Final = "com.microsoft"
"""The domain of ONNX Runtime's fused operators."""
_OPSET: Final = 17
_UNSEEN: Final = -1e9
"""Added to the score of two tokens of different texts: after the softmax nothing is left of it, exactly."""


class Layer(Protocol):
    """One layer's weights (out, in) and biases, those of query, key and value one below the other."""

    @property
    def qkv(self) -> Pair: ...
    @property
    def o_proj(self) -> Pair: ...
    @property
    def attention_norm(self) -> Pair: ...
    @property
    def up(self) -> Pair: ...
    @property
    def down(self) -> Pair: ...
    @property
    def norm(self) -> Pair: ...


class Embeddings(msgspec.Struct, frozen=True, kw_only=True):
    """What stands before the layers: tables (entries, hidden), whose rows are added up, and the norm of the sum."""

    words: Tensor
    positions: Tensor
    norm: Pair


class OnnxBert:
    """All layers as one graph of ONNX Runtime, with its own copy of their weights; as many threads as PyTorch has. The tables are
    shared with the model.

    Raises:
        ImportError: onnx or ONNX Runtime is not installed.
        Exception: of ONNX Runtime's own kinds, where it cannot run the graph.
    """

    def __init__(self, embeddings: Embeddings, layers: Sequence[Layer], heads: int, eps: float) -> None:
        self._words = embeddings.words.numpy()
        self._positions = embeddings.positions.numpy()
        runtime: Any = import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors, which are raised as well
        # Its threads would turn in circles for a while after each text, on cores that others need.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self._session: Any = runtime.InferenceSession(
            _model(embeddings.norm, layers, heads, eps), options, providers=["CPUExecutionProvider"]
        )

    def __call__(
        self,
        ids: Tensor,
        positions: Tensor,
        runs: Sequence[LengthRun],
        bias: Callable[[int], Tensor] | None = None,
    ) -> Tensor:
        """Last hidden states (tokens, hidden), float32, of int64 `ids` and `positions` (tokens,); `bias` as in `attend_runs`."""
        if len(runs) == 1:
            texts, length = runs[0].count, runs[0].length
            scores = _scores(length) if bias is None else bias(length)[None].numpy()
        else:
            texts, length = 1, len(ids)
            scores = _apart(runs, length, bias)
        inputs = {
            "words": self._words.take(ids.numpy().reshape(texts, length), axis=0),
            "positions": self._positions.take(positions.numpy().reshape(texts, length), axis=0),
            "scores": scores,
        }
        (found,) = self._session.run(["y"], inputs)
        return torch.from_numpy(found.reshape(len(ids), -1))


def _scores(tokens: int, heads: int = 1, value: float = 0.0) -> npt.NDArray[np.float32]:
    return np.full((1, heads, tokens, tokens), value, dtype=np.float32)


def _apart(
    runs: Sequence[LengthRun], tokens: int, bias: Callable[[int], Tensor] | None
) -> npt.NDArray[np.float32]:
    """What keeps the texts of a row apart, and the bias within each: (1, heads or 1, tokens, tokens)."""
    own = [None if bias is None else bias(run.length).numpy() for run in runs]
    scores = _scores(tokens, 1 if own[0] is None else len(own[0]), _UNSEEN)
    for run, its in zip(runs, own, strict=True):
        for begin in range(run.begin, run.end, run.length):
            end = begin + run.length
            scores[0, :, begin:end, begin:end] = 0.0 if its is None else its
    return scores


def _model(norm: Pair, layers: Sequence[Layer], heads: int, eps: float) -> bytes:
    """The graph from `words` and `positions` (texts, tokens, hidden) and `scores`, which are added to attention's, to `y`."""
    onnx: Any = import_module("onnx")
    make, array = onnx.helper, onnx.numpy_helper.from_array
    hidden = layers[0].o_proj[1].shape[0]
    nodes: list[Any] = []
    weights: list[Any] = []

    def weight(tensor: Tensor) -> str:
        weights.append(array(np.ascontiguousarray(tensor.numpy()), f"w{len(weights)}"))
        name: str = weights[-1].name
        return name

    def node(kind: str, inputs: Sequence[str], domain: str = _OURS, **attributes: Any) -> str:
        name = f"n{len(nodes)}"
        nodes.append(make.make_node(kind, inputs, [name], domain=domain, **attributes))
        return name

    def product(x: str, weights: Tensor) -> str:
        return node("MatMul", [x, weight(weights.t())], domain="")

    def added(x: str, y: str, norm: Pair, *bias: Tensor) -> str:
        inputs = [x, y, *map(weight, (*norm, *bias))]
        return node("SkipLayerNormalization", inputs, epsilon=eps)

    x = added("words", "positions", norm)
    for layer in layers:
        qkv = [weight(layer.qkv[0].t()), weight(layer.qkv[1])]
        attended = node("Attention", [x, *qkv, "", "", "scores"], num_heads=heads)
        x = added(product(attended, layer.o_proj[0]), x, layer.attention_norm, layer.o_proj[1])
        wide = node("BiasGelu", [product(x, layer.up[0]), weight(layer.up[1])])
        x = added(product(wide, layer.down[0]), x, layer.norm, layer.down[1])
    nodes[-1].output[0] = "y"
    number = onnx.TensorProto.FLOAT
    states = ["texts", "tokens", hidden]
    graph = make.make_graph(
        nodes,
        "bert",
        [
            *(make.make_tensor_value_info(name, number, states) for name in ("words", "positions")),
            make.make_tensor_value_info("scores", number, [1, None, "tokens", "tokens"]),
        ],
        [make.make_tensor_value_info("y", number, states)],
        weights,
    )
    opsets = [make.make_opsetid("", _OPSET), make.make_opsetid(_OURS, 1)]
    # ONNX Runtime may be older than onnx, and reads what is older than itself.
    model: Any = make.make_model(graph, opset_imports=opsets, ir_version=8)
    written: bytes = model.SerializeToString()
    return written
