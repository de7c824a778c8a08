#!/usr/bin/env bash
# The whole path, small enough for two cores: videos without actions -> a world model with latent
# actions -> an agent that acts with real ones -> evaluation -> report.
# Usage: scripts/demo.sh PYTHON FOLDER [MODEL]. Run again, it goes on after the last finished step.
# With a MODEL (a folder of export.py) it begins with fine-tuning.
set -euo pipefail
python=$1
demo=$2
model=${3:-}
seed=1    # of the first two, 0 learns slowly: docs/results.md shows how runs differ
needed=15 # return of the fine-tuned agent; the best policy gets 22.8, a random one 5.2
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

runs=("$demo/finetune")
if [ -z "$model" ]; then
    step videos "" collect_videos data="$demo/videos" env=toy episodes=300 max_steps=25 \
        random_fraction=0.5 noise=0.5 after_success=null
    step pretrain "$demo/pretrain" pretrain data="$demo/videos" run="$demo/pretrain" \
        method=prelar_plus size=mini updates=2500 batch_size=12 clip_len=12 lr=1e-3 threads=1 \
        seed=$seed log_every=50 usage_every=250 video_every=1250
    step probe "" probe run="$demo/pretrain" clip_len=16 transfers=3 threads=1
    model=$demo/pretrain
    runs=("$model" "${runs[@]}")
fi
step finetune "$demo/finetune" finetune pretrained="$model" run="$demo/finetune" \
    method=prelar_plus size=mini env=toy max_steps=25 env_steps=3500 prefill=750 threads=1 \
    seed=$seed model.discount=0.9 'loss.weights={reward: 10}' pretrain_updates=300 \
    behavior_after=150 train_every=4 batch_size=12 batch_length=12 horizon=10 imag_batch=72 \
    lr=4e-4 actor_lr=4e-4 critic_lr=8e-4 entropy_scale=3e-2 slow_every=25 \
    log_every=100 eval_every=500 eval_episodes=12
"$python" - "$demo/finetune/metrics.csv" "$needed" <<'END'
import sys

from prelar_trl.record import read_metrics

values, needed = read_metrics(sys.argv[1])["eval/return"].values, float(sys.argv[2])
print(f"return {values[0]:.1f} -> {values[-1]:.1f}, needed {needed:g} (best policy 22.8, random 5.2)")
sys.exit(0 if values[-1] >= needed else "error: the agent did not learn the task")
END
step evaluate "" evaluate run="$demo/finetune" episodes=12
"$python" recipes/plot.py runs="[$(IFS=,; echo "${runs[*]}")]" out="$demo/report.html" \
    title="PreLAR demo: from videos without actions to an agent"
