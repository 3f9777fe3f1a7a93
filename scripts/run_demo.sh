#!/usr/bin/env bash
# Edits the sample picture with the demo checkpoint: one command from a fresh clone to demo-output/edit.png.
# The first run makes .venv and installs the project into it. Extra arguments go to `mindiffedit demo`.
set -euo pipefail

. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

prepare_environment
cd "$PROJECT"
exec "$VENV/bin/mindiffedit" demo -o demo-output "$@"
