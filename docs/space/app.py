"""The page as a Space: what a hub's machine starts. It listens on the port that hubs forward."""

import os
import sys

from mindiffedit.__main__ import program

sys.argv[1:] = ["ui", "--host", "0.0.0.0", "--port", "7860", "--model", os.environ.get("MINDIFFEDIT_MODEL", "demo")]
sys.exit(program())
