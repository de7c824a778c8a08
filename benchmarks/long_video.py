"""Memory that `prepare` needs for a long video, beside a short one.

python benchmarks/long_video.py --minutes 60

Makes videos of 320x240 at 30 frames a second with ffmpeg (imageio-ffmpeg's), prepares each in a
process of its own, and prints the peak resident memory of that process and of the largest of its
children, the workers among them. Linux only.
"""

from __future__ import annotations

import argparse
import multiprocessing
import subprocess
import tempfile
import time
from pathlib import Path

import imageio_ffmpeg

from prelar_trl.data.sources import FrameOptions, VideoFolder, prepare

RATE = 30


def make_video(path: Path, minutes: float) -> None:
    """A video of that length: one minute with its moving picture, repeated."""
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y"]
    minute = path.with_name("minute.mp4")
    source = f"testsrc2=size=320x240:rate={RATE}:duration=60"
    codec = ["-c:v", "libx264", "-preset", "ultrafast", "-bf", "2", "-pix_fmt", "yuv420p"]
    subprocess.run([*ffmpeg, "-f", "lavfi", "-i", source, *codec, str(minute)], check=True)
    loops = ["-stream_loop", "-1", "-i", str(minute), "-t", str(60 * minutes), "-c", "copy"]
    subprocess.run([*ffmpeg, *loops, str(path)], check=True)
    minute.unlink()


def work(root: Path, store: Path, workers: int, queue: multiprocessing.Queue) -> None:
    """Prepares a folder; reports the number of frames."""
    queue.put(prepare(VideoFolder(root, FrameOptions()), store, workers=workers).num_frames)


def peak_memory(process: multiprocessing.Process) -> tuple[float, float]:
    """Waits for a process; MiB at its peak, and at that of the largest of its descendants."""
    peaks = {process.pid: 0.0}
    while process.is_alive():
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
            except OSError:  # it has ended
                continue
            pid, parent = int(lines["Pid"]), int(lines["PPid"])
            if "VmHWM" in lines and (pid in peaks or parent in peaks):
                peaks[pid] = int(lines["VmHWM"].split()[0]) / 1024
        process.join(0.2)
    own = peaks.pop(process.pid)
    return own, max(peaks.values(), default=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    for minutes in (0.1, arguments.minutes):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "videos"
            root.mkdir()
            make_video(root / "long.mp4", minutes)
            for workers in arguments.workers:
                queue = context.Queue()
                store = Path(folder) / f"store{workers}"
                process = context.Process(target=work, args=(root, store, workers, queue))
                start = time.perf_counter()
                process.start()
                own, worker = peak_memory(process)
                seconds = time.perf_counter() - start
                print(
                    f"{minutes:g} minutes, workers={workers}: "
                    f"{queue.get()} frames in {seconds:.0f} s, "
                    f"{own:.0f} MiB, largest child {worker:.0f} MiB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
