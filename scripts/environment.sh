# Sourced by run_demo.sh and run_tests.sh: finds a Python, makes .venv, installs the project into it.
#
#   prepare_environment [EXTRA]   EXTRA: one of the optional dependencies in pyproject.toml, such as "test"
#
# Leaves PROJECT (the project's folder) and VENV (its environment) set. What was installed is remembered in a
# stamp file in .venv; while pyproject.toml, setup.py, the extra and the Python stay the same, nothing is installed again.
# $PYTHON names the interpreter to make .venv with; without it python3.11, python3.12, python3.10 and python3 are tried.

PROJECT="$(CDPATH="" cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$PROJECT/.venv"

say() { printf '%s\n' "$*" >&2; }

fail() {
    say "error: $*"
    exit 1
}

# True for an interpreter that starts and is a version the project is run with.
suits() {
    "$1" -c 'import sys; sys.exit(not ((3, 10) <= sys.version_info[:2] <= (3, 12)))' >/dev/null 2>&1
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        command -v "$PYTHON" >/dev/null 2>&1 || fail "PYTHON is set to '$PYTHON': there is no such command."
        suits "$PYTHON" || fail "PYTHON is set to '$PYTHON', which is" \
            "$("$PYTHON" --version 2>&1 || true); Python 3.10, 3.11 or 3.12 is needed (MindSpore below 2.9 has no" \
            "wheels for later ones)."
        return
    fi
    local candidate
    for candidate in python3.11 python3.12 python3.10 python3 python; do
        if suits "$candidate"; then
            PYTHON="$candidate"
            return
        fi
    done
    fail "found none of Python 3.10, 3.11 and 3.12. Install one (Debian, Ubuntu: apt install python3.11" \
        "python3.11-venv) or set PYTHON to the path of one."
}

# Everything that decides what gets installed, as one line.
fingerprint() {
    "$VENV/bin/python" - "$PROJECT" "$1" <<'PY'
import hashlib, os, pathlib, platform, sys
project, extra = pathlib.Path(sys.argv[1]), sys.argv[2]
# The C++ sources, setup.py and the choice of compiler decide what is built, pyproject.toml what is installed.
sources = sorted(p for p in (project / "mindiffedit/runtime/native").iterdir() if p.suffix in (".cpp", ".h"))
said = (extra, platform.python_version(), sys.prefix, os.environ.get("CXX", ""))
parts = [p.read_bytes() for p in (project / "pyproject.toml", project / "setup.py", *sources)] + [text.encode() for text in said]
print(hashlib.sha256(b"\0".join(parts)).hexdigest())
PY
}

stamp() { printf '%s' "$VENV/installed${1:+-$1}"; }

installed() {
    [ -f "$(stamp "$1")" ] && [ "$(cat "$(stamp "$1")")" = "$(fingerprint "$1")" ]
}

make_venv() {
    find_python
    "$PYTHON" -c 'import ensurepip, venv' >/dev/null 2>&1 || fail "$PYTHON cannot make virtual" \
        "environments: its venv or ensurepip module is missing (Debian, Ubuntu: apt install python3-venv," \
        "or python3.11-venv)."
    say "making $VENV with $("$PYTHON" --version 2>&1)"
    # A half-made or moved environment is of no use; --clear makes it anew.
    "$PYTHON" -m venv --clear "$VENV" || fail "could not make $VENV; the lines above say why."
}

prepare_environment() {
    local extra="${1:-}" what
    if ! suits "$VENV/bin/python" || ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        make_venv
    fi
    if installed "$extra"; then
        return
    fi
    what="$PROJECT${extra:+[$extra]}"
    say "installing mindiffedit${extra:+ with the extra '$extra'} into $VENV; the first time takes minutes"
    # Editable: the environment runs this folder's source, so a changed file needs no new installation.
    # --quiet leaves out the download log; warnings and errors stay.
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$what" \
        || fail "pip could not install the project; its lines above say why. Is a package index reachable?"
    # What came with an extra is enough without it, too.
    fingerprint "" > "$(stamp "")"
    fingerprint "$extra" > "$(stamp "$extra")"
}
