#!/usr/bin/env bash
# Compiles all graphs for Ascend and GPU, on a machine that has neither, and judges them; see scripts/audit_devices.py,
# to which arguments go (`--target Ascend --dtype float16`, `--model sd15 --size 512`, `--write` for the tables).
set -euo pipefail

. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

prepare_environment test
cd "$PROJECT"
exec "$VENV/bin/python" scripts/audit_devices.py "$@"
