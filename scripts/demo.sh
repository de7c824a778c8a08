#!/usr/bin/env bash
# The whole path on simulator videos, small enough for two cores:
# videos -> pre-training -> fine-tuning -> evaluation -> report.
# Usage: scripts/demo.sh PYTHON FOLDER. Run again, it goes on after the last finished step.
set -euo pipefail
python=$1
demo=$2
task=metaworld/drawer-open
needed=4 # dB that open-loop prediction must gain over the first update
mkdir -p "$demo"
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" # threads that spin stall on a busy machine

# step NAME FOLDER RECIPE ARGS...: run a recipe once; an unfinished step starts anew.
step() {
    local name=$1 folder=$2 recipe=$3
    shift 3
    if [ -e "$demo/.done-$name" ]; then
        echo "== $name: done before (make clean-demo starts over)"
        return
    fi
    echo "== $name"
    [ -z "$folder" ] || rm -rf "$folder"
    "$python" "recipes/$recipe.py" "$@"
    touch "$demo/.done-$name"
}

step videos "" collect_videos data="$demo/videos" env="$task" episodes=24
step pretrain "$demo/pretrain" pretrain data="$demo/videos" run="$demo/pretrain" \
    method=prelar size=tiny updates=800 batch_size=8 clip_len=16 lr=1e-3 \
    log_every=20 video_every=200
"$python" - "$demo/pretrain/metrics.csv" "$needed" <<'EOF'
import sys

from prelar_trl.record import read_metrics

values = read_metrics(sys.argv[1])["psnr_openloop"].values
gain, needed = values[-1] - values[0], float(sys.argv[2])
print(f"open-loop PSNR {values[0]:.1f} -> {values[-1]:.1f} dB, gain {gain:.1f}, needed {needed:g}")
sys.exit(0 if gain >= needed else "error: pre-training did not learn to predict")
EOF
step finetune "$demo/finetune" finetune pretrained="$demo/pretrain" run="$demo/finetune" \
    method=prelar size=tiny env="$task" env_steps=3000 prefill=1000 \
    pretrain_updates=50 frozen_updates=50 batch_size=8 batch_length=16 \
    log_every=100 eval_every=1000 eval_episodes=1
step evaluate "" evaluate run="$demo/finetune" episodes=3
"$python" recipes/plot.py runs="[$demo/pretrain,$demo/finetune]" out="$demo/report.html" \
    title="PreLAR demo: ${task#metaworld/}"
