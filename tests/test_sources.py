"""Rules about our own source that no run would show: portable operators, and who imports whom.

The operator rule: every MindSpore name that the package uses states in its documentation that it runs on
Ascend, GPU and CPU. What it may use besides stands in `ALLOWED`, each with its reason.
"""

import ast
import graphlib
import importlib
import inspect
import pathlib
import re
import subprocess
import sys

import mindspore

import mindiffedit

PACKAGE = pathlib.Path(mindiffedit.__file__).parent
SOURCES = {
    path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))
}
PLATFORMS = {"Ascend", "GPU", "CPU"}

REPLACED = "replaced, by `runtime.kernels`, where its kernel is missing"
NO_KERNEL = "asks or configures, runs no operator"
DATA = "holds data, runs no operator"
PROBED = "called to find out whether its kernel is there"

TENSORS = ("mindspore.Tensor", "mindspore.tensor", "mindspore.common.tensor.Tensor")

# File, or "" for every file: the names that it may use besides, and why.
ALLOWED = {
    "": {
        NO_KERNEL: ["mindspore.get_context", "mindspore.set_context", "mindspore.set_device"],
        DATA: ["mindspore.Tensor", "mindspore.Tensor.asnumpy", "mindspore.Parameter"],
    },
    "checkpoints/models.py": {
        NO_KERNEL: ["mindspore.nn.utils.no_init_parameters"],
        DATA: ["mindspore.Tensor.from_numpy"],
    },
    "checkpoints/freeu.py": {"makes constants while a graph is compiled": ["mindspore.ops.constexpr"]},
    "runtime/devices.py": {
        NO_KERNEL: [
            "mindspore.common.api._pynative_executor.sync",
            "mindspore.hal.get_device_properties",
            "mindspore.log._get_logger",
        ]
    },
    "runtime/graphs.py": {
        NO_KERNEL: [
            "mindspore.common.api.JitExecutor_.get_instance",
            "mindspore.common.api.ms_compile_cache.difference_update",
        ]
    },
    "runtime/launches.py": {
        REPLACED: [
            "mindspore.mint.chunk",
            "mindspore.mint.split",
            *(f"mindspore.mint.nn.functional.{name}" for name in "conv2d embedding layer_norm".split()),
        ],
        "makes constants while a graph is compiled": ["mindspore.ops.constexpr"],
        "asked for on Ascend alone": [
            "mindspore.ops.auto_generate.SplitTensor",
            "mindspore.ops.operations.nn_ops.FlashAttentionScore",
        ],
    },
    "solvers/formulas.py": {REPLACED: ["mindspore.mint.split"]},
    "runtime/kernels.py": {
        PROBED: [
            *(
                f"mindspore.mint.nn.functional.{name}"
                for name in "gelu conv2d layer_norm embedding pad normalize".split()
            ),
            *(f"mindspore.mint.{name}" for name in "tanh arange zeros_like mm round stack split chunk".split()),
        ]
    },
}
ALLOWED = {file: {name for names in reasons.values() for name in names} for file, reasons in ALLOWED.items()}

# Run no operator of a model: all their names are allowed.
EXEMPT = {
    "runtime/compile_cache.py": "speaks to MindSpore's compiler; off unless asked for where it was not tried",
    "runtime/graph_keys.py": "describes graphs for it",
}


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


def complaints(source: str, file: str = "") -> list:
    """What in `source` is neither documented for every platform nor allowed."""
    problems = []
    for name, line in used_names(source).items():
        if name in ALLOWED[""] or name in ALLOWED.get(file, ()):
            continue
        stated = platforms(name)
        if stated is None:
            problems.append(f"{file}:{line}: {name} states no platforms")
        elif not stated >= PLATFORMS:
            problems.append(f"{file}:{line}: {name} runs on {', '.join(sorted(stated)) or 'nothing'} only")
    return problems


def test_every_mindspore_name_runs_on_every_platform():
    problems = [one for file, source in SOURCES.items() if file not in EXEMPT for one in complaints(source, file)]
    assert not problems, "\n".join(problems)


def test_what_is_allowed_is_used():
    for file in ALLOWED.keys() - {""}:
        assert not ALLOWED[file] - used_names(SOURCES[file]).keys(), f"{file}: allowed, and not used: take it out"


PLANTED = {
    "mint.stack": "import mindspore as ms\nms.mint.stack([x])",
    "mint.nn.Conv2d": "from mindspore import mint as m\nm.nn.Conv2d(1, 1, 1)",
    "mint.arange": "from mindspore.mint import arange as count\ncount(3)",
    "functional.pad": "import mindspore.mint.nn.functional as F\nF.pad(x, (1, 1))",
    "ops.conv2d": "def f(x):\n    from mindspore import ops\n    ops.conv2d(x, x)",
    "functional.mish": "from mindspore import mint\nF = mint.nn.functional\nG = F\nG.mish(x)",
    "mint.baddbmm": "from mindspore import mint\nrun(mint.baddbmm)",
    "mint.einsum": "from mindspore import mint\n@mint.einsum\ndef f(): pass",
    "Tensor.repeat": "from mindspore import ops\ny = ops.exp(x)\ny.repeat(2)",
    "Tensor.clone": "import mindspore\ndef f(x: mindspore.Tensor):\n    x.clone()",
    "ops.no_such": "from mindspore import ops\nops.no_such(x)",
}
FINE = [
    "from mindspore import ops\nops.add(ops.exp(x), ops.Conv2D(1, 1)(x, w))",
    "import mindspore as ms\nms.Tensor([1], ms.float32).reshape(1).sum()",
    "import mindspore\n@mindspore.jit\ndef f(x: mindspore.Tensor) -> mindspore.Tensor:\n    return x",
    "from mindspore import mint\nF = mint.nn",
    "import mindspore\nmindspore.__version__.split('.')",
    "import numpy as mint\nmint.stack([x])",
]


def test_the_rule_finds_what_it_should_and_nothing_else():
    for name, source in PLANTED.items():
        problems = complaints(source)
        assert len(problems) == 1 and name in problems[0], (name, problems)
    for source in FINE:
        assert not complaints(source), source


# --- the layers ---------------------------------------------------------------------------------------------

# Top to bottom. A file imports from its own folder and from lower lines; those of one line do not import each other,
# but for `cli` and `service`: the service takes the command line's options, and its verbs start the service.
LAYERS = """
__init__, __main__, _moved
cli, service
parity, text
pipeline
editing
stages
checkpoints
solvers
runtime
inputs
diffedit
masks
images
noise
options
outputs, arrays
errors, demo
"""
FLOOR = {unit: i for i, line in enumerate(LAYERS.strip().splitlines()) for unit in line.split(", ")}
TOGETHER = {"cli", "service"}


def imports(source: str) -> set:
    """Dotted names that `source` imports, anywhere in it, by statement or by `import_module`."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{'.' * node.level}{node.module or ''}.{name.name}" for name in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names |= {node.args[0].value} if isinstance(node.args[0], ast.Constant) else set()
    return names


def module_of(name: str, modules: set) -> str:
    """`masks` for `mindiffedit.masks.MaskOptions`, `__init__` for a name of the package's own."""
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in modules:
        parts.pop()
    return ".".join(parts) or "__init__"


def wrong_directions(sources: dict) -> list:
    """Imports that lead up or to a neighbour, modules of no layer, and circles of modules, as sentences."""
    files = {
        path.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): source for path, source in sources.items()
    }
    modules, problems, graph = files.keys() | {"__init__"}, [], {}
    for module, source in files.items():
        unit = module.partition(".")[0]
        if unit not in FLOOR:
            problems.append(f"{module} is in no layer")
            continue
        graph[module] = set()
        for name in imports(source) - {"mindiffedit.__version__"}:
            if name.startswith("."):
                problems.append(f"{module}: {name} is relative")
            if name.partition(".")[0] != "mindiffedit":
                continue
            target = module_of(name, modules)
            other = target.partition(".")[0]
            if other == unit or {other, unit} == TOGETHER:  # no circle of modules, still
                graph[module].add(target)
            elif FLOOR.get(other, -1) <= FLOOR[unit] and FLOOR[unit]:
                problems.append(f"{module} imports {name}, which is not below it")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        problems.append("a circle: " + ", ".join(error.args[1]))
    return problems


def test_imports_lead_down():
    problems = wrong_directions(SOURCES)
    assert not problems, "\n".join(problems)


def test_imports_that_lead_elsewhere_are_found():
    start = "import numpy\nfrom mindiffedit import __version__, errors\n"
    for file, line, wrong in (
        ("masks.py", "from mindiffedit.images.pictures import x\nimport mindiffedit.noise", 0),
        ("masks.py", "def f():\n    from mindiffedit import pipeline", 1),
        ("masks.py", "from mindiffedit import load_image", 1),
        ("images/a.py", "import importlib\nimportlib.import_module('mindiffedit.cli')", 1),
        ("outputs.py", "import mindiffedit.arrays", 1),
        ("text/a.py", "import mindiffedit.parity.report", 1),
        ("images/a.py", "from . import b", 1),
        ("helpers.py", "", 1),
        ("images/b.py", "from mindiffedit.images import c", 1),
        ("service/a.py", "import mindiffedit.cli", 0),
        ("service/b.py", "import mindiffedit.service.c", 1),
        ("__init__.py", "import mindiffedit.cli", 0),
    ):
        names = "arrays cli/__init__ errors images/pictures masks noise/__init__ parity/report pipeline".split()
        sources = {f"{name}.py": "" for name in names}
        sources["images/c.py"] = "from mindiffedit.images.d import x"
        sources["images/d.py"] = "def f():\n    import mindiffedit.images.b"
        sources["images/b.py"] = ""
        sources["service/c.py"] = "import mindiffedit.cli.d"
        sources["cli/d.py"] = "def f():\n    import mindiffedit.service.b"
        sources["service/b.py"] = ""
        sources[file] = start + line
        assert len(wrong_directions(sources)) == wrong, (file, line, wrong_directions(sources))


def test_few_modules_stand_beside_the_folders():
    names = {file for file in SOURCES if "/" not in file}
    assert len(names) <= 12, sorted(names)


# --- frameworks ---------------------------------------------------------------------------------------------

# These load a framework when they are imported. No other does: help is quick, and a recording can be read where
# there is none.
LOADING = {
    "checkpoints.freeu",
    "checkpoints.step_cache",
    "editing",
    "parity.floors",
    "parity.formulas",
    "parity.reference",
    "pipeline",
    "runtime.exact_mint",
    "runtime.graphs",
    "runtime.kernels",
    "runtime.launches",
    "runtime.native.layers",
    "runtime.native.operators",
    "runtime.portable",
    "solvers.formulas",
    "solvers.schedulers",
    "solvers.solver",
    "stages",
    "text.decoding",
}
# The half of the parity tool that runs the reference, for `parity record` alone.
RECORDING = {"parity/reference.py", "parity/formulas.py", "cli/parity.py"}

IMPORT_WITHOUT_FRAMEWORKS = """
import importlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("mindspore", "mindone", "torch", "diffusers", "transformers"):
            raise ImportError(f"no {name}")

sys.meta_path.insert(0, Absent())
for name in sys.argv[1:]:
    try:
        importlib.import_module(f"mindiffedit.{name}")
    except ImportError:
        print(name)
"""


def test_modules_that_load_no_framework():
    modules = [file.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for file in SOURCES]
    modules = [module for module in modules if not module.startswith("_")]
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_WITHOUT_FRAMEWORKS, *modules], capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) == LOADING


def test_only_recordings_need_the_reference():
    for file, source in SOURCES.items():
        tops = {name.partition(".")[0] for name in imports(source)}
        assert bool(tops & {"torch", "diffusers"}) == (file in RECORDING), file
        assert file not in RECORDING or not tops & {"mindspore", "mindone"}, file
