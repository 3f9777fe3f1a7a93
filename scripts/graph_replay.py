"""Run the graphs that Ascend would get, in torch on a CPU, and compare an edit's every stage with the reference.

    python scripts/graph_replay.py                       # the golden files, in float32, float16 and bfloat16
    python scripts/graph_replay.py --dtype float16 tests/golden/demo-ddim.safetensors
    python scripts/graph_replay.py --write               # and puts the table into docs/devices.md

MindSpore writes a graph for Ascend as a MindIR with its casts, constants and weights, without the device (see
device_stand_ins.py and device_graphs.py). Here every node is computed as its documentation defines it: in float32, then
rounded to the dtype that the graph gives its result. What is compared is the graph; the device's kernels, which round
elsewhere and sum in another order, are not. The exit code is 1 where an error is above its limit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import audit_devices
import device_stand_ins
import mindspore as ms
import numpy as np
import torch
import torch.nn.functional as F
from device_graphs import place_of
from mindspore.train.mind_ir_pb2 import AttributeProto, ModelProto, TensorProto
from PIL import Image
from reports import ROOT, markdown_table

from mindiffedit import demo
from mindiffedit.parity import golden, replay
from mindiffedit.parity.case import Case
from mindiffedit.runtime import launches
from mindiffedit.runtime.graphs import Graphs

DTYPES = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.BOOL: torch.bool,
}
HALVES = (torch.float16, torch.bfloat16)


# --- a MindIR -----------------------------------------------------------------------------------------------------


def read(path: Path) -> ModelProto:
    model = ModelProto()
    model.ParseFromString(Path(path).read_bytes())
    return model


class Replay:
    """A graph as a function of tensors.

    Args:
        model: a MindIR.

    Raises:
        NotImplementedError: a primitive that is not in ``PRIMITIVES``.
    """

    def __init__(self, model: ModelProto):
        self.graph = model.graph
        self.weights = {parameter.name: _tensor(parameter) for parameter in self.graph.parameter}
        unknown = {_primitive(node) for node in self.graph.node} - PRIMITIVES.keys() - {"Constant"}
        if unknown:
            raise NotImplementedError(f"primitives that are not known here: {', '.join(sorted(unknown))}")

    @torch.no_grad()
    def __call__(self, *arguments: torch.Tensor):
        """The graph's result, a tensor or a tuple of them; arguments are rounded to the dtypes that it takes."""
        values: dict[str, Any] = {"": None, **self.weights}
        for place, argument in zip(self.graph.input, arguments, strict=True):
            values[place.name] = argument.to(DTYPES[place.tensor[0].data_type])
        for node in self.graph.node:
            attributes = {attribute.name: attribute for attribute in node.attribute}
            name = _primitive(node)
            if name == "Constant":
                values[node.output[0]] = _constant(attributes["value"])
                continue
            inputs = [values.get(one) for one in node.input]
            if name != "FlashAttentionScore":  # multiplies in the dtype that it is given
                inputs = [_widened(value) for value in inputs]
            values[node.output[0]] = _rounded(PRIMITIVES[name](*inputs), attributes.get("shape"))
        results = tuple(values[one.name] for one in self.graph.output)
        return results[0] if len(results) == 1 else results


def _primitive(node) -> str:
    """ "REF::PrimFunc:Add:1" and the like are an Add."""
    return node.op_type.split(":")[2] if ":" in node.op_type else node.op_type


def _tensor(proto) -> torch.Tensor:
    """The tensor that a proto holds; one without values is of one number, 0."""
    dtype = DTYPES[proto.data_type]
    flat = torch.frombuffer(bytearray(proto.raw_data), dtype=dtype) if proto.raw_data else torch.zeros(1, dtype=dtype)
    return flat.reshape(tuple(proto.dims))


KINDS = AttributeProto
REALS = (KINDS.FLOAT, KINDS.DOUBLE)
WHOLES = (KINDS.BOOL, *(getattr(KINDS, f"{sign}INT{bits}") for sign in ("", "U") for bits in (8, 16, 32, 64)))


def _constant(attribute):
    """The Python value of a constant; None for what has none here, such as a dtype."""
    kind = attribute.type
    if kind in (KINDS.TUPLE, KINDS.LIST):
        return tuple(_constant(value) for value in attribute.values)
    if kind in (KINDS.TENSORS, KINDS.TENSOR):
        return _tensor(attribute.tensors[0])
    if kind in REALS:
        return next(iter([*attribute.floats, *attribute.doubles]), attribute.f or attribute.d)
    if kind in WHOLES:
        return next(iter(attribute.ints), attribute.i)
    if kind == KINDS.STRING:
        return (attribute.strings[0] if attribute.strings else attribute.s).decode()
    return None


def _widened(value):
    if torch.is_tensor(value):
        return value.float() if value.dtype in HALVES else value
    return tuple(map(_widened, value)) if isinstance(value, tuple) else value


def _rounded(value, attribute):
    """A node's result in the dtype that the graph says it has."""
    if torch.is_tensor(value) and attribute is not None and attribute.tensors:
        return value.to(DTYPES[attribute.tensors[0].data_type])
    if isinstance(value, tuple) and attribute is not None and attribute.values:
        return tuple(_rounded(one, inner) for one, inner in zip(value, attribute.values))
    return value


# --- primitives, each of the arguments that a MindIR gives it -----------------------------------------------------


def _number(value) -> torch.Tensor:
    return value if torch.is_tensor(value) else torch.tensor(value)


def _attention(query, key, value, *others):
    """FlashAttentionScore in layout BSH; its fourth result is the attention's."""
    heads, keep, scale = others[7], others[8], others[9]
    if keep != 1 or query.ndim != 3 or any(one is not None for one in others[:4]):
        raise NotImplementedError(f"FlashAttentionScore of {query.shape}, {heads} heads, {keep=}")
    query, key, value = (x.float().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    output = torch.softmax(query @ key.transpose(-1, -2) * scale, -1) @ value
    return None, None, None, output.transpose(1, 2).flatten(2)


def _strided_slice(x, begin, end, stride, begin_mask, end_mask, ellipsis, new_axes, shrink):
    if ellipsis or new_axes:
        raise NotImplementedError("StridedSlice with an ellipsis or new axes")
    index: list = []
    for axis, (start, stop, step) in enumerate(zip(begin, end, stride)):
        if shrink >> axis & 1:
            index.append(start)
        else:
            bounds = (None if mask >> axis & 1 else bound for mask, bound in ((begin_mask, start), (end_mask, stop)))
            index.append(slice(*bounds, step))
    return x[tuple(index)]


def _interpolated(x, size, scale):
    return F.interpolate(x, size=size or None, scale_factor=None if size else scale)


def _product(a, b, transpose_a=False, transpose_b=False):
    return (a.transpose(-1, -2) if transpose_a else a) @ (b.transpose(-1, -2) if transpose_b else b)


def _biased(x, bias, *_):
    return x + bias.reshape(-1, *[1] * (x.ndim - 2))


def _gathered(table, indices, axis, *_):
    return table.index_select(axis, indices.reshape(-1)).reshape(
        *table.shape[:axis], *indices.shape, *table.shape[axis + 1 :]
    )


def _layer_norm(x, weight, bias, axis, _, eps):
    return F.layer_norm(x, x.shape[axis:], weight, bias, eps), None, None


def _softmax(x, axes, *_):
    return torch.softmax(x, axes[0] if isinstance(axes, tuple) else axes)


PRIMITIVES: dict[str, Callable] = {
    # What orders others
    "Depend": lambda x, _: x,
    "Load": lambda x, _: x,
    "UpdateState": lambda *_: None,
    "MakeTuple": lambda *values: values,
    "TupleGetItem": lambda values, index: values[index],
    # Shapes
    "Cast": lambda x, _: _number(x),
    "Chunk": lambda x, count, axis: x.chunk(count, axis),
    "Concat": lambda tensors, axis: torch.cat(tensors, axis),
    "Contiguous": lambda x: x,
    "ConstantPadND": lambda x, sizes, value: F.pad(x, sizes, value=value),
    "ExpandDims": lambda x, axis: x.unsqueeze(axis),
    "Gather": _gathered,
    "Range": lambda start, end, step, *_: torch.arange(start, end, step),
    "Reshape": lambda x, shape: x.reshape(shape),
    "SplitTensor": lambda x, size, axis, *_: x.split(size, axis),
    "StridedSlice": _strided_slice,
    "Tile": lambda x, counts: x.tile(counts),
    "Transpose": lambda x, axes: x.permute(axes),
    # Arithmetic
    "Add": lambda a, b: _number(a) + _number(b),
    "BatchMatMul": _product,
    "BatchMatMulExt": _product,
    "ClampScalar": lambda x, least, most: x.clamp(least, most),
    "Cos": torch.cos,
    "Div": lambda a, b: _number(a) / _number(b),
    "Less": lambda a, b: _number(a) < _number(b),
    "MaskedFill": lambda x, mask, value: torch.where(mask, _number(value).to(x.dtype), x),
    "MatMul": _product,
    "MatMulExt": _product,
    "Mul": lambda a, b: _number(a) * _number(b),
    "Muls": lambda a, b: a * b,
    "Sin": torch.sin,
    "Sub": lambda a, b: _number(a) - _number(b),
    # Layers
    "BiasAdd": _biased,
    "Conv2DExt": F.conv2d,
    "Dense": F.linear,
    "Embedding": lambda ids, table, *_: F.embedding(ids, table),
    "FlashAttentionScore": _attention,
    "GeluExt": lambda x, _: F.gelu(x),
    "GroupNorm": lambda x, groups, weight, bias, eps: (F.group_norm(x, groups, weight, bias, eps),),
    "LayerNorm": _layer_norm,
    "LayerNormExt": lambda x, shape, weight, bias, eps: (F.layer_norm(x, shape, weight, bias, eps),),
    "SiLU": F.silu,
    "Sigmoid": torch.sigmoid,
    "Softmax": _softmax,
    "UpsampleNearest2D": _interpolated,
}


# --- an edit whose graphs are replayed ----------------------------------------------------------------------------


class ReplayedGraphs(Graphs):
    """Runs what device_graphs.py has exported to a folder, in the place of what is compiled here.

    Args:
        folder: with the files and index.json.
        defect: of ``DEFECTS``, or None.
    """

    def __init__(self, folder: Path, defect: str | None = None):
        super().__init__()
        index = json.loads((folder / "index.json").read_text())
        models = {place: read(folder / file) for place, file in index.items()}
        if defect is not None:
            stage, change = DEFECTS[defect]
            for place in (place for place in models if place.startswith(stage)):
                change(models[place])
        self.replays = {place: Replay(model) for place, model in models.items()}

    def compiled(self, function: Callable, key, model: Any = None) -> Callable:
        def run(*arguments):
            result = self.replays[place_of(key, arguments)](*(torch.from_numpy(one.asnumpy()) for one in arguments))
            if isinstance(result, tuple):
                return tuple(ms.Tensor(one.float().numpy()) for one in result)
            return ms.Tensor(result.float().numpy())

        return run


@contextlib.contextmanager
def computed_apart():
    """What Ascend computes before a loop is computed before it here."""
    before = launches.computes_apart
    launches.computes_apart = lambda: True
    try:
        yield
    finally:
        launches.computes_apart = before


def export(environment: dict[str, str], work: Path, dtype: str, checkpoint: Path, path: Path | None = None) -> Path:
    """Exports the graphs of a golden file's case, or of a small edit by `device_graphs`; returns their folder."""
    folder = work / "graphs"
    folder.mkdir(parents=True)
    wanted = {"target": "Ascend", "dtype": dtype, "checkpoint": str(checkpoint), "export": str(folder.resolve())}
    wanted |= {"size": 64} if path is None else {"case": str(path.resolve())}
    _, ended = audit_devices.run_dry(environment, work, wanted)
    if ended is not None:
        raise RuntimeError(f"exporting the graphs in {dtype}: {ended}")
    return folder


def replayed(graphs: Graphs, path: Path, checkpoint: Path, isolate: bool) -> dict[str, np.ndarray]:
    """The trace of a golden file's case by these graphs; ``isolate`` as for `replay.run`."""
    recording = golden.read_golden(path)
    images = [Image.fromarray(pixels) for pixels in recording.inputs["picture"]]
    case = Case(image=images if len(images) > 1 else images[0], **recording.manifest["calls"])
    pipe = replay.load(checkpoint, case, "graph", compile_cache=False)
    pipe._stages.graphs = graphs
    with computed_apart():
        return replay.run(pipe, case, recording.trace, isolate=isolate)


# --- planted defects ----------------------------------------------------------------------------------------------


def wrong_scale(model: ModelProto) -> None:
    """The scores of attention are twice as large."""
    nodes = model.graph.node
    constants = {node.output[0]: node.attribute[0] for node in nodes if _primitive(node) == "Constant"}
    products = {node.output[0] for node in nodes if _primitive(node).startswith("BatchMatMul")}
    changed = set()
    for node in nodes:
        fused = _primitive(node) == "FlashAttentionScore"
        scaled = _primitive(node) in ("Mul", "Muls") and products & set(node.input)
        for name in node.input if fused or scaled else ():
            value = constants.get(name)
            if value is not None and value.type in REALS and _constant(value) != 1 and name not in changed:
                changed.add(name)
                _set_number(value, _constant(value) * 2)
    if not changed:
        raise LookupError("no attention in this graph")


def missing_cast(model: ModelProto) -> None:
    """The products of a step are in half precision."""
    products = [node for node in model.graph.node if _primitive(node) == "Mul"]
    for node in products:
        given = next(attribute for attribute in node.attribute if attribute.name == "shape")
        given.tensors[0].data_type = TensorProto.FLOAT16
    if not products:
        raise LookupError("no product in this graph")


DEFECTS = {"a wrong scale": ("unet ", wrong_scale), "a missing cast": ("update ", missing_cast)}
"""What is planted, and into the graphs of which stage."""


def _set_number(attribute, value: float) -> None:
    for field in (attribute.floats, attribute.doubles):
        if field:
            field[0] = value
            return
    if attribute.type == KINDS.DOUBLE:
        attribute.d = value
    else:
        attribute.f = value


# --- errors -------------------------------------------------------------------------------------------------------

STAGES = ("embeds", "moments", "predictions", "map", "mask", "inverted_latents", "edited_latents", "decoded")
"""What is shown and judged; `_stage_of` says of which tensors of a trace."""

LIMITS: dict[tuple[str, bool], tuple[float, ...]] = {
    ("float32", True): (1e-6, 1e-6, 4e-6, 1e-6, 0, 1e-6, 1e-6, 1e-6),
    ("float32", False): (1e-6, 1e-6, 5e-5, 5e-6, 0.002, 1e-5, 4e-5, 2e-5),
    ("float16", True): (1.5e-3, 1e-3, 1.5e-2, 1e-6, 0, 1e-6, 1e-6, 1e-3),
    ("float16", False): (1.5e-3, 1e-3, 4e-2, 1e-2, 0.01, 1e-2, 2.5e-2, 1.5e-2),
    ("bfloat16", True): (1.2e-2, 8e-3, 6e-2, 1e-6, 0, 1e-6, 1e-6, 8e-3),
    ("bfloat16", False): (1.2e-2, 8e-3, 3e-1, 7e-2, 0.02, 8e-2, 1e-1, 4e-2),
}
"""The largest errors of these stages, by dtype and whether each stage runs alone: about three times what was measured.

What is float32 in every dtype, the map and the solver's steps, is as exact in all of them where it runs alone. The
UNet alone in bfloat16 has half as much again, so that an attention of twice the scale, 6.9e-2, is not within it.
"""


def errors_of(trace: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> dict[str, float]:
    """By name in ``STAGES``, the largest error of these tensors, of all steps together where there are steps.

    An error is the rms of the difference as a share of the reference's rms; of a mask, the share of pixels that differ.
    What is missing, of another shape or not finite is infinitely far off.
    """
    errors: dict[str, float] = {}
    for name, expected in reference.items():
        stage, got = _stage_of(name), trace.get(name)
        if stage is None:
            continue
        if got is None or got.shape != expected.shape or not np.isfinite(got).all():
            error = math.inf
        elif stage == "mask":
            error = float(np.mean(got != expected))
        else:
            difference, size = np.asarray(got, np.float64) - expected, np.square(expected, dtype=np.float64)
            error = float(np.sqrt(np.mean(difference**2) / np.mean(size)))
        errors[stage] = max(errors.get(stage, 0.0), error)
    return {stage: errors[stage] for stage in STAGES if stage in errors}


def _stage_of(name: str) -> str | None:
    last = name.rpartition("/")[2]
    if last.endswith("prompt_embeds"):
        return "embeds"
    last = {"noise_predictions": "predictions"}.get(last, last)
    return last if last in STAGES else None


def faults_of(dtype: str, alone: bool, errors: Mapping[str, float]) -> list[str]:
    """Which errors are above their limits, a sentence each."""
    limits = dict(zip(STAGES, LIMITS[dtype, alone]))
    return [
        f"{dtype}, {stage}: {error:.1e}, at most {limits[stage]:.1e} expected"
        for stage, error in errors.items()
        if not error <= limits[stage]
    ]


# --- the command --------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("golden", nargs="*", type=Path, help="golden files of the demo model (default: tests/golden)")
    parser.add_argument("--dtype", choices=audit_devices.DTYPES["Ascend"], help="default: all")
    parser.add_argument("--write", action="store_true", help="write the table to docs/devices.md")
    options = parser.parse_args()
    files = options.golden or sorted((ROOT / "tests/golden").glob("demo-*.safetensors"))
    checkpoint = Path(demo.__file__).parent / "checkpoint"
    rows, faults = [], []
    with tempfile.TemporaryDirectory() as temporary:
        environment = device_stand_ins.build("Ascend", Path(temporary) / "stand-ins")
        for path in files:
            for dtype in [options.dtype] if options.dtype else audit_devices.DTYPES["Ascend"]:
                folder = export(environment, Path(temporary) / f"{path.stem}-{dtype}", dtype, checkpoint, path)
                lines, wrong = compared(folder, path, dtype, checkpoint)
                rows += lines
                faults += wrong
    print("\n".join(f"FAULT {fault}" for fault in faults) or "no faults")
    if options.write and not faults:
        write_table(rows)
    return 1 if faults else 0


def compared(folder: Path, path: Path, dtype: str, checkpoint: Path) -> tuple[list[list[str]], list[str]]:
    """Rows of the table for a golden file in a dtype, and what is wrong, planted defects that pass among it."""
    reference = golden.read_golden(path).trace
    rows, faults = [], []
    for defect in (None, *DEFECTS):
        graphs = ReplayedGraphs(folder, defect)
        for alone in (True, False) if defect is None else (True,):
            errors = errors_of(replayed(graphs, path, checkpoint, alone), reference)
            row = [path.stem, dtype, "alone" if alone else "in a row", *map(number, errors.values())]
            print(*row, f"planted: {defect}" if defect else "", flush=True)
            wrong = faults_of(dtype, alone, errors)
            if defect is None:
                rows.append(row)
                faults += wrong
            elif not wrong:
                faults.append(f"{path.stem}, {dtype}, planted: {defect}: passes")
    return rows, faults


def write_table(rows: list[list[str]]) -> None:
    header = ["golden file", "dtype", "stages", *(stage.replace("_", " ") for stage in STAGES)]
    audit_devices.write_blocks({"device_replay": markdown_table([header, *rows])})


def number(error: float) -> str:
    return "0" if error == 0 else f"{error:.1e}"


if __name__ == "__main__":
    sys.exit(main())
