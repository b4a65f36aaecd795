"""Clips of videos: which frames are read, and how files and frame folders are decoded."""

import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vim_ssl.data.dataset import ImageData
from vim_ssl.data.images import EXTENSIONS, BadImage, decode_image
from vim_ssl.utils.optional import require

ROUNDING = 1e-6  # seconds; a time that is a frame's own means that frame
FOLDER_FPS = 30.0  # a folder of frames does not say how fast they follow one another


@dataclass(frozen=True)
class Sampling:
    """Which frames make a clip.

    Attributes:
        frames: of a clip.
        fps: frames a second within a clip, which begins anywhere ("dense"). Without it a frame is
            taken of each of as many equal parts of the whole video ("uniform").
        clips: of a video where it is judged; training takes one.
    """

    frames: int = 8
    fps: float | None = None
    clips: int = 1

    def times(self, duration: float, training: bool) -> list[list[float]]:
        """Seconds from the video's beginning, a list a clip.

        Training draws from torch's global generator: uniform where in its part each frame lies,
        dense where the clip begins. Else uniform clips lie at different places of the same parts,
        one alone in their middles, and the beginnings of dense ones are spread evenly, one alone
        in the middle of the video. What a dense clip wants beyond the end is the last frame.
        """
        count = 1 if training else self.clips
        places = [(clip + 0.5) / count for clip in range(count)]
        if self.fps is None:
            inside = (
                [torch.rand(self.frames).tolist()]
                if training else [[place] * self.frames for place in places]
            )  # fmt: skip
            return [
                [(i + shift) / self.frames * duration for i, shift in enumerate(shifts)]
                for shifts in inside
            ]
        slack = max(duration - self.frames / self.fps, 0.0)
        if training:
            places = [float(torch.rand(()))]
        return [[slack * place + i / self.fps for i in range(self.frames)] for place in places]


class Video:
    """A video that is not read yet: a file, or a folder of images in the order of their names,
    numbers in these by their value.

    Frames are upright and mirrored (as a phone's display matrix says) and RGB. One that cannot be
    decoded is replaced by the next that can, or at the end by the one before.
    """

    def __init__(self, path: str | Path, sampling: Sampling):
        self.path, self.sampling = str(path), sampling

    def clips(
        self, training: bool = False, prepare: Callable[[Image.Image], Any] = lambda frame: frame
    ) -> list[list[Any]]:
        """Decoded clips of ``sampling.frames`` images each; one when training.

        Args:
            prepare: is given an image as soon as it is decoded, once, however often clips show it;
                what it returns stands in the image's place. One that shrinks keeps memory small:
                no more than a few frames are there in full size at a time.
        Raises: BadImage for what is no video, has no image in it, or none that can be decoded.
        """
        source: _File | _Frames = (_Frames if os.path.isdir(self.path) else _File)(self.path)
        at = source.times
        # The last frame is shown as long as most are; of one alone all times are the same.
        duration = at[-1] - at[0] + float(np.median(np.diff(at) if len(at) > 1 else [0.0]))
        wanted = [
            [max(bisect_right(at, at[0] + t + ROUNDING) - 1, 0) for t in times]
            for times in self.sampling.times(duration, training)
        ]
        numbers = sorted({number for clip in wanted for number in clip})
        kept = {number: prepare(image) for number, image in source.read(numbers)}
        return [[kept[number] for number in clip] for clip in wanted]

    def __repr__(self) -> str:
        return f"Video({self.path!r}, {self.sampling})"


def still(image: Any) -> Any:
    """An image itself, or the first frame of a video's clip. Raises: BadImage."""
    return image.clips()[0][0] if isinstance(image, Video) else image


class _Frames:
    """A folder of frames."""

    def __init__(self, path: str):
        self.path = path
        self.names = images_in(path)
        if not self.names:
            raise BadImage(path, "a folder without images")
        self.times = [i / FOLDER_FPS for i in range(len(self.names))]

    def read(self, numbers: Sequence[int]) -> Iterator[tuple[int, Image.Image]]:
        """Frames with their numbers, which ascend."""
        last = fault = None
        for number in numbers:
            for name in self.names[number:]:  # the next that can be read
                try:
                    last = decode_image(os.path.join(self.path, name), mode="RGB")
                    break
                except BadImage as bad:
                    fault = bad
            if last is None:
                raise BadImage(self.path, f"none of its frames can be read: {fault}")
            yield number, last


class _File:
    """A video file: its frames' times are read from the packets, without decoding."""

    def __init__(self, path: str):
        self.path = path
        try:
            file = os.stat(path)
        except OSError as error:
            raise BadImage(path, f"{type(error).__name__}: {error}") from error
        self.stamps, self.keys, unit, self.counted = _index(path, file.st_size, file.st_mtime_ns)
        self.times = [stamp * unit for stamp in self.stamps]

    def read(self, numbers: Sequence[int]) -> Iterator[tuple[int, Image.Image]]:
        """Frames with their numbers, which ascend; the decoder jumps where a key frame lies between
        two."""
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
                    if landed is None or landed.pts > target:  # not every format jumps exactly
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
                yield number, _image(last)


@lru_cache(maxsize=64)  # of a two-hour film 7 MB
def _index(path: str, size: int, changed: int) -> tuple[list[int], list[int], float, bool]:
    """Sorted time stamps of all frames that are shown and of the key frames, the seconds of their
    unit, and whether the frames' own stamps are to be ignored; see `_decoded`.

    Args:
        size, changed: of the file, so that another one of the same name is read again.
    """
    stamps, keys = [], []
    with _opened(path) as container:
        stream = _video_stream(container, path)
        try:
            for packet in container.demux(stream):
                stamp = packet.dts if packet.pts is None else packet.pts
                # What an edit list cuts away is decoded, but not shown.
                if stamp is not None and packet.size and not packet.is_discard:
                    stamps.append(stamp)
                    if packet.is_keyframe:
                        keys.append(stamp)
        except _errors():
            pass  # cut off: what came before it is there
        unit = float(stream.time_base)
        # AVI stores no times. Where frames are stored in another order than shown and FFmpeg does
        # not see that (H.264), it makes up wrong ones; then the whole is decoded, and counted.
        in_order = stamps == sorted(stamps)
        counted = container.format.name == "avi" and stream.codec_context.has_b_frames and in_order
    if not stamps:
        raise BadImage(path, "its video stream has no frame")
    keys = [] if counted else sorted(keys)
    return sorted(stamps), keys or [min(stamps)], unit, bool(counted)


def _decoded(container: Any, stream: Any, stamps: Sequence[int] | None = None) -> Iterator[Any]:
    """Frames with their time, those that cannot be decoded left out.

    Args:
        stamps: give these to them, one after another, instead of their own.
    """
    packets = container.demux(stream)
    given = iter(stamps or ())
    while True:
        try:
            packet = next(packets, None)
        except _errors():
            return  # cut off
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


def _image(frame: Any) -> Image.Image:
    image = frame.to_image().convert("RGB")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).tolist()
        if a * d < b * c:  # mirrored, which an angle cannot say
            image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    # By quarters of a turn, as phones are held.
    return image.rotate(round(frame.rotation / 90) * 90, expand=True)


def _opened(path: str) -> Any:
    av = import_av()
    try:
        return av.open(path)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise BadImage(path, f"no video that FFmpeg can read ({error})") from error


def _video_stream(container: Any, path: str) -> Any:
    if not container.streams.video:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise BadImage(path, f"it has no video stream; it has {kinds}")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise BadImage(path, "FFmpeg knows no decoder for its video stream")
    return stream


def import_av() -> Any:
    """Return the module av (PyAV). Raises: ImportError that says what to install."""
    return require("av", "video", "Videos (video:)")


def _errors() -> tuple[type[BaseException], ...]:
    return (import_av().FFmpegError,)


class VideoData(ImageData):
    """Videos by index; an item's ``image`` is a `Video`.

    Attributes:
        sampling: of all of them.
    """

    kind = "video"
    sampling: Sampling

    def _decode(self, image: Any) -> Video:
        return Video(image, self.sampling)


def images_in(path: str) -> list[str]:
    """Their names; f10 comes after f2."""
    names = (name for name in os.listdir(path)
             if name.lower().endswith(EXTENSIONS) and not name.startswith("."))  # fmt: skip
    return sorted(names, key=_by_number)


def _by_number(name: str) -> tuple[list[tuple[int, str]], str]:
    pieces = re.findall("([0-9]*)([^0-9]*)", name)
    return [(int(number or -1), text) for number, text in pieces], name
