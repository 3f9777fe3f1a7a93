#!/usr/bin/env bash
# Makes anew what is recorded from the demo model, when its checkpoint or pictures have changed: recordings of diffusers,
# README's picture and the gallery. Needs the `parity` extra. Figures in the docs are made by the commands that stand there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}

record() {  # FILE, and options of the three calls
    local file=$1
    shift
    "$python" -m mindiffedit parity record -o "$file" --image mindiffedit/demo/fruits.png \
        --source "a bowl of fruits" --target "a bowl of pears" "$@"
}

record mindiffedit/demo/golden.safetensors --steps 3 --maps 1 --size 64
record tests/golden/demo-ddim.safetensors --steps 10 --maps 3
record tests/golden/demo-dpm.safetensors --steps 8 --maps 3 --scheduler dpm
"$python" -m mindiffedit demo -o demo-output
cp demo-output/edit.png docs/demo.png
"$python" scripts/make_gallery.py --scenes 8 --seed 11
