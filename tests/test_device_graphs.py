"""Every graph compiled for Ascend and GPU, over stand-ins for their libraries; and what is said of each defect."""

import copy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import audit_devices  # noqa: E402
import device_kernels  # noqa: E402
import device_stand_ins  # noqa: E402
from device_kernels import faults_of, launches_of  # noqa: E402

MISSING = device_stand_ins.missing_tools()
needs_tools = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")


# --- the compilers -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_models(tmp_path_factory):
    return audit_devices.models_of("small", tmp_path_factory.mktemp("models"))


def report_of(target, dtype, models, folder, **choices):
    if lacking := device_stand_ins.missing_plugin(target):
        pytest.skip(f"this MindSpore has no {lacking}")
    environment = device_stand_ins.build(target, folder / "stand-ins")
    (work := folder / "work").mkdir()
    wanted = {"target": target, "dtype": dtype, "size": 64, "planted": True, **models, **choices}
    return audit_devices.audit(environment, work, wanted)


def stages_of(report) -> dict[str, int]:
    """The stages of what a user reaches, and how many kernels the longest graph of each launches."""
    users, _ = audit_devices.parted(report)
    stages: dict[str, int] = {}
    for graph in users["graphs"]:
        stage = graph["name"].removeprefix("2.x: ").split()[0]
        stages[stage] = max(launches_of(graph), stages.get(stage, 0))
    return stages


def beyond(stages: dict[str, int], most: dict[str, int]) -> dict[str, int]:
    """Stages that launch more kernels than they may, and what the other of the two does not know."""
    return {name: count for name, count in stages.items() if not count <= most.get(name, 0)} | {
        name: 0 for name in most.keys() - stages.keys()
    }


@needs_tools
@pytest.mark.tools
@pytest.mark.parametrize("target", audit_devices.DTYPES)
def test_an_edits_graphs_and_planted_defects(target, small_models, tmp_path):
    report = report_of(target, "float16", small_models, tmp_path, scope="quick")
    assert audit_devices.verdicts(report) == []
    assert beyond(stages_of(report), LAUNCHES[target]) == {}
    _, planted = audit_devices.parted(report)
    found = {name.removeprefix("planted: "): " ".join(faults_of(part)) for name, part in planted.items()}
    assert found.keys() == PLANTED[target].keys()
    for name, words in PLANTED[target].items():
        assert words in found[name], found


@needs_tools
@pytest.mark.tools
@pytest.mark.slow
@pytest.mark.parametrize("target, dtype", [(t, d) for t, dtypes in audit_devices.DTYPES.items() for d in dtypes])
def test_every_graph_of_a_user(target, dtype, small_models, tmp_path):
    report = report_of(target, dtype, small_models, tmp_path)
    assert audit_devices.verdicts(report) == []
    others = {"unet_full", "unet_shallow", "noise", "move", "refinement", "safety", "T5Decoder", "BlipDecoder"}
    assert stages_of(report).keys() == LAUNCHES[target].keys() | others


LAUNCHES = {
    "Ascend": dict(text=78, encode=63, unet_time=29, unet_text=8, unet=182, update=20, decode=91),
    "GPU": dict(text=96, encode=168, unet_time=43, unet_text=20, unet=313, update=20, decode=244),
}
"""How many kernels the graphs of an edit of the small checkpoint may launch in float16: what they do now."""

PLANTED = {
    "Ascend": {
        "one graph more": "1 graphs were compiled, 0 expected",
        "float64": "float64 in Cast, Exp",
        "asked of CANN by name": "asked of CANN by name",
        "an operator that nobody has": "NoSuchOperator",
    },
    "GPU": {
        "one graph more": "1 graphs were compiled, 0 expected",
        "moved to the CPU": "moved to the CPU: MatMul",
        "a kernel that nobody replaced": "GeluExt",
        "an operator that nobody has": "NoSuchOperator",
    },
}
"""What is said of each planted defect."""


# --- reading and judging -----------------------------------------------------------------------------------------

IR = """
subgraph @kernel_graph_0() {
  %0(CNode_1) = PrimFunc_Cast(%para1_x, I64(42)) {instance name: x} primitive_attrs: {x: y}
      : (<Tensor[Float32], (1, 3)>, <Int64, NoShape>) -> (<Tensor[Float16], (1, 3)>)
  %1(CNode_2) = MatMul(%0, %para2_w) primitive_attrs: {primitive_target: "CPU"}
      : (<Tensor[Float16], (1, 3)>, <Tensor[Float16], (3, 3)>) -> (<Tensor[Float16], (1, 3)>)
  %2(CNode_3) = Reshape(%1, %3)
      : (<Tensor[Float16], (1, 3)>, <Tuple[Int64*2], NoShape>) -> (<Tensor[Float16], (3, 1)>)
  %4(CNode_4) = Depend(%2, U)
      : (<Tensor[Float16], (3, 1)>, <UMonad, NoShape>) -> (<Tensor[Float16], (3, 1)>)
"""


def test_a_graph_is_read(tmp_path):
    file = tmp_path / "graph_build_0.ir"
    file.write_text(IR)
    half = ("Float16",)
    assert device_kernels.nodes_of([file]) == {
        ("Cast", ("Float32",), half): 1,
        ("MatMul", half * 2, half): 1,
        ("Reshape", half, half): 1,
    }
    assert device_kernels.moved_of([file]) == ["MatMul"]
    log = [
        "kernel opname:Early, kernel type:opapi_kernel",
        f"{device_kernels.HEADING}text 1x77",
        "[INFO] kernel opname:Cast, kernel type:opapi_kernel",
        "[INFO] kernel opname:Gather, kernel type:acl_kernel",
        f"{device_kernels.HEADING}decode",
    ]
    kernels = device_kernels.kernels_of(log)
    assert kernels == {"text 1x77": {"Cast": ["opapi_kernel"], "Gather": ["acl_kernel"]}, "decode": {}}


def a_report(target="Ascend", dtype="float32"):
    """Of one graph, without a fault."""
    graph = {"name": "unet 2x4x8x8 1", "error": None, "seconds": 1.0, "memory": 2_500_000, "moved": []}
    graph |= {"nodes": [["Add", ["Float32", "Float32"], ["Float32"], 2]], "kernels": {"Add": ["opapi_kernel"]}}
    scenario = {"name": "an edit", "expected": 1, "compiled": 1, "error": None}
    return {
        "target": target,
        "dtype": dtype,
        "size": 64,
        "missing": [],
        "eager": {},
        "ended": None,
        "graphs": [graph],
        "scenarios": [scenario],
    }


DEFECTS = {
    "refused": (lambda graph, _: graph.update(error="TypeError: Unsupported op [X] on Ascend"), "Unsupported op [X]"),
    "moved": (lambda graph, _: graph.update(moved=["MatMul"]), "moved to the CPU: MatMul"),
    "float64": (lambda graph, _: graph["nodes"].append(["Exp", ["Float32"], ["Float64"], 1]), "float64 in Exp"),
    "half": (lambda graph, _: graph["nodes"].append(["Cast", ["Float32"], ["BFloat16"], 1]), "half precision"),
    "by name": (lambda graph, _: graph["kernels"].update(Mish=["acl_kernel"]), "beyond those that are known: Mish"),
    "host": (lambda graph, _: graph["kernels"].update(Mish=["host_kernel"]), "kernels of neither"),
    "no nodes": (lambda graph, _: graph.update(nodes=[]), "MindSpore wrote no graph"),
    "no log": (lambda graph, _: graph.update(kernels={}), "names no kernel"),
    "graphs": (lambda _, scenario: scenario.update(compiled=2), "2 graphs were compiled, 1 expected"),
    "failed": (lambda _, scenario: scenario.update(error="ValueError: x"), "an edit: ValueError: x"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_a_fault(name):
    report = a_report()
    assert faults_of(report) == []
    change, words = DEFECTS[name]
    change(report["graphs"][0], report["scenarios"][0])
    (fault,) = faults_of(report)
    assert words in fault


def test_more_launches_are_found():
    report = a_report()
    assert beyond(stages_of(report), {"unet": 2}) == {} and beyond(stages_of(report), {"unet": 1}) == {"unet": 2}
    assert beyond(stages_of(report), {}) == {"unet": 2} and beyond({}, {"unet": 2}) == {"unet": 0}


def test_operators_between_the_graphs_are_judged():
    assert faults_of({**a_report(), "eager": {"Stack": ["acl_kernel"], "Add": ["opapi_kernel"]}}) == []
    (fault,) = faults_of({**a_report(), "eager": {"Mish": ["acl_kernel"]}})
    assert fault == "operators between the graphs: asked of CANN by name, beyond those that are known: Mish"


def test_what_ends_early_or_compiles_nothing_is_a_fault():
    assert faults_of({**a_report(), "ended": "the process ended with -6"}) == ["the process ended with -6"]
    assert faults_of({**a_report(), "graphs": [], "scenarios": []}) == ["no graph was compiled"]
    report = a_report()
    report["graphs"][0].update(name="noise epsilon False 1x4x8x8", nodes=[], kernels={})
    assert faults_of(report) == [], "it gives an argument back"


def test_known_names_and_float64_elsewhere_are_none():
    report = a_report()
    report["graphs"][0]["kernels"]["Gather"] = ["acl_kernel"]
    assert faults_of(report) == []
    report = a_report("GPU", "float16")
    report["graphs"][0] |= {"nodes": [["Exp", ["Float64"], ["Float16"], 1]], "kernels": {}}
    assert faults_of(report) == []


def test_a_planted_defect_that_passes_is_a_fault():
    report = a_report()
    planted = copy.deepcopy(report)
    for kind in ("graphs", "scenarios"):
        planted[kind][0]["name"] = "planted: float64"
        report[kind] += planted[kind]
    assert audit_devices.verdicts(report) == ["planted: float64: passes"]
    report["graphs"][1]["nodes"][0][1] = ["Float64"]
    assert audit_devices.verdicts(report) == []
    del report["graphs"][1]  # it never came so far
    assert audit_devices.verdicts(report) == ["planted: float64: passes"]


# --- tables ------------------------------------------------------------------------------------------------------


def test_tables():
    report = a_report()
    report["graphs"][0]["nodes"] += [["Gather", ["Float32"], ["Float32"], 3], ["Reshape", ["Float32"], ["Float32"], 4]]
    report["graphs"][0]["kernels"]["Gather"] = ["acl_kernel"]
    summary = audit_devices.summary(report, "a checkpoint")
    blocks = audit_devices.blocks([summary])
    assert "| unet, 2x4x8x8 | 5 of 9, 2.5 MB |" in blocks["device_graphs"]
    assert (
        audit_devices.label("update ddim epsilon 1.0 True 1x4x8x8 2x4x8x8") == "update ddim epsilon 1.0 guided, 1x4x8x8"
    )
    assert "| `Gather` |" in blocks["device_named"] and "unet |" in blocks["device_named"]


def test_the_page_is_in_accord_with_the_data():
    page = (audit_devices.DOCS / audit_devices.PAGE).read_text(encoding="utf-8")
    for name, content in audit_devices.blocks(audit_devices.load_summaries()).items():
        assert f"<!-- data: {name} -->\n{content}\n<!-- end -->" in page
