"""Stand-ins for the libraries of CANN and CUDA, with which MindSpore compiles for a device that is not there.

MindSpore's wheel holds the plugins of Ascend and GPU; they fail to load only where CANN's or CUDA's libraries are
absent. Here such libraries are compiled out of the names that the plugins ask for in their own symbol tables, as
functions that do nothing and return 0 (nothing of CANN or CUDA is needed). With them MindSpore itself parses, optimises
and selects a kernel for every node of a graph, plans the memory and runs the host's side:

- Ascend in MindSpore's dry run, ``MS_SIMULATION_LEVEL=1``, which launches nothing;
- GPU as on a device of 40 GiB whose kernels compute nothing (the library of MindSpore's own CUDA kernels is a stand-in,
  too). Its memory is the host's.

What that does not show: values, speed, and whether CANN accepts the shapes.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

TARGETS = ("Ascend", "GPU")
TOOLS = (os.environ.get("CC", "cc"), "nm", "readelf", "strings")

PLUGINS = {
    "Ascend": (
        "plugin/libmindspore_ascend.so.2",
        "libmindspore_ge_backend.so",
        "plugin/ascend/libmindspore_graph_ir.so",
    ),
    "GPU": ("plugin/libmindspore_gpu.so.11.6",),
}
FOLDERS = {
    "Ascend": (
        "plugin",
        "plugin/ascend",
        "",
        *(
            f"plugin/ascend/ms_kernels_{path}/lib"
            for path in (
                "symmetric_memory/shmem/memfabric_hybrid",
                "symmetric_memory/shmem/shmem",
                "internal/internal_kernel",
            )
        ),
    ),
    "GPU": ("plugin", "plugin/gpu", "plugin/gpu11.6", ""),
}
"""Where a plugin's libraries lie within MindSpore's own."""

SYSTEM = [
    Path(folder)
    for machine in ("x86_64", "aarch64")
    for folder in (f"/lib/{machine}-linux-gnu", f"/usr/lib/{machine}-linux-gnu")
] + [Path("/lib64"), Path("/usr/lib64"), Path("/usr/lib")]

OPENED = ("libopapi.so", "libacl_op_compiler.so", "libacl_tdt_channel.so")
"""CANN's libraries that the plugin opens while it runs, which no symbol table names."""

LOOKED_UP = re.compile(r"(?:acl(?:nn|op|rt|mdl|prof|tdt)?[A-Z]\w*|Hccl\w+|\w*HugeMem\w*|\w*PTA\w*|CanUsePTACache)$")
"""Strings in the plugin that are names of functions which it looks up in them."""

HEAD = "#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n"

COPIES = "int NAME(void *to, const void *from, size_t size) { memcpy(to, from, size); return 0; }"
FILLS = "int NAME(void *to, int value, size_t size) { memset(to, value, size); return 0; }"
FREES = "int NAME(void *memory) { free(memory); return 0; }"
SAYS_NAME = 'const char *NAME(void) { return "stand-in"; }'
CREATES = "int NAME(void **handle) { *handle = calloc(1, 256); return 0; }"
ONE_ALGORITHM = (
    "int NAME(void *h, void *x, void *w, void *c, void *y, int n, int *count, int *found) "
    "{ memset(found, 0, n * 48); *count = found[0] = 1; return 0; }"
)

SPECIAL = {
    # A ge::Operator is returned through a hidden pointer: its table of methods and a shared_ptr.
    "_ZN2ge15OperatorFactory14CreateOperatorEPKcS2_": "void *NAME(void *r) { memset(r, 0, 24); return r; }",
    "cudaGetDeviceCount": "int NAME(int *count) { *count = 1; return 0; }",
    # The fields of CUDA 11's cudaDeviceProp that MindSpore reads: compute capability 8.0, 40 GiB, 108 processors.
    "cudaGetDeviceProperties": """int NAME(char *p, int device) {
        memset(p, 0, 728); strcpy(p, "stand-in");
        *(size_t *)(p + 288) = 40UL << 30; *(size_t *)(p + 296) = 49152; *(int *)(p + 304) = 65536;
        *(int *)(p + 308) = 32; *(int *)(p + 320) = 1024; int *sizes = (int *)(p + 324);
        sizes[0] = sizes[1] = 1024; sizes[2] = 64; sizes[3] = 2147483647; sizes[4] = sizes[5] = 65535;
        *(int *)(p + 360) = 8; *(int *)(p + 388) = 108; *(int *)(p + 624) = 2048; return 0; }""",
    "cudaMalloc": "int NAME(void **p, size_t size) { *p = calloc(1, size); return *p ? 0 : 2; }",
    "cudaHostAlloc": "int NAME(void **p, size_t size) { *p = malloc(size); return 0; }",
    "cudaFree": FREES,
    "cudaFreeHost": FREES,
    "cudaMemGetInfo": "int NAME(size_t *unused, size_t *all) { *unused = *all = 40UL << 30; return 0; }",
    "cudaMemcpy": COPIES,
    "cudaMemcpyAsync": COPIES,
    "cudaMemset": FILLS,
    "cudaMemsetAsync": FILLS,
    "cudaGetErrorString": SAYS_NAME,
    "cudaGetErrorName": SAYS_NAME,
    "cudnnGetErrorString": SAYS_NAME,
    "cuGetErrorName": 'int NAME(int error, const char **name) { *name = "stand-in"; return 0; }',
    "cudnnGetConvolutionForwardAlgorithm_v7": ONE_ALGORITHM,
    "cudnnFindConvolutionForwardAlgorithm": ONE_ALGORITHM,
    "cudnnGetConvolutionForwardWorkspaceSize": (
        "int NAME(void *h, void *x, void *w, void *c, void *y, int a, size_t *size) { *size = 0; return 0; }"
    ),
    "nvrtcVersion": "int NAME(int *major, int *minor) { *major = 11; *minor = 6; return 0; }",
    # The length of a range, and the code for "no error".
    **{
        f"_Z30CudaValidateInputAndInferShapeI{code}E9cudaErrorPKT_S3_S3_PlP21DynamicRangeErrorCodelP11CUstream_st": (
            f"int NAME(const {kind} *start, const {kind} *end, const {kind} *step, long *length, int *error) "
            "{ double steps = ((double)*end - *start) / *step; *length = (long)steps; *length += *length < steps; "
            "*error = 0; return 0; }"
        )
        for code, kind in {"i": "int", "l": "long", "f": "float", "d": "double"}.items()
    },
}
"""Functions whose callers look at more than the zero that they return."""


def missing_tools() -> list[str]:
    """What is needed to make stand-ins and is not here: programs, or the system that MindSpore has such plugins for."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        missing.append("Linux on x86-64 or aarch64")
    return missing


def missing_plugin(target: str) -> str | None:
    """The first file of a target's plugin that this MindSpore lacks, or None."""
    return next((name for name in PLUGINS[target] if not (_home() / name).is_file()), None)


def build(target: str, folder: Path) -> dict[str, str]:
    """Compile the stand-ins for a target.

    Args:
        target: "Ascend" or "GPU".
        folder: an empty folder that stays while they are used.

    Returns:
        The environment variables with which a process finds them.
    """
    own, system, absent = _libraries(target)
    defined = {name for file in (*own.values(), *system) for name in _symbols(file, "--defined-only")}
    undefined = (_symbols(file, "--undefined-only").items() for file in own.values())
    wanted = {name for names in undefined for name, kind in names if kind != "w"}
    if target == "Ascend":
        wanted |= _looked_up(own.values())
        absent |= set(OPENED)
    wanted = {name for name in wanted - defined if not name.startswith(("Py", "_Py"))} - {"aclDataType"}
    libraries = folder / ("cann/latest/lib64" if target == "Ascend" else "cuda-11.6/lib64")
    libraries.mkdir(parents=True)
    source, compiled = folder / "stand_ins.c", folder / "stand_ins.o"
    source.write_text(HEAD + "\n".join(_function(name) for name in sorted(wanted)))
    _compile("-c", "-o", compiled, source)
    for name in sorted(absent):
        # Each has all names, in a version of its own as CUDA's libraries have.
        versions = folder / f"{name}.map"
        versions.write_text(f"{name} {{ global: *; }};")
        _link(libraries / name, compiled, f"-Wl,--version-script,{versions}")
    if target == "GPU":
        return _gpu_environment(folder, libraries, own, system)
    return {
        "ASCEND_HOME_PATH": str(libraries.parent),
        "ASCEND_OPP_PATH": str(libraries.parent / "opp"),
        "LD_LIBRARY_PATH": str(libraries),
        "MS_SIMULATION_LEVEL": "1",
        "RANK_SIZE": "1",
        "RANK_ID": "0",
    }


def _gpu_environment(folder: Path, libraries: Path, own: dict[str, Path], system: set[Path]) -> dict[str, str]:
    """Kernels that do nothing and a compiler that says its version; the variables that make MindSpore take them."""
    kernels = own["libcuda_ops.so.11"]
    others = [file for file in (*own.values(), *system) if file != kernels]
    elsewhere = {name for file in others for name in _symbols(file, "--defined-only")}
    called = _symbols(own["libmindspore_gpu.so.11.6"], "--undefined-only").keys()
    launchers = called & (_symbols(kernels, "--defined-only").keys() - elsewhere)
    # Thousands of names for one function: quick to assemble, slow to compile.
    returns_zero = "xorl %eax, %eax\nret" if platform.machine() == "x86_64" else "mov w0, wzr\nret"
    assembly, source = folder / "kernels.s", folder / "kernels.c"
    names = "\n".join(f".globl {n}\n.type {n}, STT_FUNC\n{n}:" for n in sorted(launchers - SPECIAL.keys()))
    assembly.write_text(f'.text\n{names}\n{returns_zero}\n.section .note.GNU-stack,""\n')
    source.write_text(HEAD + "\n".join(_function(name) for name in sorted(launchers & SPECIAL.keys())))
    _link(libraries / kernels.name, assembly, source)
    compiler = folder / "cuda-11.6/bin/nvcc"
    compiler.parent.mkdir()
    compiler.write_text('#!/bin/sh\necho "Cuda compilation tools, release 11.6, V11.6.124"\n')
    compiler.chmod(0o755)
    return {
        "CUDA_HOME": str(libraries.parent),
        "LD_LIBRARY_PATH": str(libraries),
        "LD_PRELOAD": str(libraries / kernels.name),
        "PATH": f"{compiler.parent}:{os.environ['PATH']}",
    }


def _home() -> Path:
    """The folder of MindSpore's libraries; MindSpore is not imported."""
    found = importlib.util.find_spec("mindspore")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("mindspore is not installed")
    return Path(found.origin).parent / "lib"


def _libraries(target: str) -> tuple[dict[str, Path], set[Path], set[str]]:
    """A plugin and all that it needs: MindSpore's files by name, the system's files, and names that nobody has."""
    home = _home()
    own: dict[str, Path] = {}
    system: set[Path] = set()
    absent: set[str] = set()
    waiting = [home / name for name in PLUGINS[target]]
    while waiting:
        file = waiting.pop()
        if file.name in own:
            continue
        own[file.name] = file
        for name in re.findall(r"NEEDED.*\[(.*)\]", _output("readelf", "-dW", file)):
            inside = [home / folder / name for folder in FOLDERS[target] if (home / folder / name).is_file()]
            outside = [folder / name for folder in SYSTEM if (folder / name).exists()]
            if inside:
                waiting.append(inside[0])
            elif outside:
                system.add(outside[0])
            elif not name.startswith("ld-linux"):
                absent.add(name)
    return own, system, absent


def _symbols(library: Path, which: str) -> dict[str, str]:
    """{name: kind} of a library's dynamic symbols, without their versions."""
    fields = (line.split() for line in _output("nm", "-D", which, library).splitlines())
    return {parts[-1].split("@")[0]: parts[-2] for parts in fields if len(parts) > 1}


def _looked_up(libraries: Iterable[Path]) -> set[str]:
    """Names of CANN's functions that the plugin's libraries look up while they run."""
    names = set()
    for file in libraries:
        if any(part in file.name for part in ("ascend", "collective", "profiler")):
            for text in _output("strings", "-n", "5", file).splitlines():
                if LOOKED_UP.match(text):
                    names |= {text, f"{text}GetWorkspaceSize"} if text.startswith("aclnn") else {text}
    return names


def _function(name: str) -> str:
    """A function of that name in C."""
    if name in SPECIAL:
        return SPECIAL[name].replace("NAME", name)
    if re.match(r"cu(da|dnn|blas|solver|sparse|fft|rand)\w*Create", name):
        return CREATES.replace("NAME", name)
    return f"long {name}(void) {{ return 0; }}"


def _compile(*arguments: Path | str) -> None:
    subprocess.run([TOOLS[0], "-fPIC", "-w", "-fno-builtin", *arguments], check=True)


def _link(library: Path, *arguments: Path | str) -> None:
    _compile("-shared", f"-Wl,-soname,{library.name}", "-o", library, *arguments)


@functools.cache
def _output(*command: str | Path) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, errors="replace", check=True).stdout
