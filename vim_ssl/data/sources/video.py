"""``video:``: clips of video files, read with PyAV, and of folders of frames.

A `Video` is read when a transform requests its clips, so that the sample's seed determines the
frames. Frames are chosen by time, not by number, so that a video with a variable frame rate is read
as it is played.
"""

import os
from collections import defaultdict
from pathlib import Path

from vim_ssl.data.clips import (
    ANIMATIONS,
    Sampling,
    VideoData,
    has_gap,
    images_in,
    import_av,
    is_animated,
)
from vim_ssl.data.dataset import ImageData
from vim_ssl.data.images import EXTENSIONS
from vim_ssl.data.passed_over import pass_over
from vim_ssl.data.registry import Splits, source
from vim_ssl.data.sources.folder import FileImages, check_option, folder_splits
from vim_ssl.data.sources.tables import read_table
from vim_ssl.data.spec import DataSpec
from vim_ssl.data.tables import TABLES
from vim_ssl.data.walk import find_files

VIDEO_EXTENSIONS = (
    ".3g2", ".3gp", ".apng", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".m2t", ".m2ts",
    ".m2v", ".m4v", ".mkv", ".mov", ".mp4", ".mpe", ".mpeg", ".mpg", ".mpv", ".mts", ".mxf",
    ".ogm", ".ogv", ".qt", ".rm", ".rmvb", ".ts", ".vob", ".webm", ".wmv", ".y4m",
)  # fmt: skip
ANIMATED = (".gif", ".webp")  # endings of images that are videos if one in their folder is


class VideoFiles(FileImages):
    """Paths of video files and of folders of frames."""

    def paths(self, row: int) -> list[str]:
        """Return the paths of a row: of all its frames, since their folder does not change with
        them."""
        path = self[row]
        if not os.path.isdir(path):
            return [path]
        return [os.path.join(path, name) for name in images_in(path)]

    def sizes(self, row: int) -> int | str:
        if not os.path.isdir(self[row]):
            return super().sizes(row)
        frames = self.paths(row)
        return f"{len(frames)} {sum(map(os.path.getsize, frames))}"


@source(
    "video", extra="video", options=("frames", "fps", "clips", "image", "label", "caption", "group")
)
def open_video(spec: DataSpec) -> Splits:
    """Open ``video:ROOT``: a folder with video files or folders of frames at any depth, one file,
    or a table of paths.

    - In a folder, splits, classes and ``label=`` are those of `open_folder`. A folder of images is
      one video, with its frames sorted by name; animated GIFs and WebPs are a video each. Other
      images beside videos are skipped.
    - ``video:TABLE.csv`` has one row per video: its path, and optionally label and split, as
      ``csv:``.

    ``frames=8`` sets the frames per clip. ``fps=5`` takes them at this rate from a part of the
    video, instead of spreading them over the whole video. ``clips=4`` sets the clips per video that
    are evaluated together.

    Raises: ImportError without PyAV, unless there are only folders of frames; FileNotFoundError;
        ValueError for a folder without videos.
    """
    location = Path(spec.location).expanduser()
    faults: list[str] = []
    sampling = Sampling(spec.frames or Sampling.frames, spec.fps, spec.clips or Sampling.clips)
    if location.suffix.lower() in TABLES:
        spec.takes("frames", "fps", "clips", "image", "label", "caption", "group")
        videos = read_table(spec, VideoData, VideoFiles)
    else:
        spec.takes("frames", "fps", "clips", "label")
        videos, faults = _open_folder(spec, location)

    def choose(spec: DataSpec) -> ImageData:
        data = videos.open(spec)
        data.sampling = sampling
        data.faults = [*data.faults, *faults]
        first = str(data.raw(0)) if len(data) else ""
        if first and not os.path.isdir(first) and not first.lower().endswith(ANIMATIONS):
            import_av()
        return data

    return Splits(videos.names, choose)


def _open_folder(spec: DataSpec, root: Path) -> tuple[Splits, list[str]]:
    """Return the videos of a folder, and their faults."""
    check_option(spec, "label", ("folder", "none"))
    faults: list[str] = []
    if root.is_file():
        root, names = root.parent, [root.name]
    else:
        files = find_files(root, spec.location, "video or frame", VIDEO_EXTENSIONS + EXTENSIONS)
        names, faults = _videos(root, files)
        if not names:
            raise ValueError(
                f"video:{spec.location} contains {len(files)} images but no video; to read one "
                "folder of frames, give its parent folder."
            )
    return folder_splits(root, names, VideoFiles, VideoData), faults


def _videos(root: Path, files: list[str]) -> tuple[list[str], list[str]]:
    """Return the video files and the folders of frames among files below root, and their faults."""
    videos, images = [], defaultdict(list)
    for name in files:
        if name.lower().endswith(VIDEO_EXTENSIONS):
            videos.append(name)
        else:
            images[name.rpartition("/")[0]].append(name)
    for names in images.values():
        moving = [name for name in names if name.lower().endswith(ANIMATED)]
        if any(is_animated(str(root / name)) for name in moving):
            videos += moving
    apart, gaps = {name.rpartition("/")[0] for name in videos} | {""}, []
    chosen = set(videos)
    for folder, names in images.items():
        if folder in apart:
            others = [name for name in names if name not in chosen]
            pass_over("images that are not in a folder of frames", len(others), others)
        else:
            videos.append(folder)
            gaps += [folder] if has_gap(names) else []
    faults = [
        f"{len(gaps):,} folders of frames skip numbers, such as {gaps[0]}/; their frames are read "
        "as if none were missing."
    ] if gaps else []  # fmt: skip
    return sorted(videos), faults
