#!/usr/bin/env bash
# Opens the page to edit in, with the demo checkpoint: one command from a fresh clone to http://127.0.0.1:7860.
# The first run makes .venv and installs the project into it. Arguments go to `mindiffedit ui`.
set -euo pipefail

. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

prepare_environment serve
cd "$PROJECT"
exec "$VENV/bin/mindiffedit" ui "$@"
