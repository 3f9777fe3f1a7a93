"""Packaging of mindiffedit. Why each odd version bound is what it is stands beside it."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent


def demo_files():
    """The demo checkpoint and the sample picture, relative to the package."""
    package = HERE / "mindiffedit"
    found = (path for path in (package / "demo").rglob("*") if path.is_file())
    return sorted(
        path.relative_to(package).as_posix()
        for path in found
        if path.suffix not in (".py", ".pyc") and "__pycache__" not in path.parts
    )


REQUIRES = [
    # 2.9 and 2.10 install and run, but on CPU their convolutions fall into oneDNN's reference kernel: a 3x3
    # convolution of 320 channels takes 5 s there instead of 0.04 s. mindone 0.5.0 wants 2.6 at least; 2.7 is
    # the oldest that we have run.
    "mindspore>=2.7,<2.9",
    # The models, the text encoder and the schedulers. Exact because `mindiffedit.runtime.kernels` replaces operators
    # by the names that this release's model code calls.
    "mindone==0.5.0",
    # Tokenizer and image processor; mindone 0.5.0 asks for exactly this one. It is said again here because
    # pip would otherwise download a newer release first, find that it does not fit, and go back.
    "transformers==4.57.1",
    # MindSpore and mindone are both built against the NumPy 1 interface.
    "numpy>=1.22,<2",
    # Gaussians, regions and distances in masks. MindSpore asks for the same.
    "scipy>=1.5.4",
    # 10.1 is the first with a scalable built-in font, used for the captions of picture grids.
    "pillow>=10.1",
    # Pictures behind URLs; huggingface_hub asks for it as well. urllib3 2.2 is the first whose answers can be read as they
    # come, so that a slow one can be given up.
    "requests>=2.32",
    "urllib3>=2.2",
    # transformers 4.57 does not work with the 1.0 series.
    "huggingface_hub>=0.34,<1.0",
    "safetensors>=0.4.3",
    # Tells weights that have changed, at the speed of the memory; 3.0 is the first with one call for a digest.
    "xxhash>=3",
    # Not used by us: mindone asks for it without a bound, and from 4.12 on it wants NumPy 2. Without this
    # line pip downloads four or five releases, 70 MB each, before it finds one that fits.
    "opencv-python<4.12",
]

# The reference implementation, to compare with and to train the demo checkpoint; the package never imports
# it. torch by exact version: an index can offer a CPU build under the same version, and the exact version
# takes it where a bare `torch` takes the newest release, which on Linux brings several gigabytes of CUDA
# libraries. diffusers 0.35.2: later releases move the DiffEdit pipeline away; transformers 4.57 fits it.
REFERENCE = ["torch==2.13.0", "diffusers==0.35.2"]

# The documentation's site. mkdocs 1.6 is the first with generated pages, mkdocs 2 another program. black breaks the
# API page's long signatures into lines.
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.5,<10", "mkdocstrings[python]>=0.29,<2", "black"]

NATIVE = "mindiffedit/runtime/native"

# Contraction to fused multiply-add, and no errno, keep IEEE's rules for NaN and infinity; -ffast-math would not.
COMPILE = (
    "-std=c++17 -O3 -fPIC -pthread -fvisibility=hidden -fno-rtti -fno-math-errno -ffp-contract=fast -Wno-psabi"
).split()

# The kernels are compiled once for each; operators.cpp chooses when it runs.
INSTRUCTION_SETS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS["avx2"] = "-mavx2 -mfma".split()
    INSTRUCTION_SETS["avx512"] = "-mavx2 -mfma -mavx512f -mavx512dq -mavx512bw -mavx512vl".split()


class BuildNative(build_ext):
    """Builds the C++ kernels if it can; the package works without them.

    The compiler is called directly: setuptools would compile each source once, with Python's own flags.
    """

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"  # not a Python module: no ABI in its name

    def build_extensions(self):
        for extension in list(self.extensions):
            target = Path(self.get_ext_fullpath(extension.name))
            try:
                self.build_library(target)
            except Exception as error:
                # Nothing is to be copied or installed; an older build would not fit these sources.
                self.extensions.remove(extension)
                target.unlink(missing_ok=True)
                print(
                    "mindiffedit: the optional C++ kernels were not built, MindSpore's operators are used "
                    f"instead ({error})",
                    file=sys.stderr,
                )

    def copy_extensions_to_source(self):
        if not self.extensions:
            Path(NATIVE, "libmindiffedit.so").unlink(missing_ok=True)
        super().copy_extensions_to_source()

    def build_library(self, target):
        compiler = self.cxx()
        folder = Path(self.build_temp) / "native"
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        objects, defines = [], []
        for name, flags in INSTRUCTION_SETS.items():
            output = folder / f"kernels_{name}.o"
            command = [*compiler, *COMPILE, *flags, f"-DKERNELS=kernels_{name}"]
            try:
                run([*command, "-c", f"{NATIVE}/kernels.cpp", "-o", str(output)])
            except RuntimeError:
                if name == "baseline":
                    raise
                continue  # a compiler too old for it
            objects.append(str(output))
            if name != "baseline":
                defines.append(f"-DWITH_{name.upper()}")
        for name in ("operators", "threads"):
            objects.append(str(folder / f"{name}.o"))
            run([*compiler, *COMPILE, *defines, "-c", f"{NATIVE}/{name}.cpp", "-o", objects[-1]])
        run([*compiler, "-shared", "-pthread", *objects, "-o", str(target)])

    def cxx(self):
        """The C++ compiler's command: $CXX, or the first that is found."""
        if os.environ.get("CXX"):
            return shlex.split(os.environ["CXX"])
        for name in ("c++", "g++", "clang++"):
            if shutil.which(name):
                return [name]
        raise RuntimeError("no C++ compiler found: tried c++, g++, clang++; CXX names another")


def run(command):
    """Run a compiler; RuntimeError with its first line of complaint where it fails."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        lines = [line for line in result.stdout.splitlines() if "error" in line] or [f"exit status {result.returncode}"]
        raise RuntimeError(f"{command[0]}: {lines[0]}")


setup(
    name="mindiffedit",
    version="0.1.0",
    description="Text-driven picture editing (DiffEdit) on MindSpore, in graph mode: Ascend, GPU and CPU",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.9,<3.13",  # the Pythons that MindSpore has wheels for
    packages=find_packages(include=["mindiffedit", "mindiffedit.*"]),
    package_data={"mindiffedit": demo_files()},
    cmdclass={"build_ext": BuildNative},
    ext_modules=[Extension("mindiffedit.runtime.native.libmindiffedit", sources=[f"{NATIVE}/operators.cpp"])],
    install_requires=REQUIRES,
    extras_require={
        "benchmark": ["matplotlib>=3.5"],  # for `scripts/benchmark.py --scaling`, which draws
        "docs": DOCS,
        "parity": REFERENCE,  # for `mindiffedit parity record`; checking needs none of it
        # peft: diffusers runs LoRA with it; the release of diffusers 0.35.2's time.
        "test": [*REFERENCE, *DOCS, "peft==0.17.1", "pytest>=7"],
        "train": REFERENCE,
    },
    entry_points={"console_scripts": ["mindiffedit=mindiffedit.__main__:program"]},
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Multimedia :: Graphics",
    ],
)
