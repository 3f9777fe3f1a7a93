"""`mindiffedit doctor`: whether mindiffedit works on this machine, and what is missing.

Each check is a function that gives findings; one that raises is a finding itself. The report is text to paste into an
issue: paths in it begin with ~ where they are the user's.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mindiffedit import __version__, demo
from mindiffedit.cli.loading import hushed, require_device
from mindiffedit.cli.wording import FAILED, OK, kind_and_text, on_one_line
from mindiffedit.runtime.machine import cores, processor, version_of

SEEN = {"mindspore": ("2.7.2", "2.8.0"), "mindone": ("0.5.0",), "transformers": ("4.57.1",)}
"""Versions that the tests were seen to pass with; of MindSpore on a CPU."""

_OTHERS = ("numpy", "scipy", "pillow", "tokenizers", "safetensors", "huggingface_hub")
_STEPS = 8  # of the timed edit, the first of which warms up


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        topic: what was looked at.
        state: "ok"; "note" for what may matter; "problem" for what keeps an edit from being right.
        text: what was found.
        advice: what to do about a note or problem.
    """

    topic: str
    state: str
    text: str
    advice: str = ""


def doctor(args: Namespace) -> tuple[str, dict[str, Any], int]:
    """Runs the checks; returns (report, the same as an object, exit code: 1 where there is a problem)."""
    findings: list[Finding] = []
    figures: dict[str, Any] = {}
    for check in (_versions, _machine, _device, _kernels, _operators, _cache, _replay, _step):
        topic = check.__name__.strip("_")
        if not args.quiet:
            print(f"{topic} ...", file=sys.stderr)
        try:
            findings += check(args, figures)
        except Exception as error:
            findings.append(Finding(topic, "problem", kind_and_text(error), "mend this first"))
        if any(finding.state == "problem" for finding in findings) and check in (_versions, _device):
            break  # nothing below can run
    ready = all(finding.state != "problem" for finding in findings)
    result = {"command": "doctor", "ready": ready, "findings": [asdict(one) for one in findings], **figures}
    return _report(findings, ready), result, OK if ready else FAILED


def _report(findings: list[Finding], ready: bool) -> str:
    width = max(len(finding.topic) for finding in findings)
    lines = ["```text", f"mindiffedit {__version__} doctor"]
    for finding in findings:
        advice = f" -> {finding.advice}" if finding.advice else ""
        lines.append(f"{finding.state:8}{finding.topic:{width}}  {finding.text}{advice}".replace(str(Path.home()), "~"))
    problems = [finding for finding in findings if finding.state == "problem"]
    end = "ready." if ready else f"not ready: {problems[0].topic}: {problems[0].advice}."
    return "\n".join([*lines, "```", "", end])


# --- what is installed ---------------------------------------------------------------------------


def _versions(args: Namespace, figures: dict) -> Iterator[Finding]:
    versions = {name: version_of(name) for name in (*SEEN, *_OTHERS)}
    figures["versions"] = {"mindiffedit": __version__, "python": platform.python_version(), **versions}
    yield Finding("python", "ok", f"{platform.python_version()} ({platform.python_implementation()})")
    for name, known in SEEN.items():
        version = versions[name]
        if version is None:
            yield Finding(name, "problem", "not installed", f"pip install {name}=={known[-1]}")
        elif version in known:
            yield Finding(name, "ok", version)
        else:
            slow = name == "mindspore" and tuple(map(int, re.findall(r"\d+", version)[:2])) >= (2, 9)
            text = f"{version}; seen to work: {', '.join(known)}"
            if slow:
                text += "; from 2.9 on convolutions on a CPU take a hundred times as long"
            yield Finding(name, "problem" if slow else "note", text, f"pip install {name}=={known[-1]}")
    yield Finding("others", "ok", ", ".join(f"{name} {versions[name]}" for name in _OTHERS))


def _machine(args: Namespace, figures: dict) -> Iterator[Finding]:
    memory = _meminfo()
    figures["machine"] = {"system": platform.platform(), "cores": cores(), **memory}
    text = f"{platform.platform()}, {processor()}, {cores()} cores"
    if memory:
        text += f", {memory['total_gb']:.1f} GB of memory ({memory['available_gb']:.1f} free)"
    yield Finding("machine", "ok", text)
    if memory and memory["available_gb"] < 1:
        yield Finding("memory", "note", f"{memory['available_gb']:.1f} GB are free", "the demo takes 1, SD 1.5 takes 6")


def _meminfo() -> dict[str, float]:
    """Gigabytes of memory; empty where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    kilobytes = {name: int(value.split()[0]) for name, value in (line.split(":") for line in lines)}
    names = {"total_gb": "MemTotal", "available_gb": "MemAvailable"}
    return {name: kilobytes[key] * 1024 / 1e9 for name, key in names.items() if key in kilobytes}


# --- the device ----------------------------------------------------------------------------------


def _device(args: Namespace, figures: dict) -> Iterator[Finding]:
    with hushed():
        device = require_device(args.device)
    figures["device"] = device
    yield Finding("device", "ok", f"{device}: an addition ran on it")
    if device == "CPU":
        return
    yield Finding("device", "note", f"the tests have not been seen on {device}", "trust the replay below")
    tool, *options = {
        "GPU": ("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"),
        "Ascend": ("npu-smi", "info"),
    }[device]
    if shutil.which(tool) is None:
        yield Finding("driver", "note", f"{tool} is not on the PATH", "add the driver's tools to see its version")
        return
    said = subprocess.run([tool, *options], capture_output=True, text=True, timeout=30).stdout
    version = re.search(r"Version:\s*(\S+)", said) if device == "Ascend" else None
    yield Finding("driver", "ok", f"{tool}: {version[1] if version else on_one_line(said)}")
    home = os.environ.get("ASCEND_TOOLKIT_HOME" if device == "Ascend" else "CUDA_HOME")
    yield Finding("toolkit", "ok" if home else "note", home or "no CANN or CUDA folder in the environment")


def _kernels(args: Namespace, figures: dict) -> Iterator[Finding]:
    from mindiffedit.runtime.kernels import missing_kernels

    with hushed():
        missing = missing_kernels()
    figures["replaced_kernels"] = missing
    names = ", ".join(name.rpartition(".")[2] for name in missing)
    yield Finding("kernels", "ok", f"{len(missing)} replaced by portable ones: {names}" if missing else "all are there")


def _operators(args: Namespace, figures: dict) -> Iterator[Finding]:
    from mindiffedit.runtime import native

    if figures["device"] != "CPU":
        return
    available = native.available()
    figures["cpp_operators"] = native.instruction_set() if available else None
    if available:
        yield Finding("C++ operators", "ok", f"for {native.instruction_set()}")
    else:
        yield Finding("C++ operators", "note", "not in use, so edits take longer", "install a C++ compiler, then again")


def _cache(args: Namespace, figures: dict) -> Iterator[Finding]:
    from mindiffedit.runtime.compile_cache import open_cache

    cache = None if args.no_cache else open_cache()
    if cache is None:
        yield Finding(
            "compile cache", "note", "off: every process compiles its graphs", "name a folder: MINDIFFEDIT_CACHE"
        )
        return
    sizes = [path.stat().st_size for path in cache.folder.iterdir() if path.is_file()]
    figures["compile_cache"] = {"graphs": len(sizes), "bytes": sum(sizes)}
    yield Finding("compile cache", "ok", f"{cache.folder}: {len(sizes)} files, {sum(sizes) / 1e6:.0f} MB")


# --- runs ----------------------------------------------------------------------------------------


def _replay(args: Namespace, figures: dict) -> Iterator[Finding]:
    """What PyTorch diffusers computed with the demo model, computed here."""
    from mindiffedit.cli import parity
    from mindiffedit.cli.arguments import build_parser

    words = ["parity", "check", str(demo.golden_file()), "--quiet", "--mode", args.mode, "--jit-level", args.jit_level]
    words += ["--no-cache"] if args.no_cache else []
    with hushed():
        _, result, code = parity.check(build_parser().parse_args(words))
    figures["replay"] = result
    if code == OK:
        yield Finding("replay", "ok", f"{len(result['stages'])} stages of a recorded edit within their tolerances")
    else:
        advice = "edits here are not the reference's: report it, with all of this"
        yield Finding("replay", "problem", result["verdict"], advice)


def _step(args: Namespace, figures: dict) -> Iterator[Finding]:
    """Seconds of one guided step, with the time that a first edit takes to compile beside it."""
    from mindiffedit.images.reading import load_image
    from mindiffedit.pipeline import StableDiffusionDiffEditPipeline

    with hushed():
        pipe: Any = StableDiffusionDiffEditPipeline.from_pretrained(
            str(demo.checkpoint_folder()), mode=args.mode, compile_cache=False if args.no_cache else None
        )
        pipe.jit_level = args.jit_level
        pipe.set_progress_bar_config(disable=True)
        ends: list[float] = []

        def note_time(pipeline, step, timestep, tensors):
            ends.append(time.perf_counter())
            return tensors

        started = time.perf_counter()
        pipe.edit(
            load_image(str(demo.sample_picture())),
            *demo.SAMPLE_PROMPTS.values(),
            num_inference_steps=_STEPS,
            inpaint_strength=1.0,
            callback_on_step_end=note_time,
            generator=0,
        )
        whole = time.perf_counter() - started
    step = statistics.median(later - earlier for earlier, later in zip(ends, ends[1:]))
    figures["step_seconds"], figures["first_edit_seconds"] = round(step, 4), round(whole, 2)
    text = f"{1000 * step:.0f} ms for a guided one of the demo model; its first edit took {whole:.1f} s"
    yield Finding("step", "ok", text)
