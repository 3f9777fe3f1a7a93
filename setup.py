"""Packaging of mindiffedit. Why each odd version bound is what it is stands beside it."""

from pathlib import Path

from setuptools import find_packages, setup

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
    # The models, the text encoder and the schedulers. Exact because `mindiffedit.kernels` replaces operators
    # by the names that this release's model code calls.
    "mindone==0.5.0",
    # Tokenizer and image processor; mindone 0.5.0 asks for exactly this one. It is said again here because
    # pip would otherwise download a newer release first, find that it does not fit, and go back.
    "transformers==4.57.1",
    # MindSpore and mindone are both built against the NumPy 1 interface.
    "numpy>=1.22,<2",
    # 10.1 is the first with a scalable built-in font, used for the captions of picture grids.
    "pillow>=10.1",
    # transformers 4.57 does not work with the 1.0 series.
    "huggingface_hub>=0.34,<1.0",
    "safetensors>=0.4.3",
    # Not used by us: mindone asks for it without a bound, and from 4.12 on it wants NumPy 2. Without this
    # line pip downloads four or five releases, 70 MB each, before it finds one that fits.
    "opencv-python<4.12",
]

# The reference implementation, to compare with and to train the demo checkpoint; the package never imports
# it. torch by exact version: an index can offer a CPU build under the same version, and the exact version
# takes it where a bare `torch` takes the newest release, which on Linux brings several gigabytes of CUDA
# libraries. diffusers 0.35.2: later releases move the DiffEdit pipeline away; transformers 4.57 fits it.
REFERENCE = ["torch==2.13.0", "diffusers==0.35.2"]

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
    install_requires=REQUIRES,
    extras_require={
        "parity": REFERENCE,  # for `mindiffedit parity record`; checking needs none of it
        "test": [*REFERENCE, "pytest>=7"],
        "train": REFERENCE,
    },
    entry_points={"console_scripts": ["mindiffedit=mindiffedit.cli:main"]},
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Multimedia :: Graphics",
    ],
)
