"""How fast video is sampled, against the official way of reading it: JPEG frames with PIL.

    python benchmarks/data.py                     all of it, about two minutes, 3 GB of disk
    python benchmarks/data.py --memory-limit 600  also sample a store larger than that many MB

Everything is measured in one run on one machine, one process, warm page cache, clips of 25 frames.
A full-size pre-training run on a GPU at 60 updates/s consumes 60 x 16 x 25 = 24 000 frames/s.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from tensordict import TensorDict

from prelar_trl.data import ClipWriter, EpisodeReplay, VideoClips
from prelar_trl.data.sources import FrameOptions, VideoFolder, prepare

CLIP, BATCH, FRAMES = 25, 16, 45
NEEDED = 60 * BATCH * CLIP  # frames/s


def scene(rng: np.random.Generator, frames: int, height: int, width: int) -> np.ndarray:
    """A moving textured picture, uint8 [T, H, W, 3]; it compresses about as real video does."""
    small = rng.integers(0, 256, (height // 16 + 12, width // 16 + 12, 3), dtype=np.uint8)
    size = (small.shape[1] * 16, small.shape[0] * 16)
    canvas = np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC))
    path = np.cumsum(rng.integers(0, 3, (frames, 2)), 0)
    grain = rng.integers(0, 8, (height, width, 1), dtype=np.uint8)
    return np.stack([canvas[y : y + height, x : x + width] // 2 + grain for y, x in path])


def make_store(path: Path, clips: int, jpeg: Path | None = None, jpegs: int = 0) -> None:
    """A store of ``clips`` clips; the first ``jpegs`` also as official JPEG folders."""
    rng = np.random.default_rng(0)
    bases = [scene(rng, FRAMES, 64, 64) for _ in range(50)]
    with ClipWriter(path, source="benchmark") as writer:
        for number in range(clips):
            frames = bases[number % 50] + np.uint8(number // 50)
            writer.add(np.ascontiguousarray(frames.transpose(0, 3, 1, 2)))
            if jpeg is not None and number < jpegs:
                folder = jpeg / f"{number}"
                folder.mkdir(parents=True)
                for t, frame in enumerate(frames, 1):
                    Image.fromarray(frame).save(folder / f"{t:06d}.jpg")


def rate(sample: Callable[[], object], frames: int, seconds: float) -> tuple[float, float]:
    """Frames a second: median and slowest of five sections."""
    sample()
    rates = []
    for _ in range(5):
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds / 5:
            sample()
            count += 1
        rates.append(count * frames / (time.perf_counter() - start))
    return statistics.median(rates), min(rates)


def jpeg_sampler(root: Path, clips: int) -> Callable[[], torch.Tensor]:
    """The official way: a clip and a start at random, then one JPEG a frame through PIL."""
    rng = np.random.default_rng(0)

    def sample() -> torch.Tensor:
        batch = []
        for _ in range(BATCH):
            folder, start = root / str(rng.integers(clips)), rng.integers(FRAMES - CLIP + 1)
            names = (folder / f"{start + t:06d}.jpg" for t in range(1, CLIP + 1))
            batch.append(np.stack([np.asarray(Image.open(name)) for name in names]))
        return torch.from_numpy(np.stack(batch).transpose(0, 1, 4, 2, 3).copy())

    return sample


def make_replay(path: Path, episodes: int) -> EpisodeReplay:
    replay = EpisodeReplay(path, capacity=100_000)
    steps = 500
    done = torch.zeros(steps, 1, dtype=torch.bool)
    done[-1] = True
    for _ in range(episodes):
        pixels = torch.randint(0, 256, (steps + 1, 3, 64, 64), dtype=torch.uint8)
        following = {"pixels": pixels[1:], "reward": torch.zeros(steps, 1), "done": done}
        data = {"pixels": pixels[:-1], "action": torch.zeros(steps, 4), "next": following}
        replay.extend(TensorDict(data, [steps]))
    return replay


def memory_limited(store: Path, limit_mb: int) -> dict[str, float] | None:
    """Samples ``store`` in a process that may use ``limit_mb`` of memory, page cache included."""
    root = Path("/sys/fs/cgroup")
    old = (root / "memory").is_dir()
    group = (root / "memory" if old else root) / f"prelar-benchmark-{os.getpid()}"
    try:
        group.mkdir()
        limit = group / ("memory.limit_in_bytes" if old else "memory.max")
        limit.write_text(str(limit_mb * 2**20))
    except OSError:
        return None
    try:
        out = subprocess.run(
            [sys.executable, __file__, "--sample-only", str(store)],
            preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())),
            check=True,
            capture_output=True,
            text=True,
        )
        return json.loads(out.stdout.splitlines()[-1])
    finally:
        time.sleep(0.2)
        group.rmdir()


def sample_only(store: Path) -> dict[str, float]:
    """Frames/s and memory while sampling a store: own memory in MB, at the start and the end."""
    clips = VideoClips(store, CLIP, BATCH)
    memory = []
    for _ in range(2):
        median, _ = rate(clips.sample, BATCH * CLIP, 6.0)
        status = Path("/proc/self/status").read_text()
        memory.append(int(status.split("RssAnon:")[1].split()[0]) / 1024)
    return {"frames_per_s": median, "own_mb_early": memory[0], "own_mb_late": memory[1]}


def decoding(folder: Path, clips: int) -> tuple[float, float]:
    """Clips a second that one process prepares, of Something-Something's form, and kB a clip.

    The real ones have 88 kB on average.
    """
    rng = np.random.default_rng(0)
    videos = folder / "webm"
    videos.mkdir()
    for number in range(clips):
        with av.open(str(videos / f"{number}.webm"), "w") as container:
            stream = container.add_stream("libvpx-vp9", rate=Fraction(12))
            stream.width, stream.height, stream.pix_fmt = 426, 240, "yuv420p"
            stream.options = {"deadline": "realtime", "cpu-used": "8", "b": "0", "crf": "24"}
            for frame in scene(rng, FRAMES, 240, 426):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
            container.mux(stream.encode(None))
    start = time.perf_counter()
    prepare(VideoFolder(videos, FrameOptions()), folder / "decoded")
    elapsed = time.perf_counter() - start
    return clips / elapsed, sum(f.stat().st_size for f in videos.iterdir()) / clips / 1000


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--clips", type=int, default=2000, help="of the store (0.5 MB each)")
    parser.add_argument("--seconds", type=float, default=5.0, help="per measurement")
    parser.add_argument("--memory-limit", type=int, help="MB, for a store that exceeds it")
    parser.add_argument("--out", type=Path, help="also write the numbers here, as JSON")
    parser.add_argument("--sample-only", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.sample_only is not None:
        print(json.dumps(sample_only(args.sample_only)))
        return
    work = Path(tempfile.mkdtemp(prefix="prelar-data-", dir=args.folder))
    try:
        results = measure(work, args.clips, args.seconds, args.memory_limit)
    finally:
        shutil.rmtree(work)
    if args.out is not None:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


def measure(work: Path, clips: int, seconds: float, limit: int | None) -> dict[str, float]:
    jpegs = min(clips, 500)
    make_store(work / "store", clips, work / "jpeg", jpegs)
    frames, results = BATCH * CLIP, {}

    def show(name: str, median: float, worst: float) -> None:
        results[name] = median
        ratio = median / results["JPEG frames with PIL"]
        print(
            f"{name:<34} {median:>12,.0f} frames/s  (slowest {worst:,.0f})  {ratio:>6.1f} x JPEG"
            f"  {median / NEEDED:>6.1f} x needed",
            flush=True,
        )

    show("JPEG frames with PIL", *rate(jpeg_sampler(work / "jpeg", jpegs), frames, seconds))
    for name, options in {
        "VideoClips, episodes": {},
        "VideoClips, frames": {"strategy": "frames"},
        "VideoClips, prioritize_ends": {"strategy": "prioritize_ends"},
        "VideoClips, episodes, prefetch=2": {"prefetch": 2},
    }.items():
        store = VideoClips(work / "store", CLIP, BATCH, **options)
        show(name, *rate(store.sample, frames, seconds))
    replay = make_replay(work / "replay", 40)
    show("EpisodeReplay, 50 x 50", *rate(replay.sample, 2500, seconds))
    speed, size = decoding(work, 40)
    results["clips decoded per s and process"] = speed
    print(
        f"decoding webm 426x240, {size:.0f} kB a clip: {speed:.0f} clips/s a process; the 220 847 "
        f"clips of Something-Something-V2: {220_847 / speed / 3600:.1f} hours x cores"
    )
    if limit is not None:
        needed = int(1.5 * limit * 2**20 / (FRAMES * 12288))
        make_store(work / "large", needed)
        found = memory_limited(work / "large", limit)
        if found is None:
            print("memory limit: needs the right to make a cgroup, left out")
        else:
            results |= {f"limited: {key}": value for key, value in found.items()}
            size = needed * FRAMES * 12288 / 2**20
            print(f"under {limit} MB, from a store of {size:,.0f} MB: {json.dumps(found)}")
    return results


if __name__ == "__main__":
    main()
