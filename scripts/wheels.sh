#!/usr/bin/env bash
# Collects the wheels that scripts/gpu.sh needs beside torch, less than 64 MB of them.
# Usage: scripts/wheels.sh PYTHON WHEELS [VERSION]
set -euo pipefail
python=$1 wheels=$2 version=${3:-3.12}
packages=(
    torchrl tensordict cloudpickle pyvers packaging importlib_metadata zipp orjson numpy tqdm
    gymnasium farama-notifications mujoco glfw pyopengl absl-py etils
    pytest pytest-timeout pluggy iniconfig pygments
)
platforms=()
for name in manylinux2014_x86_64 manylinux_2_27_x86_64 manylinux_2_28_x86_64; do
    platforms+=(--platform "$name")
done
mkdir -p "$wheels"
"$python" -m pip download --quiet --dest "$wheels" --no-deps --only-binary=:all: \
    --python-version "$version" "${platforms[@]}" --constraint constraints.txt "${packages[@]}"
size=$(du -sm "$wheels" | cut -f1)
echo "$wheels: $(ls "$wheels"/*.whl | wc -l) wheels for Python $version, $size MB"
[ "$size" -lt 64 ] || { echo "more than 64 MB" >&2; exit 1; }
