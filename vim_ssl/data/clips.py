"""Clips of videos: choose frames, and decode them from files or folders of frames."""

import logging
import math
import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageSequence

from vim_ssl.data.dataset import ImageData
from vim_ssl.data.images import EXTENSIONS, BadImage, clean_image, decode_image, most_pixels
from vim_ssl.data.walk import list_files
from vim_ssl.utils.optional import require

log = logging.getLogger(__name__)

ROUNDING = 1e-6  # seconds; a time this close before a frame selects that frame
FOLDER_FPS = 30.0  # assumed frame rate of a folder of frames
LEAST_AV = 17  # version of PyAV
ANIMATIONS = (".gif", ".webp", ".png", ".apng")  # formats of images that can be videos
HDR = (16, 18)  # transfer functions PQ and HLG
STRETCHED = 4  # a pixel is at most this many times as wide as high; more is an error in the file


@dataclass(frozen=True)
class Sampling:
    """How the frames of a clip are chosen.

    Attributes:
        frames: number of frames in a clip.
        fps: frames per second in a clip, which starts anywhere in the video ("dense"). None divides
            the whole video into equal segments and takes one frame from each ("uniform").
        clips: number of clips per video in evaluation; training takes one.
    """

    frames: int = 8
    fps: float | None = None
    clips: int = 1

    def times(self, duration: float, training: bool) -> list[list[float]]:
        """Return one list of frame times per clip, in seconds from the start of the video.

        Training draws from torch's global generator: for uniform sampling the position of each
        frame in its segment, for dense sampling the start of the clip. Evaluation spreads these
        positions or starts evenly over the clips; a single clip takes the middle. Past its end, a
        video repeats its last frame.
        """
        count = 1 if training else self.clips
        shares = [(clip + 0.5) / count for clip in range(count)]
        if self.fps is None:
            shifts = (
                [torch.rand(self.frames).tolist()]
                if training else [[share] * self.frames for share in shares]
            )  # fmt: skip
            return [[(i + shift) / self.frames * duration for i, shift in enumerate(clip)]
                    for clip in shifts]  # fmt: skip
        slack = max(duration - self.frames / self.fps, 0.0)
        if training:
            shares = [float(torch.rand(()))]
        return [[slack * share + i / self.fps for i in range(self.frames)] for share in shares]


class Video:
    """An undecoded video: a file, or a folder of frames in natural sort order (frame2 before
    frame10).

    Frames are RGB, with the container's rotation and mirroring applied, and with square pixels. An
    undecodable frame is replaced by the next decodable one, or by the previous one at the end.
    What is shown otherwise than meant (see `vim_ssl.data.clips.note`) is in a frame's
    ``info["notes"]``.
    """

    def __init__(self, path: str | Path, sampling: Sampling):
        self.path, self.sampling = str(path), sampling

    def clips(
        self, training: bool = False, prepare: Callable[[Image.Image], Any] = lambda frame: frame
    ) -> list[list[Any]]:
        """Decode clips of ``sampling.frames`` images each; a single clip when training.

        Args:
            prepare: called once with every decoded frame; clips contain its results. If it shrinks
                frames, only a few are in memory at full size at a time.
        Raises: BadImage for a file that is not a video, or one without a decodable frame.
        """
        source = self._open()
        at = source.times
        # The last frame gets the median duration; for a single frame all times are equal.
        duration = at[-1] - at[0] + float(np.median(np.diff(at) if len(at) > 1 else [0.0]))
        clips = [
            [max(bisect_right(at, at[0] + t + ROUNDING) - 1, 0) for t in times]
            for times in self.sampling.times(duration, training)
        ]
        numbers = sorted({number for clip in clips for number in clip})
        frames = {number: prepare(image) for number, image in source.read(numbers)}
        return [[frames[number] for number in clip] for clip in clips]

    def _open(self) -> Any:
        if os.path.isdir(self.path):
            return _Frames(self.path)
        return (_Animation if self.path.lower().endswith(ANIMATIONS) else _File)(self.path)

    def __repr__(self) -> str:
        return f"Video({self.path!r}, {self.sampling})"


class LoadedVideo(Video):
    """A video in memory: frames, as images or arrays (h, w) or (h, w, 3), uint8."""

    def __init__(self, frames: Sequence[Image.Image | np.ndarray], sampling: Sampling):
        super().__init__("video in memory", sampling)
        self.frames = list(frames)
        self.times = [i / FOLDER_FPS for i in range(len(self.frames))]

    def _open(self) -> "LoadedVideo":
        return self

    def read(self, numbers: Sequence[int]) -> Iterator[tuple[int, Image.Image]]:
        """Yield (number, frame) for these numbers."""
        for number in numbers:
            frame = self.frames[number]
            image = Image.fromarray(frame) if isinstance(frame, np.ndarray) else frame
            yield number, clean_image(image, "RGB")


def still(image: Any) -> Any:
    """Return an image unchanged, or the first frame of a video's first clip. Raises: BadImage."""
    return image.clips()[0][0] if isinstance(image, Video) else image


class _Frames:
    """A folder of frames, all of one size."""

    def __init__(self, path: str):
        self.path = path
        self.names = images_in(path)
        if not self.names:
            raise BadImage(path, "a folder without images")
        self.times = [i / FOLDER_FPS for i in range(len(self.names))]

    def read(self, numbers: Sequence[int]) -> Iterator[tuple[int, Image.Image]]:
        """Yield (number, frame) for these numbers, which must be in ascending order."""
        last = fault = size = None
        for number in numbers:
            for name in self.names[number:]:  # the next readable frame
                try:
                    last = decode_image(os.path.join(self.path, name), mode="RGB")
                    break
                except BadImage as bad:
                    fault = bad
            if last is None:
                raise BadImage(self.path, f"none of its frames can be read: {fault}")
            if last.size != (size := size or last.size):
                sizes = " and ".join(f"{width}×{height}" for width, height in (size, last.size))
                raise BadImage(self.path, f"its frames have several sizes, {sizes} ({name})")
            yield number, last


class _Animation:
    """An animated GIF, WebP or PNG, read with Pillow."""

    def __init__(self, path: str):
        self.path = path
        file = _stat(path)
        self.times = _animation_times(path, file.st_size, file.st_mtime_ns)

    def read(self, numbers: Sequence[int]) -> Iterator[tuple[int, Image.Image]]:
        """Yield (number, frame) for these numbers, which must be in ascending order."""
        with Image.open(self.path) as image:
            for number in numbers:
                try:
                    image.seek(number)
                    frame = clean_image(image.copy(), "RGB")
                except Exception as error:
                    raise BadImage(self.path, f"frame {number}: {error}") from error
                yield number, frame


@lru_cache(maxsize=1024)
def _animation_times(path: str, size: int, changed: int) -> list[float]:
    """Return the time in seconds of each frame, up to the first damaged one.

    Args:
        size, changed: size and modification time of the file, as cache keys.
    """
    seconds: list[float] = []
    try:
        with Image.open(path) as image:
            if (pixels := math.prod(image.size)) > most_pixels():
                raise BadImage(path, f"it has {pixels:,} pixels, the limit is {most_pixels():,}")
            for frame in ImageSequence.Iterator(image):
                frame.load()
                milliseconds = float(frame.info.get("duration") or 0)
                # Like browsers: a tenth of a second for a frame without a duration.
                seconds.append(milliseconds / 1000 if milliseconds > 10 else 0.1)
    except BadImage:
        raise
    except Exception as error:  # Pillow raises errors of nearly any type
        if not seconds:
            raise BadImage(path, f"{type(error).__name__}: {error}") from error
    return [0.0, *accumulate(seconds[:-1])]


def is_animated(path: str) -> bool:
    """True for an image file with several frames."""
    try:
        with Image.open(path) as image:
            return getattr(image, "n_frames", 1) > 1
    except Exception:  # found when it is read
        return False


def _stat(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise BadImage(path, f"{type(error).__name__}: {error}") from error


class _File:
    """A video file; the times of its frames are read from the packets, without decoding."""

    def __init__(self, path: str):
        self.path, file = path, _stat(path)
        self.stamps, self.keys, unit, self.counted = _index(path, file.st_size, file.st_mtime_ns)
        self.times = [stamp * unit for stamp in self.stamps]

    def read(self, numbers: Sequence[int]) -> Iterator[tuple[int, Image.Image]]:
        """Yield (number, frame) for these numbers, which must be in ascending order. Seeks to the
        last key frame before a number."""
        last: Any = None
        with _opened(self.path) as container:
            stream = _video_stream(container, self.path)
            stream.codec_context.thread_count = 1  # a loader has processes instead
            frames = _decoded(container, stream, self.stamps if self.counted else None)
            for number in numbers:
                target = self.stamps[number]
                key = self.keys[max(bisect_right(self.keys, target) - 1, 0)]
                if key > self.keys[0] and (last is None or last.pts < key):
                    container.seek(key, stream=stream)
                    frames = _decoded(container, stream)
                    landed = next(frames, None)
                    if landed is None or landed.pts > target:  # not every format seeks exactly
                        container.seek(self.stamps[0], stream=stream)
                        frames = _decoded(container, stream)
                        landed = next(frames, last)
                    last = landed
                while last is None or last.pts < target:
                    following = next(frames, None)
                    if following is None:
                        break
                    last = following
                if last is None:
                    raise BadImage(self.path, "none of its frames can be decoded")
                yield number, _image(last, stream.sample_aspect_ratio, self.path)


@lru_cache(maxsize=64)  # 7 MB for a two-hour film
def _index(path: str, size: int, changed: int) -> tuple[list[int], list[int], float, bool]:
    """Sorted time stamps of all displayed frames and of the key frames, their unit in seconds, and
    whether to ignore the stamps of decoded frames; see `_decoded`.

    Args:
        size, changed: size and modification time of the file, as cache keys.
    """
    stamps, keys = [], []
    with _opened(path) as container:
        stream = _video_stream(container, path)
        try:
            for packet in container.demux(stream):
                stamp = packet.dts if packet.pts is None else packet.pts
                # Frames that an edit list removes are decoded but not displayed.
                if stamp is not None and packet.size and not packet.is_discard:
                    stamps.append(stamp)
                    if packet.is_keyframe:
                        keys.append(stamp)
        except _errors():
            pass  # truncated: keep the packets read so far
        unit = float(stream.time_base)
        # AVI stores no times. For frames that are not stored in display order (H.264), FFmpeg may
        # generate wrong ones; then the file is decoded from the start and frames are counted.
        in_order = stamps == sorted(stamps)
        counted = container.format.name == "avi" and stream.codec_context.has_b_frames and in_order
    if not stamps:
        raise BadImage(path, "its video stream has no frames")
    keys = [] if counted else sorted(keys)
    return sorted(stamps), keys or [min(stamps)], unit, bool(counted)


def _decoded(container: Any, stream: Any, stamps: Sequence[int] | None = None) -> Iterator[Any]:
    """Yield frames with their time stamps; skip those that cannot be decoded.

    Args:
        stamps: assign these in order, instead of the stamps in the file.
    """
    packets = container.demux(stream)
    given = iter(stamps or ())
    while True:
        try:
            packet = next(packets, None)
        except _errors():
            return  # truncated
        if packet is None:
            return
        try:
            frames = packet.decode()
        except _errors():
            continue
        for frame in frames:
            if frame.pts is None:
                frame.pts = frame.dts
            if stamps:
                frame.pts = next(given, None)
            if frame.pts is not None and not frame.is_corrupt:
                yield frame


def _image(frame: Any, aspect: Fraction | None, path: str) -> Image.Image:
    """Convert a frame to an upright RGB image with square pixels.

    Args:
        aspect: width of a pixel in units of its height; None for square ones.
    """
    if any(component.is_alpha for component in frame.format.components):
        image = clean_image(Image.fromarray(frame.to_ndarray(format="rgba"), "RGBA"), "RGB")
    else:
        image = frame.to_image().convert("RGB")
    notes = [note for note, is_so in (
        ("HDR, shown without tone mapping", frame.color_trc in HDR),
        ("interlaced", frame.interlaced_frame),
    ) if is_so]  # fmt: skip
    if aspect and aspect != 1:
        if 1 / STRETCHED <= aspect <= STRETCHED:
            width, height = image.size
            size = (
                (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))
            )
            image = image.resize(size, Image.Resampling.BICUBIC)
        else:
            notes.append(
                f"declared to have pixels {aspect} times as wide as high, which is ignored"
            )
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).tolist()
        if a * d < b * c:  # mirrored: a rotation angle cannot express this
            image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    # Phones record rotations in steps of 90 degrees.
    image = image.rotate(round(frame.rotation / 90) * 90, expand=True)
    for text in notes:
        note(text, path)
    image.info["notes"] = notes
    return image


@cache  # once per process and video
def note(text: str, path: str) -> None:
    """Warn of something in a video that is read, but not as it is meant."""
    log.warning("%s: %s", path, text)


def _opened(path: str) -> Any:
    av = import_av()
    try:
        return av.open(path)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise BadImage(path, f"not a video that FFmpeg can read ({error})") from error


def _video_stream(container: Any, path: str) -> Any:
    """Return the first video stream that is not a cover image."""
    streams = container.streams.video
    moving = [s for s in streams if not s.disposition & import_av().stream.Disposition.attached_pic]
    if not moving:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        cover = ", of which the video is a cover image" if streams else ""
        raise BadImage(path, f"it has no video stream; it has {kinds}{cover}")
    stream = moving[0]
    if stream.codec_context is None:
        raise BadImage(path, "FFmpeg has no decoder for its video stream")
    return stream


def import_av() -> Any:
    """Return the module av (PyAV).

    Raises: ImportError with the command that installs it, also for a version with wrong colours.
    """
    av = require("av", "video", "Videos (video:)")
    if int(av.__version__.partition(".")[0]) < LEAST_AV:
        raise ImportError(
            f"av {av.__version__} decodes the colours of HD videos (BT.709) wrongly; install "
            f"version {LEAST_AV} or later: pip install 'vim-ssl[video]'"
        )
    return av


def _errors() -> tuple[type[BaseException], ...]:
    return (import_av().FFmpegError,)


class VideoData(ImageData):
    """Videos by index; an item's ``image`` is a `Video`."""

    kind = "video"
    sampling: Sampling

    def _decode(self, image: Any) -> Video:
        return Video(image, self.sampling)


def images_in(path: str) -> list[str]:
    """Names of the images in a folder, in natural sort order (f2 before f10)."""
    return sorted(list_files(path, EXTENSIONS), key=_by_number)


def _by_number(name: str) -> tuple[list[tuple[int, str]], str]:
    pieces = re.findall("([0-9]*)([^0-9]*)", name)
    return [(int(number or -1), text) for number, text in pieces], name


def has_gap(names: Sequence[str]) -> bool:
    """True if numbered frames are missing: most numbers follow at one distance, not all."""
    last = [re.findall(r"\d+", os.path.splitext(name)[0])[-1:] for name in names]
    numbers = sorted({int(digits[0]) for digits in last if digits})
    if len(numbers) < max(len(names), 3):
        return False
    steps = Counter(b - a for a, b in pairwise(numbers))
    usual, count = steps.most_common(1)[0]
    return len(steps) > 1 and 2 * count > sum(steps.values()) and max(steps) > usual
