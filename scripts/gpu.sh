#!/usr/bin/env bash
# Measures on a machine with a GPU; what is missing beside torch comes from carried wheels.
# Usage: scripts/gpu.sh PYTHON WHEELS DEVICE OUT [OPTION...]
set -euo pipefail
python=$1 wheels=$2 device=$3 out=$4
shift 4
needed='import mujoco, numpy, pytest, tensordict, torch, torchrl'

if ! "$python" -c "$needed" 2>/dev/null; then
    shopt -s nullglob
    files=("$wheels"/*.whl)
    if [ ${#files[@]} = 0 ]; then
        echo "$python lacks packages ($needed), and $wheels holds no wheels: make wheels, where there is a network" >&2
        exit 1
    fi
    packages=$PWD/build/gpu-packages # no venv, which a bare machine may lack
    rm -rf "$packages"
    "$python" -m pip install --quiet --no-index --no-deps --target "$packages" "${files[@]}"
    export PYTHONPATH=$packages${PYTHONPATH:+:$PYTHONPATH}
    "$python" -c "$needed"
fi
export MUJOCO_GL=${MUJOCO_GL:-egl}
"$python" -c 'import mujoco' 2>/dev/null || export MUJOCO_GL=off # without its library all but rendering
exec "$python" -m benchmarks.gpu --device "$device" --out "$out" "$@"
