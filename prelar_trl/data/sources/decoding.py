"""Video files: which stream, which of its frames can be trusted, which way up they are."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, cast

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.frame import PictureType
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream

from prelar_trl.data.sources.base import Clip, ClipError, FrameOptions, Sizes, sized_clip
from prelar_trl.data.sources.flow import FLOW_SIZE

DECODER = (
    f"PyAV {av.__version__} (libavcodec {'.'.join(map(str, av.library_versions['libavcodec']))})"
)
DAMAGED = "damaged frames left out"
BREAKS_OFF = "breaks off before its end"
JUMPS = "jumps in time: frames are lost there, or none were recorded"
REORDERED = 16  # B-frames in a row, at most; streams of nothing but B-frames exist
COVERS = Disposition.attached_pic | Disposition.timed_thumbnails


class Section(NamedTuple):
    """A part of a video file: so many frames from ``begin``, in seconds, on."""

    begin: float
    frames: int
    fps: float

    def number(self, frame: av.VideoFrame) -> int:
        """Which frame of the section it is; below 0 before it."""
        return round(((frame.time or 0.0) - self.begin) * self.fps)


def video_clip(path: Path, options: FrameOptions, section: Section | None = None) -> Clip:
    """A clip of what can be played of a video file, or of a section; the rest is noted.

    Frames that the decoder reports as damaged are left out, with all that were decoded from them:
    those up to the next key frame. The clip raises `ClipError` if nothing can be played.
    """
    notes: Counter[str] = Counter()
    return sized_clip(_video(path, options, notes, section), options, notes)


def _video(
    path: Path, options: FrameOptions, notes: Counter[str], section: Section | None
) -> Iterator[Sizes]:
    with path.open("rb") as file:  # says why if it cannot be read, which av does not
        if not file.read(1):
            raise ClipError("the file is empty")
    try:
        # absolute: "12:30.mp4" is no protocol; a playlist in disguise must not reach the network
        container = av.open(str(path.absolute()), options={"protocol_whitelist": "file"})
    except (FFmpegError, UnicodeError):
        raise ClipError("not readable as a video") from None
    with container:
        stream = picture_stream(container)
        stream.thread_type = "NONE"  # one process a core is faster than threads within a clip
        decoding, scale = _Decoding(stream, notes, section), _Scaler(options)
        if section is None:
            yield from trusted(decoding, scale, options.stride)
            return

        def scale_chosen(frame: av.VideoFrame) -> Sizes | None:
            number = section.number(frame)
            return scale(frame) if number >= 0 and number % options.stride == 0 else None

        yield from trusted(decoding, scale_chosen, 1)


def picture_stream(container: InputContainer) -> VideoStream:
    """The stream to show: of those marked as default, else of all, the largest; no cover."""
    streams = [s for s in container.streams.video if not s.disposition & COVERS]
    known = [s for s in streams if s.codec_context is not None]  # damage invents streams
    if not known:
        why = "no decoder for its pictures" if streams else "no picture in it (audio only?)"
        raise ClipError(why)
    default = [s for s in known if s.disposition & Disposition.default]
    return max(default or known, key=lambda s: (s.width * s.height, -s.index))


class _Decoding:
    """Decodes a stream, or from the last key frame before a section to its end, whatever happens.

    Frames come in the order in which they are shown, as (number, frame): the number counts packets
    in the order of decoding. A packet that is damaged or cannot be decoded gives (number, None).
    """

    def __init__(self, stream: VideoStream, notes: Counter[str], section: Section | None) -> None:
        self.stream, self.notes, self.section = stream, notes, section
        self.container = cast(InputContainer, stream.container)
        if section is not None:
            self.container.seek(int(section.begin / (stream.time_base or 1)), stream=stream)
        self.end = 0.0  # seconds, of the last frame
        self.longest = 0.0  # between two frames, jumps aside

    def __iter__(self) -> Iterator[tuple[int, av.VideoFrame | None]]:
        self.stream.codec_context.copy_opaque = True
        for number, packet in enumerate(self._packets()):
            frames = self._decoded(packet, number)
            if frames is None:
                yield number, None
            for frame in frames or ():
                self._note_time(frame)
                if self.section and self.section.number(frame) >= self.section.frames:
                    return
                yield (number if frame.opaque is None else cast(int, frame.opaque)), frame
        if self._promised() > 1.05 * self.end + 0.5:
            self.notes[BREAKS_OFF] = 1
        if self.notes[DAMAGED]:  # which is why
            del self.notes[JUMPS]

    def _note_time(self, frame: av.VideoFrame) -> None:
        """Demuxers that look for the next sound data (Matroska's) do not tell what they skip."""
        start, duration = (frame.time or 0.0), (frame.duration or 0) * (frame.time_base or 0)
        gap = start - self.end if self.end else 0.0
        self.end = start + float(duration)
        if gap > max(0.4, 3 * self.longest):
            self.notes[JUMPS] += 1
        else:
            self.longest = max(self.longest, gap, float(duration))

    def _packets(self) -> Iterator[av.Packet | None]:
        """The stream's packets, then what makes the decoder hand out its last frames."""
        try:
            yield from self.container.demux(self.stream)
        except (FFmpegError, UnicodeError):
            self.notes[BREAKS_OFF] = 1
            yield None

    def _decoded(self, packet: av.Packet | None, number: int) -> list[av.VideoFrame] | None:
        """The frames that a packet completes; None if it is damaged."""
        try:
            if packet is None:
                return self.stream.codec_context.decode(None)
            packet.opaque = number
            return None if packet.is_corrupt else packet.decode()
        except (FFmpegError, UnicodeError):
            return None

    def _promised(self) -> float:
        """Where the file says that the stream ends, in seconds; 0 where it does not."""
        stream, container = self.stream, self.container
        if stream.duration is not None:
            return float((stream.duration + (stream.start_time or 0)) * (stream.time_base or 0))
        tag = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
        if tag:  # Matroska's
            hours, minutes, seconds = map(float, tag.groups())
            return 3600 * hours + 60 * minutes + seconds
        if len(container.streams) == 1 and container.duration is not None:
            return container.duration / av.time_base
        return 0.0


def trusted(
    decoding: _Decoding, scale: Callable[[av.VideoFrame], Sizes | None], stride: int
) -> Iterator[Sizes]:
    """Every ``stride``-th frame, without the damaged ones and those decoded from them.

    ::

        shown    I0  B2  B3  P1  B5  B6  P4  I7     the number says when it was decoded
                     |<- held ->|                   until P1 is known to be sound
    """
    damage: int | None = None  # number of a packet; no key frame since
    held: deque[tuple[int, Sizes | None]] = deque()
    shown = -1
    for number, frame in decoding:
        shown += 1
        if frame is None or frame.is_corrupt:
            damage = number if damage is None else min(damage, number)
            sound = deque(each for each in held if each[0] < damage)
            decoding.notes[DAMAGED] += 1 + len(held) - len(sound)
            held = sound
            continue
        if damage is not None and number > damage:
            if not frame.key_frame:
                decoding.notes[DAMAGED] += 1
                continue
            damage = None
        held.append((number, scale(frame) if shown % stride == 0 else None))
        ready = REORDERED if frame.pict_type == PictureType.B else 0
        while len(held) > ready:
            sizes = held.popleft()[1]
            if sizes is not None:
                yield sizes
    yield from (sizes for _, sizes in held if sizes is not None)


class _Scaler:
    """Brings frames to the sizes that are needed, upright."""

    def __init__(self, options: FrameOptions) -> None:
        self.options = options
        self.reformatters = {"rgb24": VideoReformatter(), "gray": VideoReformatter()}
        self.matrix: tuple[int, ...] | None = ()  # empty: not read yet

    def __call__(self, frame: av.VideoFrame) -> Sizes:
        if frame.key_frame or self.matrix == ():
            matrix = frame.side_data.get("DISPLAYMATRIX")
            self.matrix = None
            if matrix is not None:
                self.matrix = tuple(np.frombuffer(matrix, np.int32).tolist())
        color = upright(self._scale(frame, self.options.size, "rgb24"), self.matrix)
        if not self.options.flow:
            return color, None
        return color, upright(self._scale(frame, FLOW_SIZE, "gray"), self.matrix)

    def _scale(self, frame: av.VideoFrame, size: int, pixel_format: str) -> np.ndarray:
        width, height = size, size
        if self.options.resize == "crop":
            sides = (frame.width, frame.height)
            width, height = (max(size, round(side * size / min(sides))) for side in sides)
        scaled = self.reformatters[pixel_format].reformat(
            frame, width, height, pixel_format, interpolation=Interpolation.AREA
        )
        array = scaled.to_ndarray()
        top, left = (height - size) // 2, (width - size) // 2
        return array[top : top + size, left : left + size]


def upright(picture: np.ndarray, matrix: tuple[int, ...] | None) -> np.ndarray:
    """A picture ``[H, W, ...]`` turned and mirrored as a display matrix says, 9 numbers by row.

    The matrix takes (column, row) of the stored picture to that of the shown one:
    ``x' = a x + c y, y' = b x + d y``, here to the nearest quarter turn.
    """
    if matrix is None:
        return picture
    a, b, _, c, d, *_ = matrix
    if abs(a) < abs(b):
        picture = picture.swapaxes(0, 1)
        a, d = c, b
    if a < 0:
        picture = picture[:, ::-1]
    return picture[::-1] if d < 0 else picture
