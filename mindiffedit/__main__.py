"""The program ``mindiffedit``; ``python -m mindiffedit`` is the same."""

import os
import sys

from mindiffedit.cli.command import main
from mindiffedit.runtime import quick_imports


def program() -> int:
    """``main`` in a process of its own, whose surroundings are ours to set."""
    if sys.argv[1:3] != ["parity", "record"]:
        # Where torch is installed, transformers would import it, for seconds; only its tokenizer is used here.
        os.environ.setdefault("USE_TORCH", "0")
        quick_imports.install()
    # MindSpore's warnings are for its developers, and the others' are advice to install torch.
    os.environ.setdefault("GLOG_v", "3")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("DIFFUSERS_NO_ADVISORY_WARNINGS", "1")
    return main()


if __name__ == "__main__":
    sys.exit(program())
