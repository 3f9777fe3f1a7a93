"""What a device's compiler made of our graphs: nodes, kernels, launches; and what in it is a fault.

A report, as audit_devices.py makes it, is a dict that JSON can hold:

- target, dtype, model, size: of what;
- graphs: for each its name, error (None or the compiler's sentence), seconds (of compiling and running it), memory
  (bytes that MindSpore planned at most while it ran), nodes ([primitive, dtypes in, dtypes out, count]), moved
  (primitives that went to the CPU) and kernels ({primitive: kinds of kernels}, Ascend only);
- scenarios: for each its name, the numbers of graphs expected and compiled, and an error or None;
- eager: kernels of what ran operator by operator, likewise;
- missing: names that `mindiffedit.runtime.kernels` replaced;
- ended: None, or how the process ended before it was through.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

HEADING = "=== graph: "
"""Begins the line in MindSpore's log after which a graph is compiled; its name follows."""

EAGER = "operators between the graphs"
"""The name of what runs operator by operator."""

NOTHING = ("noise epsilon False ",)
"""How the names of graphs begin that give an argument back, of which MindSpore makes none."""

NOT_RUN = {"Depend", "Load", "MakeList", "MakeTuple", "Return", "TupleGetItem", "UpdateState"}
"""Nodes that order others, and run nothing."""

VIEWS = {"ExpandDims", "Flatten", "Reshape", "Squeeze"}
"""Nodes that give memory another shape, and launch nothing."""

NAMED = {
    "Assign": "a LoRA that is written into the weights",
    "BiasAdd": "a convolution's or dense layer's bias in CLIP, of MindSpore's own layers",
    "Gather": "CLIP's tables of tokens and positions (MindSpore's nn.Embedding)",
    "LayerNorm": "CLIP's norms (MindSpore's nn.LayerNorm)",
    "Range": "positions of tokens, once for a text",
    "ReduceMean": "T5's norm",
    "Stack": "pictures and texts side by side",
    "StandardNormal": "first values of a model, in whose place its file's come",
    "StridedSlice": "one of a solver's five coefficients, or one half of a guided prediction",
    "TensorScatterUpdate": "keys and values of one more token, in the memory of T5 and BLIP",
}
"""Operators without an aclnn kernel, which CANN's older library is asked for by name, and where we use them."""

KINDS = {"opapi_kernel", "acl_kernel", "rt_kernel"}
"""Kinds of kernels on Ascend: aclnn, by name of CANN's library, nothing that runs."""

HALVES = {"Float16", "BFloat16"}


# --- reading ------------------------------------------------------------------------------------------------------


def nodes_of(files: Iterable[Path]) -> Counter[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """How often each (primitive, dtypes in, dtypes out) is in the graphs that MindSpore wrote to these files."""
    return Counter(node for file in files for node in _nodes(file.read_text(errors="replace").splitlines()))


def _nodes(lines: list[str]) -> Iterator[tuple]:
    for number, line in enumerate(lines):
        found = re.match(r"\s*%\d+\([^)]*\) = ([\w.]+)\(", line)
        if found:
            types = next((text for text in lines[number + 1 : number + 3] if re.match(r"\s*: \(", text)), "")
            inputs, _, outputs = types.partition("->")
            dtypes = (tuple(re.findall(r"Tensor\[(\w+)\]", side)) for side in (inputs, outputs))
            primitive = found[1].removeprefix("PrimFunc_")
            if primitive not in NOT_RUN:
                yield primitive, *dtypes


def moved_of(files: Iterable[Path]) -> list[str]:
    """Primitives that the CPU runs: those for which only it has a kernel move there without a word."""
    marks = ("kernel_backoff_with_failure_info", 'primitive_target: "CPU"')
    moved = set()
    for file in files:
        for line in file.read_text(errors="replace").splitlines():
            found = re.match(r"\s*%\d+\([^)]*\) = (?:PrimFunc_)?([\w.]+)\(", line)
            if found and any(mark in line for mark in marks):
                moved.add(found[1])
    return sorted(moved)


def kernels_of(log: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """By graph, {primitive: kinds of kernels} that Ascend's plugin says in MindSpore's log that it chose."""
    kernels: dict[str, dict[str, set[str]]] = {}
    graph: dict[str, set[str]] = {}
    for line in log:
        if line.startswith(HEADING):
            graph = kernels.setdefault(line[len(HEADING) :].strip(), {})
        else:
            for primitive, kind in re.findall(r"kernel opname:(\w+), kernel type:(\w+)", line):
                graph.setdefault(primitive, set()).add(kind)
    return {name: {one: sorted(kinds) for one, kinds in graph.items()} for name, graph in kernels.items()}


def launches_of(graph: dict) -> int:
    """How many kernels a run of a graph launches."""
    return sum(count for primitive, _, _, count in graph["nodes"] if primitive not in VIEWS)


# --- judging ------------------------------------------------------------------------------------------------------


def faults_of(report: dict) -> list[str]:
    """What is wrong with a report, a sentence each; none for what may be released."""
    faults = [f"{graph['name']}: {fault}" for graph in report["graphs"] for fault in _faults_of_graph(report, graph)]
    faults += [f"{EAGER}: {fault}" for fault in _faults_of_kernels(report["eager"])]
    for scenario in report["scenarios"]:
        if scenario["error"] is not None:
            faults.append(f"{scenario['name']}: {scenario['error']}")
        elif scenario["compiled"] != scenario["expected"]:
            faults.append(
                f"{scenario['name']}: {scenario['compiled']} graphs were compiled, {scenario['expected']} expected"
            )
    if report["ended"] is not None:
        faults.append(report["ended"])
    if not report["graphs"]:
        faults.append("no graph was compiled")
    return faults


def _faults_of_graph(report: dict, graph: dict) -> Iterator[str]:
    if graph["error"] is not None:
        yield f"refused: {graph['error']}"
        return
    if not graph["nodes"]:
        if not graph["name"].startswith(NOTHING):
            yield "MindSpore wrote no graph"
        return
    if graph["moved"]:
        yield f"moved to the CPU: {', '.join(graph['moved'])}"
    if report["target"] == "Ascend":
        if not graph["kernels"]:
            yield "MindSpore's log names no kernel"
        yield from _faults_of_kernels(graph["kernels"])
        if doubles := _primitives_with(graph, {"Float64"}):
            yield f"float64 in {', '.join(doubles)}"
    if report["dtype"] == "float32" and (halves := _primitives_with(graph, HALVES)):
        yield f"half precision where float32 was asked for, in {', '.join(halves)}"


def _faults_of_kernels(kernels: dict[str, list[str]]) -> Iterator[str]:
    if others := sorted(name for name, kinds in kernels.items() if set(kinds) - KINDS):
        yield f"kernels of neither aclnn nor CANN: {', '.join(others)}"
    if named := sorted({name for name, kinds in kernels.items() if "acl_kernel" in kinds} - NAMED.keys()):
        yield f"asked of CANN by name, beyond those that are known: {', '.join(named)}"


def _primitives_with(graph: dict, dtypes: set[str]) -> list[str]:
    return sorted({primitive for primitive, inputs, outputs, _ in graph["nodes"] if dtypes & {*inputs, *outputs}})
