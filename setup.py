"""Builds the C++ kernels. What the package is and needs stands in pyproject.toml."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

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
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # noqa: UP022
    if result.returncode:
        lines = [line for line in result.stdout.splitlines() if "error" in line] or [f"exit status {result.returncode}"]
        raise RuntimeError(f"{command[0]}: {lines[0]}")


setup(
    cmdclass={"build_ext": BuildNative},
    ext_modules=[Extension("mindiffedit.runtime.native.libmindiffedit", sources=[f"{NATIVE}/operators.cpp"])],
)
