"""A BERT's layers for rows of few tokens, run by ONNX Runtime where it is installed (the extra `cpu`).

For few tokens a product waits for its weights: ONNX Runtime's are laid out as they are read, which PyTorch's are not, and
its graph has a quarter of the steps. For many tokens PyTorch is ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedq_consumer.engine.kernels.attention import LengthRun

__all__ = ["Layer", "OnnxLayers"]

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


class OnnxLayers:
    """All layers as one graph of ONNX Runtime, with its own copy of the weights; as many threads as PyTorch has.

    Raises:
        ImportError: onnx or ONNX Runtime is not installed.
        Exception: of ONNX Runtime's own kinds, where it cannot run the graph.
    """

    def __init__(self, layers: Sequence[Layer], heads: int, eps: float) -> None:
        runtime: Any = import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors, which are raised as well
        # Its threads would turn in circles for a while after each text, on cores that others need.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self._session: Any = runtime.InferenceSession(
            _model(layers, heads, eps), options, providers=["CPUExecutionProvider"]
        )

    def __call__(
        self, x: Tensor, runs: Sequence[LengthRun], bias: Callable[[int], Tensor] | None = None
    ) -> Tensor:
        """Hidden states after the last layer of `x`, both (tokens, hidden) and float32; `bias` as in `attend_runs`."""
        if len(runs) == 1:
            texts, length = runs[0].count, runs[0].length
            scores = _scores(length) if bias is None else bias(length)[None].numpy()
        else:
            texts, length = 1, len(x)
            scores = _apart(runs, length, bias)
        (found,) = self._session.run(["y"], {"x": x.view(texts, length, -1).numpy(), "scores": scores})
        return torch.from_numpy(found).view(x.shape)


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


def _model(layers: Sequence[Layer], heads: int, eps: float) -> bytes:
    """The graph from `x` (texts, tokens, hidden) and `scores`, which are added to attention's, to `y`."""
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

    def added(x: str, y: str, bias: Tensor, norm: Pair) -> str:
        inputs = [x, y, *map(weight, norm), weight(bias)]
        return node("SkipLayerNormalization", inputs, epsilon=eps)

    x = "x"
    for layer in layers:
        qkv = [weight(layer.qkv[0].t()), weight(layer.qkv[1])]
        attended = node("Attention", [x, *qkv, "", "", "scores"], num_heads=heads)
        x = added(product(attended, layer.o_proj[0]), x, layer.o_proj[1], layer.attention_norm)
        wide = node("BiasGelu", [product(x, layer.up[0]), weight(layer.up[1])])
        x = added(product(wide, layer.down[0]), x, layer.down[1], layer.norm)
    nodes[-1].output[0] = "y"
    number = onnx.TensorProto.FLOAT
    states = ["texts", "tokens", hidden]
    graph = make.make_graph(
        nodes,
        "layers",
        [
            make.make_tensor_value_info("x", number, states),
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
