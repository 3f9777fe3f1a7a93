#!/usr/bin/env bash
# Runs the tests in the project's own environment, two at a time; arguments go to pytest:
# `scripts/run_tests.sh -k mask`, `scripts/run_tests.sh --slow`, `scripts/run_tests.sh --tools -m tools`.
# The first run makes .venv and installs the project with what tests compare against (torch, diffusers).
set -euo pipefail

. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

prepare_environment test
cd "$PROJECT"
exec "$VENV/bin/python" -m pytest -n 2 --dist worksteal "$@"
