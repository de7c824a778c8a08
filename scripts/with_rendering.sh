#!/usr/bin/env bash
# Runs a command with an off-screen MuJoCo backend that works here (EGL, else OSMesa);
# installs the missing libraries when it may, else says what to install.
# Usage: scripts/with_rendering.sh PYTHON COMMAND...
set -euo pipefail
python=$1
shift
packages=(libegl1 libgl1 libosmesa6)
faster=(libtcmalloc-minimal4t64 libtcmalloc-minimal4) # training on the CPU; one of the two exists

renders() { "$python" -m prelar_trl.envs.rendering >/dev/null 2>&1 </dev/null; }

choose_backend() {
    renders && return 0 # what MUJOCO_GL says, or the library's own choice
    for backend in egl osmesa; do
        if MUJOCO_GL=$backend renders; then
            export MUJOCO_GL=$backend
            echo "rendering with MUJOCO_GL=$backend" >&2
            return 0
        fi
    done
    return 1
}

if ! choose_backend; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "MuJoCo cannot render off-screen: installing ${packages[*]}" >&2
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -qq || true
        for package in "${packages[@]}" "${faster[@]}"; do # one by one: not every release has all
            apt-get install -y -qq "$package" >/dev/null </dev/null || true
        done
    fi
    if ! choose_backend; then
        "$python" -m prelar_trl.envs.rendering 2>&1 | tail -n 1 >&2 || true
        echo "MuJoCo cannot render off-screen. Run: sudo apt-get install -y ${packages[*]}" >&2
        exit 1
    fi
fi
exec "$@"
