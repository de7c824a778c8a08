"""SIGKILL at any moment: the run that goes on ends with the numbers of one that was never killed.

A run is forked off this process, which has imported everything, and kills itself at its n-th call
of a function, so that moments are spread over the whole of it however busy the machine is.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import traceback

import pytest

from prelar_trl.recipes.finetune import finetune
from prelar_trl.recipes.pretrain import pretrain
from tests.test_resume import STEPS, same
from tests.toy_runs import finetune_config, pretrain_config


def run_until(call, calls, counted=None):
    """Run in a fork that kills itself at its ``calls``-th call of a function, if it has so many.

    Returns:
        Whether it was killed.
    """
    pid = os.fork()
    if pid == 0:
        count = 0

        def hook(*_):
            nonlocal count
            count += 1
            if count == calls:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(hook)
        try:
            call()
            sys.setprofile(None)
            if counted is not None:
                counted.write_text(str(count))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def check_kills(work, configure, folder, kills):
    """``work(configure(run))``, killed so often, against the same without.

    A run that has come to its end is compared and begun anew, until there were so many kills.
    """
    moments = random.Random(0)
    run_until(lambda: work(configure(folder / "whole")), -1, folder / "calls")
    calls = int((folder / "calls").read_text())
    cfg, killed, runs = configure(folder / "run"), 0, 0
    cfg.resume = "auto"
    while killed < kills:
        longest = calls if killed % 3 == 0 else calls // 4  # progress in between
        if run_until(lambda: work(cfg), moments.randrange(1, longest)):
            killed += 1
        else:
            same(folder / "run", folder / "whole")
            shutil.rmtree(folder / "run")
            runs += 1
    assert not run_until(lambda: work(cfg), -1)
    same(folder / "run", folder / "whole")
    print(f"{killed} kills in {runs + 1} runs")


def pretraining(clips, **options):
    options = {"updates": 6, "checkpoint_every": 2, "prefetch": 2} | options
    return lambda run: pretrain_config(clips, run, **options)


def finetuning(**options):
    options = STEPS | {"checkpoint_every": 10, "capacity": 40} | options
    return lambda run: finetune_config(run, **options)


def test_killed_pretraining_ends_with_the_same_numbers(clips, tmp_path):
    check_kills(pretrain, pretraining(clips), tmp_path, kills=2)


def test_killed_finetuning_ends_with_the_same_numbers(tmp_path):
    check_kills(finetune, finetuning(), tmp_path, kills=3)


@pytest.mark.slow
@pytest.mark.timeout(3_600)
def test_killed_pretraining_often(clips, tmp_path):
    check_kills(pretrain, pretraining(clips, updates=12), tmp_path, kills=20)


@pytest.mark.slow
@pytest.mark.timeout(3_600)
def test_killed_finetuning_often(tmp_path):
    check_kills(finetune, finetuning(env_steps=120), tmp_path, kills=20)


@pytest.mark.slow
@pytest.mark.timeout(3_600)
def test_killed_finetuning_with_workers_often(tmp_path):
    options = {"num_workers": 2, "eval_episodes": 2, "env_steps": 120}
    check_kills(finetune, finetuning(**options), tmp_path, kills=20)


@pytest.mark.slow
@pytest.mark.timeout(3_600)
def test_killed_finetuning_in_metaworld_often(tmp_path):
    options = {"env": "metaworld/drawer-open", "max_steps": 130, "env_steps": 400}
    options |= {"prefill": 150, "checkpoint_every": 60, "capacity": 1_000, "train_every": 20}
    check_kills(finetune, finetuning(**options), tmp_path, kills=20)
