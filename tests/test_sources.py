"""Rules about our own source that no run would show: portable operators, and which module may import what.

The operator rule: every MindSpore name that the package uses states in its documentation that it runs on
Ascend, GPU and CPU. What it may use besides stands in `ALLOWED`, each with its reason.
"""

import ast
import importlib
import inspect
import pathlib
import re

import mindspore
import pytest

import mindiffedit

PACKAGE = pathlib.Path(mindiffedit.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
PLATFORMS = {"Ascend", "GPU", "CPU"}

NO_KERNEL = "asks or configures, runs no operator"
DATA = "holds data, runs no operator"
PROBED = "called to find out whether its kernel is there"

TENSORS = ("mindspore.Tensor", "mindspore.tensor", "mindspore.common.tensor.Tensor")

# (file, name) or name -> reason. A name alone is allowed in every file.
ALLOWED = {
    "mindspore.get_context": NO_KERNEL,
    "mindspore.set_context": NO_KERNEL,
    "mindspore.set_device": NO_KERNEL,
    "mindspore.Tensor": DATA,
    "mindspore.Tensor.asnumpy": DATA,
    "mindspore.Parameter": DATA,
    ("models.py", "mindspore.nn.utils.no_init_parameters"): NO_KERNEL,
    ("freeu.py", "mindspore.ops.constexpr"): "makes constants while a graph is compiled, runs no operator",
    ("devices.py", "mindspore.common.api._pynative_executor.sync"): NO_KERNEL,
    ("devices.py", "mindspore.log._get_logger"): NO_KERNEL,
    ("graphs.py", "mindspore.common.api.JitExecutor_.get_instance"): NO_KERNEL,
    ("graphs.py", "mindspore.common.api.ms_compile_cache.difference_update"): NO_KERNEL,
    ("kernels.py", "mindspore.mint.nn.functional.gelu"): PROBED,
    ("kernels.py", "mindspore.mint.tanh"): PROBED,
    ("kernels.py", "mindspore.mint.nn.functional.conv2d"): PROBED,
    ("kernels.py", "mindspore.mint.nn.functional.layer_norm"): PROBED,
    ("kernels.py", "mindspore.mint.nn.functional.embedding"): PROBED,
    ("kernels.py", "mindspore.mint.nn.functional.pad"): PROBED,
    ("kernels.py", "mindspore.mint.nn.functional.normalize"): PROBED,
    ("kernels.py", "mindspore.mint.arange"): PROBED,
    ("kernels.py", "mindspore.mint.zeros_like"): PROBED,
    ("kernels.py", "mindspore.mint.mm"): PROBED,
    ("kernels.py", "mindspore.mint.round"): PROBED,
    ("kernels.py", "mindspore.mint.stack"): PROBED,
    ("kernels.py", "mindspore.mint.split"): PROBED,
    ("kernels.py", "mindspore.mint.chunk"): PROBED,
}

# Files that run no operator of a model: all their names are allowed.
FILES = {"compile_cache.py": "speaks to MindSpore's compiler; off unless asked for where it was not tried"}


# --- the operator rule --------------------------------------------------------------------------------------


def used_names(source: str) -> dict:
    """MindSpore names that `source` loads, as {dotted name: first line}.

    Followed are imports anywhere in the file, under any alias, and plain assignments of such a name to
    another (`F = mint.nn.functional`). Tensor methods are found where the receiver is known to be a tensor:
    a call of an operator or of Tensor, a name that was assigned one, or an argument annotated as Tensor.
    Modules, dtypes and annotations are left out.
    """
    tree = ast.parse(source)
    aliases = _aliases(tree)
    annotations = {id(part) for note in _annotations(tree) for part in ast.walk(note)}
    tensors = _tensor_names(tree, aliases)
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    found: dict = {}
    for node in ast.walk(tree):
        if id(node) in annotations:
            continue
        if isinstance(node, (ast.Name, ast.Attribute)) and id(node) not in inner:
            name = _resolve(node, aliases)
            if name is not None and isinstance(node.ctx, ast.Load) and _is_api(name):
                found.setdefault(_first_callable(name), node.lineno)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if _is_tensor(node.func.value, aliases, tensors):
                found.setdefault(f"mindspore.Tensor.{node.func.attr}", node.lineno)
    return found


def _aliases(tree: ast.AST) -> dict:
    """Local name -> dotted MindSpore name, from imports and plain assignments."""
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] == "mindspore":
                    aliases[name.asname or "mindspore"] = name.name if name.asname else "mindspore"
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] == "mindspore":
            for name in node.names:
                aliases[name.asname or name.name] = f"{node.module}.{name.name}"
    for _ in range(3):  # an alias of an alias of an alias is enough
        for node in ast.walk(tree):
            if _assigns_a_name(node):
                name = _resolve(node.value, aliases)
                if name is not None:
                    aliases.setdefault(node.targets[0].id, name)
    return aliases


def _assigns_a_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)


def _resolve(node: ast.AST, aliases: dict):
    """Dotted MindSpore name of `a.b.c`, or None."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in aliases:
        return None
    return ".".join([aliases[node.id], *reversed(parts)])


def _annotations(tree: ast.AST):
    for node in ast.walk(tree):
        for field in ("annotation", "returns"):
            note = getattr(node, field, None)
            if isinstance(note, ast.AST):
                yield note


def _is_tensor(node: ast.AST, aliases: dict, tensors: set) -> bool:
    if isinstance(node, ast.Name):
        return node.id in tensors
    if isinstance(node, ast.BinOp):
        return _is_tensor(node.left, aliases, tensors) or _is_tensor(node.right, aliases, tensors)
    if not isinstance(node, ast.Call):
        return False
    name = _resolve(node.func, aliases)
    if name is None:
        return isinstance(node.func, ast.Call) and _is_tensor(node.func, aliases, tensors)
    return name in TENSORS or name.startswith(("mindspore.ops.", "mindspore.mint."))


def _tensor_names(tree: ast.AST, aliases: dict) -> set:
    """Names that are tensors wherever they occur in the file: assigned or annotated so, and nothing else."""
    tensors, others = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.annotation is not None:
            is_tensor = _resolve(node.annotation, aliases) in TENSORS
            (tensors if is_tensor else others).add(node.arg)
    for node in ast.walk(tree):
        if _assigns_a_name(node):
            is_tensor = _is_tensor(node.value, aliases, tensors)
            (tensors if is_tensor else others).add(node.targets[0].id)
    return tensors - others


def _walk(name: str):
    """The object of a name up to its first callable, and that name's length; None where it is not there."""
    parts = name.split(".")
    value = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], start=2):
        if hasattr(value, part):
            value = getattr(value, part)
        else:
            try:
                value = importlib.import_module(".".join(parts[:i]))
            except ImportError:
                return None
        if callable(value) and not inspect.ismodule(value):
            return value, i
    return value, len(parts)


def _first_callable(name: str) -> str:
    """`mindspore.Tensor.shape` is a use of `mindspore.Tensor`: the name up to the first class or function."""
    walked = _walk(name)
    value, length = walked if walked else (None, None)
    if isinstance(value, type) and len(name.split(".")) > length:
        return name
    return ".".join(name.split(".")[:length])


def _is_api(name: str) -> bool:
    """Whether a name can run something. One that is not there may: it is reported like an unsupported one."""
    walked = _walk(name)
    if walked is None:
        return True
    value, _ = walked
    is_dtype = isinstance(value, type(mindspore.float32))
    is_pythons_own = isinstance(getattr(value, "__self__", None), str)  # mindspore.__version__.split
    return callable(value) and not inspect.ismodule(value) and not is_dtype and not is_pythons_own


def platforms(name: str):
    """Platforms that the documentation of a dotted name states, None where it states none.

    A Tensor method's page may only point to the function's. Where a page has several variants with
    statements of their own, the weakest counts.
    """
    value = importlib.import_module("mindspore")
    for part in name.split(".")[1:]:
        value = getattr(value, part, None)
    text = inspect.getdoc(value) or ""
    stated = re.findall(r"Supported Platforms:\s*\n((?:\s*``\w+``[ ,]*)+)", text)
    if stated:
        return set.intersection(*({p for p in re.findall(r"``(\w+)``", line)} for line in stated))
    pointer = re.search(r":func:`(mindspore\.[\w.]+)`", text)
    if pointer and pointer.group(1) != name:
        return platforms(pointer.group(1))
    return None


def complaints(source: str, file: str, allowed=None) -> list:
    """What in `source` is neither documented for every platform nor allowed."""
    allowed = ALLOWED if allowed is None else allowed
    problems = []
    for name, line in used_names(source).items():
        if name in allowed or (file, name) in allowed:
            continue
        stated = platforms(name)
        if stated is None:
            problems.append(f"{file}:{line}: {name} states no platforms")
        elif not stated >= PLATFORMS:
            problems.append(f"{file}:{line}: {name} runs on {', '.join(sorted(stated)) or 'nothing'} only")
    return problems


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(PACKAGE)) for path in SOURCES])
def test_every_mindspore_name_runs_on_every_platform(path):
    file = str(path.relative_to(PACKAGE))
    if file in FILES:
        return
    assert not complaints(path.read_text(encoding="utf-8"), file)


def test_allowed_names_are_used_and_explained():
    used = {}
    for path in SOURCES:
        used[str(path.relative_to(PACKAGE))] = used_names(path.read_text(encoding="utf-8"))
    for entry, reason in ALLOWED.items():
        assert len(reason) > 10, entry
        if isinstance(entry, tuple):
            assert entry[1] in used.get(entry[0], {}), f"{entry} is allowed but not used: take it out"


PLANTED = {
    "an operator of Ascend only": ("import mindspore\nmindspore.mint.stack([x])", "mint.stack"),
    "under an alias": ("import mindspore as ms\nms.mint.stack([x])", "mint.stack"),
    "imported from": ("from mindspore import mint as m\nm.nn.Conv2d(1, 1, 1)", "mint.nn.Conv2d"),
    "imported by itself": ("from mindspore.mint import arange as count\ncount(3)", "mint.arange"),
    "a submodule's alias": ("import mindspore.mint.nn.functional as F\nF.pad(x, (1, 1))", "functional.pad"),
    "imported inside": ("def f(x):\n    from mindspore import ops\n    ops.conv2d(x, x)", "ops.conv2d"),
    "assigned": ("from mindspore import mint\nF = mint.nn.functional\nG = F\nG.mish(x)", "functional.mish"),
    "not called here": ("from mindspore import mint\nrun(mint.baddbmm)", "mint.baddbmm"),
    "a decorator": ("from mindspore import mint\n@mint.einsum\ndef f(): pass", "mint.einsum"),
    "a tensor's method": ("import mindspore as ms\nms.Tensor([1.0]).repeat(2)", "Tensor.repeat"),
    "a known name's method": ("from mindspore import ops\ny = ops.exp(x)\ny.repeat(2)", "Tensor.repeat"),
    "an argument's method": ("import mindspore\ndef f(x: mindspore.Tensor):\n    x.clone()", "Tensor.clone"),
    "a name that is not there": ("from mindspore import ops\nops.no_such(x)", "ops.no_such"),
}


@pytest.mark.parametrize("case", PLANTED)
def test_the_rule_finds_what_it_should(case):
    source, name = PLANTED[case]
    problems = complaints(source, "planted.py", allowed={"mindspore.Tensor": DATA})
    assert len(problems) == 1 and name in problems[0] and problems[0].startswith("planted.py:"), problems


@pytest.mark.parametrize(
    "source",
    [
        "from mindspore import ops\nops.add(ops.exp(x), ops.Conv2D(1, 1)(x, w))",
        "import mindspore as ms\nms.Tensor([1], ms.float32).reshape(1).sum()",
        "import mindspore\n@mindspore.jit\ndef f(x: mindspore.Tensor) -> mindspore.Tensor:\n    return x",
        "from mindspore import mint\nF = mint.nn",
        "import mindspore\nmindspore.__version__.split('.')",
        "import numpy as mint\nmint.stack([x])",
        "from .mint import stack\nstack([x])",
    ],
)
def test_the_rule_lets_pass_what_it_should(source):
    assert complaints(source, "planted.py", allowed={"mindspore.Tensor": DATA}) == []


# --- the floors ---------------------------------------------------------------------------------------------

# Importing these loads no MindSpore, mindone or torch: the command line's help is quick, and a recording
# can be compared where none of the three is installed.
GROUND = {
    "__init__",
    "arguments",
    "checkpoints",
    "cli",
    "devices",
    "generator",
    "hub",
    "jobs",
    "language_models",
    "latents_file",
    "masks",
    "lora",
    "models",
    "notices",
    "old_configs",
    "options",
    "outputs",
    "parity.case",
    "parity.command",
    "parity.golden",
    "parity.metrics",
    "parity.report",
    "parity.tolerances",
    "pictures",
    "prompts",
    "randomness",
    "regularisers",
    "runs",
    "saving",
    "schedules",
    "single_file",
    "strips",
    "survey",
    "sweeps",
    "tiling",
    "textual_inversion",
    "tokenizer_files",
    "weight_files",
}
# The half of the parity tool that runs the reference; imported by `parity record` alone.
RECORDING = {"parity/reference.py", "parity/formulas.py", "cli/parity.py"}
HEAVY = {"mindspore", "mindone", "torch", "diffusers", "transformers"}
NEVER = {"torch", "diffusers"}


def imports(source: str, *, package: str = "mindiffedit", everywhere: bool = False) -> set:
    """Dotted names of the modules that `source` imports when it is imported, or anywhere in it.

    `package` is the package it belongs to, to which relative imports refer. `if TYPE_CHECKING:` is not run.
    """
    names = set()

    def visit(node):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and not everywhere:
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and not everywhere:
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            names.update(name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            names.add(base)
            names.update(f"{base}.{name.name}" for name in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return names


def module_name(path: pathlib.Path) -> str:
    parts = [PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def loaded_by(module: str, sources: dict, seen=None) -> dict:
    """Outside modules that importing `module` loads, as {top-level name: the module of ours that does it}."""
    seen = set() if seen is None else seen
    if module in seen or module not in sources:
        return {}
    seen.add(module)
    source, package = sources[module]
    outside = {}
    for name in imports(source, package=package):
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            outside.update(loaded_by(".".join(parts[:i]), sources, seen))
        if parts[0] != PACKAGE.name:
            outside.setdefault(parts[0], module)
    return outside


def our_sources() -> dict:
    sources = {}
    for path in SOURCES:
        name = module_name(path)
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        sources[name] = (path.read_text(encoding="utf-8"), package)
    return sources


@pytest.mark.parametrize("module", sorted(GROUND))
def test_ground_modules_load_no_framework(module):
    name = PACKAGE.name if module == "__init__" else f"{PACKAGE.name}.{module}"
    sources = our_sources()
    if name not in sources:
        pytest.skip(f"there is no {name}")
    heavy = {top: where for top, where in loaded_by(name, sources).items() if top in HEAVY}
    assert not heavy


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(PACKAGE)) for path in SOURCES])
def test_the_package_never_imports_torch_or_diffusers(path):
    tops = {name.split(".")[0] for name in imports(path.read_text(encoding="utf-8"), everywhere=True)}
    if path.relative_to(PACKAGE).as_posix() in RECORDING:
        assert tops & NEVER and not tops & {"mindspore", "mindone"}
    else:
        assert not tops & NEVER


def test_imports_are_found():
    source = """
import a.b, c as d
from e.f import g
from . import h
from .i import j
from ..k import l
if TYPE_CHECKING:
    import torch
try:
    import m
except ImportError:
    m = None
class C:
    import n
def f():
    import o
"""
    now = imports(source, package="top.sub")
    assert {"a.b", "c", "e.f", "m", "n", "top.sub.h", "top.sub.i", "top.k"} <= now
    assert not {"o", "torch"} & now
    assert {"o", "torch"} <= imports(source, package="top.sub", everywhere=True)


def test_loads_are_followed_through_our_modules():
    sources = {
        "mindiffedit": ("", "mindiffedit"),
        "mindiffedit.a": ("from . import b", "mindiffedit"),
        "mindiffedit.b": ("from .c import x\nimport json", "mindiffedit"),
        "mindiffedit.c": ("import torch.nn\nfrom . import a", "mindiffedit"),
        "mindiffedit.d": ("def f():\n    import torch", "mindiffedit"),
    }
    assert loaded_by("mindiffedit.a", sources) == {"torch": "mindiffedit.c", "json": "mindiffedit.b"}
    assert loaded_by("mindiffedit.d", sources) == {}
