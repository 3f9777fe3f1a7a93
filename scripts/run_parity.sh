#!/usr/bin/env bash
# The whole parity matrix against live diffusers, graph mode and PyNative side by side, one core each, and the
# table of what was measured, as docs/parity.md holds it. Arguments go to scripts/parity_table.py
# (`--write docs/parity.md` puts the table there).
set -euo pipefail

. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

prepare_environment test
cd "$PROJECT"
RESULTS="$(mktemp -d)"
trap 'rm -rf "$RESULTS"' EXIT

cores="$(nproc)"  # before the next line, which it would obey
# One thread each: the thread pools of two frameworks in two processes would spin against each other.
export OMP_NUM_THREADS=1

# run MODE CORE PYTEST-ARGUMENTS...
run() {
    local mode="$1" core="$2" pinned=()
    shift 2
    if [ "$cores" -gt 1 ] && command -v taskset >/dev/null 2>&1; then
        pinned=(taskset -c "$core")
    fi
    MINDIFFEDIT_PARITY_RESULTS="$RESULTS/$mode.jsonl" "${pinned[@]}" "$VENV/bin/python" -m pytest --slow -q \
        -p no:cacheprovider tests/test_parity.py "$@" >"$RESULTS/$mode.log" 2>&1
}

run graph 0 -k "graph" &
graph=$!
run pynative 1 -k "pynative" &
pynative=$!
failed=0
wait "$graph" || failed=1
wait "$pynative" || failed=1
tail -n 25 "$RESULTS/graph.log" "$RESULTS/pynative.log" >&2
"$VENV/bin/python" scripts/parity_table.py "$@" "$RESULTS"/*.jsonl
exit "$failed"
