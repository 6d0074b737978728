"""Networks as ONNX: a file for each size, or one for all, with the weights in it once."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipelines.utils.atomic_io import atomic_write
from pipelines.utils.errors import UsageError
from rsnet import __version__

FORMAT, SUFFIX = "onnx", ".onnx"


def require() -> None:
    """Raise UsageError if a library that ONNX needs is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f'--format onnx: {error.name} is not installed: pip install "rsnet-trainer[onnx]"'
        ) from None


def write(path: Path, network: nn.Module, size: int, about: Mapping[str, Any]) -> None:
    """Write one size: `images`, float32 (N, 3, size, size), to `logits`, (N, classes). about: metadata."""
    save(path, _traced(network, size), about)


def write_all(path: Path, networks: Mapping[int, nn.Module], about: Mapping[str, Any]) -> None:
    """Write all sizes: `images`, float32 (N, 3, s, s), and `size`, an int64 scalar, which is s, to `logits`.

    Values that several networks have are in the file once. Another size is an error when it is run.
    """
    models = {s: _traced(network, s) for s, network in networks.items()}
    save(path, _switched(models), about)


def load(path: Path) -> Callable[[Tensor, int], Tensor]:
    """Return a function, (images, size) -> logits, that runs a file by ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(
        path.read_bytes(), options, providers=["CPUExecutionProvider"]
    )
    names = {value.name for value in session.get_inputs()}

    def run(images: Tensor, size: int) -> Tensor:
        inputs: dict[str, NDArray[Any]] = {"images": images.numpy(), "size": np.array(size)}
        (result,) = session.run(None, {k: v for k, v in inputs.items() if k in names})
        return torch.from_numpy(result)

    return run


def _traced(network: nn.Module, size: int) -> Any:
    """Return the onnx.ModelProto of a network, without the paths of files that it was traced from."""
    import onnxscript.optimizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network, (torch.zeros(2, 3, size, size),), dynamo=True, optimize=False, verbose=False,
            input_names=["images"], output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("N")},),
        )  # fmt: skip
    assert program is not None
    # Not all of the optimizer: that gives each BatchNorm, which one file for all keeps, weights of its own.
    onnxscript.optimizer.fold_constants(program.model)
    onnxscript.optimizer.remove_unused_nodes(program.model)
    model = program.model_proto
    graph = model.graph
    del graph.value_info[:], graph.metadata_props[:]
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
    return model


def _switched(models: Mapping[int, Any]) -> Any:
    """Merge models, {size: model}, into one: a chain of If over `size`."""
    from onnx import TensorProto, compose, helper

    sizes = list(models)
    shared: dict[bytes, Any] = {}  # by the value without its name
    graphs = []
    for size, model in models.items():
        graph = compose.add_prefix(model, f"{size}/").graph
        names = {value.name: "images" for value in graph.input}
        for value in graph.initializer:
            name, value.name = value.name, ""
            known = shared.setdefault(value.SerializeToString(), value)
            known.name = known.name or name
            names[name] = known.name
        for node in graph.node:
            node.input[:] = [names.get(name, name) for name in node.input]
        graphs.append(helper.make_graph(graph.node, f"size {size}", [], graph.output))
    for i in reversed(range(len(sizes) - 1)):
        out = helper.make_tensor_value_info(f"logits of {i}", TensorProto.FLOAT, None)
        choice = helper.make_node(
            "If", [f"is {i}"], [out.name], then_branch=graphs[i], else_branch=graphs[i + 1]
        )
        graphs[i] = helper.make_graph([choice], f"sizes from {sizes[i]}", [], [out])
    return _with_inputs(graphs[0], sizes, shared.values(), next(iter(models.values())))


def _with_inputs(graph: Any, sizes: list[int], values: Iterable[Any], like: Any) -> Any:
    """Return the model of `graph`, which reads `images`, the shared values, and booleans `is 0`, ..."""
    from onnx import TensorProto, helper

    numbers = range(len(sizes))
    constants = [
        helper.make_tensor("sizes", TensorProto.INT64, [len(sizes)], sizes),
        helper.make_tensor("of a scalar", TensorProto.INT64, [0], []),
        *(helper.make_tensor(f"number {i}", TensorProto.INT64, [], [i]) for i in numbers),
    ]
    nodes = [
        helper.make_node("Equal", ["sizes", "size"], ["is there"]),
        helper.make_node("NonZero", ["is there"], ["where"]),
        # An empty tensor cannot become a scalar: this node fails for a size that is not there.
        helper.make_node("Reshape", ["where", "of a scalar"], ["number"]),
        *(helper.make_node("Equal", ["number", f"number {i}"], [f"is {i}"]) for i in numbers),
        *graph.node,
        helper.make_node("Identity", [graph.output[0].name], ["logits"]),
    ]
    classes = like.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    ends = [
        helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 3, "height", "width"]),
        helper.make_tensor_value_info("size", TensorProto.INT64, []),
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", classes]),
    ]
    whole = helper.make_graph(nodes, "sizes", ends[:2], ends[2:], [*values, *constants])
    opsets, version = like.opset_import, like.ir_version
    return helper.make_model(whole, opset_imports=opsets, ir_version=version)


def save(path: Path, model: Any, about: Mapping[str, Any]) -> None:
    """Write an onnx.ModelProto, checked, with `about` as its metadata."""
    import onnx

    model.producer_name, model.producer_version = "rsnet", __version__
    del model.metadata_props[:]  # of the quantization
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in about.items()})
    onnx.checker.check_model(model)
    atomic_write(path, model.SerializeToString())
