#!/usr/bin/env bash
# Checks that MuJoCo can render off-screen; installs what is missing when it may.
# Usage: scripts/check_rendering.sh PYTHON
set -euo pipefail
python=$1
renders() { "$python" -m prelar_trl.envs.rendering >/dev/null 2>&1 </dev/null; }
packages=(libegl1 libgl1 libopengl0 libosmesa6)

renders && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "MuJoCo cannot render off-screen: installing the libraries it needs"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq || true
    for package in "${packages[@]}"; do # one by one: not every release has them all
        apt-get install -y -qq "$package" >/dev/null 2>&1 || true
    done
    renders && exit 0
fi
"$python" -m prelar_trl.envs.rendering || true
echo "MuJoCo cannot render off-screen. Run: sudo apt-get install -y ${packages[*]}" >&2
exit 1
