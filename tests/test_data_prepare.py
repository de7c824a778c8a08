from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prelar_trl.data import ClipStore, StoreError
from prelar_trl.data.sources import Clip, FrameOptions, Item, VideoFolder, picture_clip, prepare
from tests.files import contents

SHARD = 40_000  # bytes: a few clips of 16x16


def pictures(root: Path, clips: int = 30) -> VideoFolder:
    """Clips as folders of small PNG files; every fifth one is damaged."""
    rng = np.random.default_rng(1)
    for clip in range(clips):
        folder = root / f"clip {clip:03d}"
        folder.mkdir(parents=True)
        for frame in range(int(rng.integers(2, 9))):
            noise = rng.integers(0, 256, (20, 24, 3), np.uint8)
            Image.fromarray(noise).save(folder / f"{frame}.png")
        if clip % 5 == 3:
            for file in folder.iterdir():
                file.write_bytes(b"damaged")
    return VideoFolder(root, FrameOptions(size=16))


@dataclass
class Spoiled:
    """A source of picture folders, on some of which something worse than an error happens."""

    inner: VideoFolder
    kill: tuple[str, ...] = ()
    delay: float = 0.0
    loads: Path | None = None

    kind = "videos"
    decoder = "test"

    @property
    def options(self) -> FrameOptions:
        return self.inner.options

    @property
    def root(self) -> Path:
        return self.inner.root

    @property
    def left_out(self) -> dict[str, list[str]]:
        return self.inner.left_out

    def items(self) -> list[Item]:
        return self.inner.items()

    def load(self, item: Item) -> Clip:
        if self.loads is not None:
            with self.loads.open("a") as file:
                file.write(item.name + "\n")
        if item.name in self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.delay)
        return self.inner.load(item)


def forked(source, path: Path, after: float | None) -> bool:
    """Prepares in a child process, killed ``after`` seconds; True if it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            prepare(source, path, shard_bytes=SHARD)
        finally:
            os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    try:
        ClipStore(path)
    except (StoreError, FileNotFoundError):
        return False
    return True


def test_killed_at_random_times_the_store_is_the_same_byte_for_byte(tmp_path) -> None:
    source = Spoiled(pictures(tmp_path / "v"), delay=0.005)  # so it takes at least 0.15 s
    store = prepare(source, tmp_path / "whole", shard_bytes=SHARD)
    assert len(store.meta["shards"]) > 2
    rng = np.random.default_rng(7)
    kills = 0
    for trial in range(10):
        path = tmp_path / f"killed{trial}"
        for delay in (*rng.uniform(0, 0.1, size=2), None):
            finished = forked(source, path, delay)
            kills += not finished
        assert finished and contents(path) == contents(tmp_path / "whole")
    assert kills >= 10


def test_nothing_that_was_finished_is_decoded_again(tmp_path) -> None:
    log = tmp_path / "loads"
    source = Spoiled(pictures(tmp_path / "v"), delay=0.005, loads=log)
    for _ in range(4):
        forked(source, tmp_path / "s", 0.06)
    prepare(source, tmp_path / "s", shard_bytes=SHARD)
    loads = log.read_text().splitlines()
    assert len(set(loads)) == 30
    assert len(loads) <= 30 + 4  # at most the one in hand at each kill
    prepare(source, tmp_path / "s", shard_bytes=SHARD)
    assert log.read_text().splitlines() == loads


def test_several_processes_give_the_same_store_and_survive_a_crashing_decoder(tmp_path) -> None:
    source = pictures(tmp_path / "v")
    prepare(source, tmp_path / "one", shard_bytes=SHARD)
    prepare(source, tmp_path / "two", shard_bytes=SHARD, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    crashing = Spoiled(source, kill=("clip 002/", "clip 017/"))
    store = prepare(crashing, tmp_path / "three", workers=2)
    reasons = dict(store.skipped())
    assert [n for n, r in reasons.items() if "crashed" in r] == ["clip 002/", "clip 017/"]
    assert len(store) == 30 - 6 - 2
    expected = picture_clip(sorted((tmp_path / "v" / "clip 029").iterdir()), source.options)
    assert np.array_equal(store.read(len(store) - 1), expected.arrays()["pixels"])


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_loses_nothing_and_says_so(tmp_path, small_disk) -> None:
    source = VideoFolder(pictures(tmp_path / "v").root, FrameOptions(size=64))
    whole = prepare(source, tmp_path / "whole", shard_bytes=200_000)
    assert whole.num_bytes > 2**20
    with pytest.raises(OSError, match=r"no space left for clip store .* \d+ clips are safe") as e:
        prepare(source, small_disk / "s", shard_bytes=200_000)
    assert "\n" not in e.value.strerror
    with pytest.raises(StoreError, match="unfinished"):
        ClipStore(small_disk / "s")
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    prepare(source, small_disk / "s", shard_bytes=200_000)
    assert contents(small_disk / "s") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_the_recipe_killed_with_all_its_processes_continues(tmp_path) -> None:
    root = pictures(tmp_path / "v", clips=400).root
    command = [sys.executable, "recipes/prepare_videos.py", f"source={root}", "pixels=16"]
    command += ["workers=2", "shard_mib=1"]
    subprocess.run([*command, f"data={tmp_path / 'whole'}"], check=True)
    rng = np.random.default_rng(0)
    for _ in range(10):
        run = subprocess.Popen([*command, f"data={tmp_path / 'killed'}"])
        time.sleep(float(rng.uniform(4, 12)))
        run.send_signal(signal.SIGKILL)
        run.wait()
    subprocess.run([*command, f"data={tmp_path / 'killed'}"], check=True)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
