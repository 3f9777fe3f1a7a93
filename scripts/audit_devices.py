"""Compile every graph that a user can reach for Ascend and GPU, without either, and say what is wrong with it.

    scripts/audit_devices.sh                                  # small models, both targets, all dtypes
    scripts/audit_devices.sh --target Ascend --dtype float16 --model sd15 --size 512
    scripts/audit_devices.sh --write                          # and puts the tables into docs/devices.md

MindSpore's own plugins compile, over stand-ins for CANN's and CUDA's libraries (device_stand_ins.py), what the pipeline
asks for when it is called as users call it (device_graphs.py). A fault (device_kernels.py) is an operator that is
refused, a node that moves to the CPU, on Ascend float64 and an operator asked of CANN by name that is not on a short
list, half precision where float32 was asked for, another number of graphs than an edit has, or a defect, planted to see
whether it is found, that passes. The exit code is 1 where there is a fault.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from datetime import date
from importlib import metadata
from pathlib import Path

import benchmark_checkpoint
import device_kernels
import device_stand_ins
from device_kernels import NAMED, faults_of, launches_of
from reports import DOCS, ROOT, data_text, markdown_table, page_with, write_whole

DTYPES = {"Ascend": ("float16", "bfloat16", "float32"), "GPU": ("float16", "float32")}
"""What each target computes in; bfloat16 becomes float32 on a GPU, with a warning (`devices.supported_dtype`)."""

SILENT = "SESSION PARSER CORE ANALYZER OPTIMIZER RUNTIME_FRAMEWORK COMMON PIPELINE PRE_ACT".split()
"""Modules of MindSpore whose log nobody reads here, and which takes time."""

DATA = "device_graphs.json"
PAGE = "devices.md"

PLANTED = "planted: "


# --- one target, one dtype ----------------------------------------------------------------------------------------


def run_dry(environment: dict[str, str], work: Path, wanted: dict) -> tuple[list[dict], str | None]:
    """Runs device_graphs.py over stand-ins.

    Args:
        environment: what `device_stand_ins.build` returned.
        work: an empty folder, where MindSpore's graphs ("ir") and its log ("log") are written.
        wanted: see device_graphs.py.

    Returns:
        Its records, and None or how it ended before it was through.
    """
    variables = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "MS_DEV_SAVE_GRAPHS": "2",
        "MS_DEV_DUMP_IR_PASSES": "graph_build",  # all would be two gigabytes, and take most of the time
        "MS_DEV_SAVE_GRAPHS_PATH": str(work / "ir"),
        "GLOG_v": "1",  # Ascend's plugin names its kernels there, as the module DEVICE
        "MS_SUBMODULE_LOG_v": f"{{{','.join(f'{module}:3' for module in SILENT)}}}",
        "GLOG_logtostderr": "1",
        "MINDIFFEDIT_CACHE": "0",
        "USE_TORCH": "0",
    }
    program = Path(__file__).with_name("device_graphs.py")
    with open(work / "log", "wb") as log:
        done = subprocess.run(
            [sys.executable, str(program), json.dumps(wanted)],
            env={**os.environ, **environment, **variables},
            cwd=work,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            check=False,
        )
    lines = done.stdout.splitlines()
    records = [json.loads(line.removeprefix("RECORD ")) for line in lines if line.startswith("RECORD ")]
    return records, None if done.returncode == 0 else f"the process ended with {done.returncode}; its log is {log.name}"


def audit(environment: dict[str, str], work: Path, wanted: dict) -> dict:
    """The report of a target and dtype, see device_kernels.py; arguments as for `run_dry`."""
    records, ended = run_dry(environment, work, wanted)
    report = {"target": wanted["target"], "dtype": wanted["dtype"], "size": wanted["size"], "ended": ended}
    with open(work / "log", errors="replace") as log:
        kernels = device_kernels.kernels_of(log)
    report |= {"graphs": [], "scenarios": [], "missing": [], "eager": kernels.pop(device_kernels.EAGER, {})}
    for record in records:
        kind = record.pop("kind")
        if kind == "missing":
            report["missing"] = record["names"]
        elif kind == "scenario":
            report["scenarios"].append(record)
        else:
            files = [work / file for file in record.pop("files")]
            nodes = sorted(device_kernels.nodes_of(files).items())
            record["nodes"] = [[primitive, list(i), list(o), count] for (primitive, i, o), count in nodes]
            record["moved"] = device_kernels.moved_of(files)
            record["kernels"] = kernels.get(record["name"], {})
            report["graphs"].append(record)
    return report


def parted(report: dict) -> tuple[dict, dict[str, dict]]:
    """What was compiled for users, and by its name what was planted, each as a report."""
    names = list(dict.fromkeys(one["name"] for one in report["scenarios"] if one["name"].startswith(PLANTED)))

    def part(chosen):
        kinds = ("graphs", "scenarios")
        return {**report, **{kind: [one for one in report[kind] if chosen(one["name"])] for kind in kinds}}

    whole = part(lambda name: not name.startswith(PLANTED))
    others = {"ended": None, "eager": {}}
    return whole, {name: part(lambda one, name=name: one.startswith(name)) | others for name in names}


def verdicts(report: dict) -> list[str]:
    """All that is wrong with a report, planted defects that passed among it."""
    whole, planted = parted(report)
    passed = [name for name, part in planted.items() if not part["graphs"] or not faults_of(part)]
    return faults_of(whole) + [f"{name}: passes" for name in passed]


# --- models -------------------------------------------------------------------------------------------------------


def small_models(folder: Path) -> dict[str, str]:
    """The checkpoints of the tests, made in seconds: SD 1.x and 2.x, a LoRA, T5 and BLIP; by what they are for."""
    sys.path.insert(0, str(ROOT / "tests"))
    import checkpoints
    import language_checkpoints

    models = {
        "checkpoint": checkpoints.make_sd1(folder / "sd1", safety_checker=True),
        "second": checkpoints.make_sd2(folder / "sd2"),
        "prompt": language_checkpoints.make_t5(folder / "t5"),
        "caption": language_checkpoints.make_blip(folder / "blip"),
    }
    return {name: str(path) for name, path in models.items()} | {"lora": str(small_lora(folder / "lora.safetensors"))}


def small_lora(path: Path) -> Path:
    """A LoRA of one layer of the small checkpoint's UNet."""
    import numpy as np
    from safetensors.numpy import save_file

    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    rng = np.random.default_rng(0)
    shapes = {"lora_A": (2, 16), "lora_B": (16, 2)}
    save_file({f"{layer}.{s}.weight": rng.normal(size=n).astype(np.float32) for s, n in shapes.items()}, path)
    return path


def models_of(name: str, folder: Path) -> dict:
    """Arguments of device_graphs.py for a model: "small", "demo", "sd15" or a checkpoint's folder."""
    if name == "small":
        return {"scope": "whole", "planted": True, **small_models(folder)}
    if name == "demo":
        return {"scope": "edit", "planted": False, "checkpoint": str(ROOT / "mindiffedit/demo/checkpoint")}
    if name == "sd15":
        name = str(benchmark_checkpoint.ensure(benchmark_checkpoint.default_folder()))
    return {"scope": "edit", "planted": False, "checkpoint": str(Path(name).resolve())}


# --- tables -------------------------------------------------------------------------------------------------------


def summary(report: dict, model: str) -> dict:
    """What the documentation keeps of a report."""
    whole, _ = parted(report)
    graphs = {}
    for graph in whole["graphs"]:
        counts: Counter[str] = Counter()
        for primitive, _, _, count in graph["nodes"]:
            counts[primitive] += count
        graphs[graph["name"]] = {
            "nodes": counts.total(),
            "launches": launches_of(graph),
            "named": {n: counts[n] for n, kinds in graph["kernels"].items() if "acl_kernel" in kinds and counts[n]},
            "memory_mb": round(graph["memory"] / 1e6, 1),
            "most": dict(counts.most_common(8)),
        }
    versions = {name: metadata.version(name) for name in ("mindspore", "mindone")}
    heading = {name: report[name] for name in ("target", "dtype", "size", "missing")}
    heading["eager_named"] = sorted(name for name, kinds in report["eager"].items() if "acl_kernel" in kinds)
    return {**heading, "model": model, "date": date.today().isoformat(), "versions": versions, "graphs": graphs}


def load_summaries() -> list[dict]:
    path = DOCS / DATA
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def place_of(summary: dict) -> tuple:
    return tuple(summary[name] for name in ("model", "size", "target", "dtype"))


def write(new: list[dict]) -> None:
    """Puts summaries in the place of older ones of the same model, size, target and dtype, and into the page."""
    kept = {place_of(one): one for one in [*load_summaries(), *new]}
    write_whole(DOCS / DATA, data_text([kept[place] for place in sorted(kept)]) + "\n")
    write_page()


def write_page() -> None:
    write_blocks(blocks(load_summaries()))


def write_blocks(contents: dict[str, str]) -> None:
    """Puts tables between their comments in the page; blocks that `contents` lacks stay as they are."""
    page = DOCS / PAGE
    before = page.read_text(encoding="utf-8")
    there = dict(re.findall(r"<!-- data: (\w+) -->\n(.*?)\n<!-- end -->", before, flags=re.DOTALL))
    write_whole(page, page_with(before, there | contents))


def blocks(summaries: list[dict]) -> dict[str, str]:
    """What the page shows, by the name in the comment before it."""
    return {
        "device_graphs": "\n\n".join(graphs_tables(summaries)) or "Not run yet.",
        "device_primitives": primitives_table(summaries) or "Not run yet.",
        "device_named": named_table(summaries),
        "device_missing": missing_table(summaries),
    }


def graphs_tables(summaries: list[dict]) -> list[str]:
    """A table for each model and size: of every graph its launches, nodes and planned memory."""
    tables = []
    for model, size in dict.fromkeys((one["model"], one["size"]) for one in summaries):
        columns = [one for one in summaries if (one["model"], one["size"]) == (model, size)]
        cells = [["graph", *(f"{one['target']} {one['dtype']}" for one in columns)]]
        # Devices differ in the shapes of what is computed before a loop, so graphs are told apart by their labels.
        named = [{label(name): graph_text(graph) for name, graph in one["graphs"].items()} for one in columns]
        for name in dict.fromkeys(name for graphs in named for name in graphs):
            cells.append([name, *(graphs.get(name, "-") for graphs in named)])
        versions = sorted({f"MindSpore {one['versions']['mindspore']}, {one['date']}" for one in columns})
        tables += [f"**{model}, {size} x {size}** ({'; '.join(versions)}):", markdown_table(cells)]
    return tables


def label(name: str) -> str:
    """A graph's stage, choices and first shape, for people."""
    words = name.split()
    first = next((number for number, word in enumerate(words) if re.fullmatch(r"\d+(x\d+)+", word)), len(words))
    flags = {} if "text" in words[:2] else {"True": "guided", "False": "unguided"}
    choices = (flags.get(word, word) for word in words[:first])
    said = " ".join(word for word in choices if word not in ("True", "False"))
    return ", ".join([said, *words[first : first + 1]])


def graph_text(graph: dict) -> str:
    return f"{graph['launches']} of {graph['nodes']}, {graph['memory_mb']:g} MB"


def primitives_table(summaries: list[dict]) -> str:
    """What the UNet's launches are, where it was compiled in half precision."""
    cells = [["model", "target", "graph", "most frequent nodes"]]
    for one in summaries:
        for name, graph in one["graphs"].items():
            if one["dtype"] == "float16" and name.startswith("unet ") and " 2x" in name[:8]:
                most = ", ".join(f"{primitive} {count}" for primitive, count in graph["most"].items())
                cells.append([f"{one['model']}, {one['size']} px", one["target"], label(name), most])
    return markdown_table(cells) if len(cells) > 1 else ""


def named_table(summaries: list[dict]) -> str:
    """Operators that CANN is asked for by name."""
    used: dict[str, set[str]] = {}
    for one in summaries:
        for name, graph in one["graphs"].items():
            for primitive in graph["named"]:
                used.setdefault(primitive, set()).add(name.removeprefix("2.x: ").split()[0])
        for primitive in one["eager_named"]:
            used.setdefault(primitive, set()).add(device_kernels.EAGER)
    rows = [[f"`{name}`", why, ", ".join(sorted(used.get(name, {"-"})))] for name, why in NAMED.items()]
    return markdown_table([["operator", "what for", "in"], *rows])


def missing_table(summaries: list[dict]) -> str:
    """Names that are replaced for want of a kernel, or of an exact one."""
    names = {one["target"]: one["missing"] for one in summaries}
    rows = [[target, ", ".join(f"`{name}`" for name in missing) or "nothing"] for target, missing in names.items()]
    return markdown_table([["target", "replaced"], *rows]) if rows else "Not run yet."


# --- the command --------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=device_stand_ins.TARGETS, help="default: both")
    parser.add_argument("--dtype", choices=DTYPES["Ascend"], help="default: all of the target's")
    parser.add_argument("--model", default="small", help="small (default), demo, sd15, or the folder of a checkpoint")
    parser.add_argument("--size", type=int, default=64, help="side of the picture in pixels (64)")
    parser.add_argument("--json", type=Path, help="write the whole reports to this file")
    parser.add_argument("--keep", type=Path, help="an empty folder for MindSpore's graphs and logs")
    parser.add_argument("--write", action="store_true", help=f"write the tables to docs/{PAGE}")
    options = parser.parse_args()
    if missing := device_stand_ins.missing_tools():
        parser.error(f"needs {', '.join(missing)}")

    reports, faults = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.keep or temporary).resolve()
        models = models_of(options.model, folder)
        for target in [options.target] if options.target else device_stand_ins.TARGETS:
            environment = device_stand_ins.build(target, folder / target)
            for dtype in [options.dtype] if options.dtype else DTYPES[target]:
                if dtype not in DTYPES[target]:
                    print(f"{target} {dtype}: computed in float32 there")
                    continue
                work = folder / f"{target}-{dtype}"
                work.mkdir(parents=True)
                wanted = {"target": target, "dtype": dtype, "size": options.size, **models}
                report = audit(environment, work, wanted)
                reports.append(report)
                faults += show(report)
    if options.json:
        options.json.write_text(json.dumps(reports, indent=0))
    if options.write and not faults:
        name = {"small": "small checkpoint", "demo": "demo checkpoint", "sd15": "size of SD 1.5"}
        write([summary(report, name.get(options.model, Path(options.model).name)) for report in reports])
    return 1 if faults else 0


def show(report: dict) -> list[str]:
    """Prints a report; returns what is wrong with it."""
    print(f"{report['target']} {report['dtype']}, {report['size']} px")
    for graph in parted(report)[0]["graphs"]:
        memory = f"{graph['memory'] / 1e9:7.3f} GB {graph['seconds']:6.1f} s"
        print(f"  {graph['name']:70s} {launches_of(graph):5d} launches {memory}")
    faults = verdicts(report)
    print("\n".join(f"  FAULT {fault}" for fault in faults) or "  no faults", flush=True)
    return faults


if __name__ == "__main__":
    sys.exit(main())
