"""``video:``: clips of video files, read with PyAV, and of folders of frames.

A `Video` is read when a transform requests its clips, so that the sample's seed determines the
frames. Frames are chosen by time, not by number, so that a video with a variable frame rate is read
as it is played.
"""

import os
from pathlib import Path

from vim_ssl.data.clips import Sampling, VideoData, images_in, import_av
from vim_ssl.data.dataset import ImageData
from vim_ssl.data.images import EXTENSIONS
from vim_ssl.data.registry import Splits, source
from vim_ssl.data.sources.folder import FileImages, check_option, folder_splits
from vim_ssl.data.sources.tables import read_table
from vim_ssl.data.spec import DataSpec
from vim_ssl.data.tables import TABLES
from vim_ssl.data.walk import find_files

VIDEO_EXTENSIONS = (
    ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts",
    ".webm", ".wmv",
)  # fmt: skip


class VideoFiles(FileImages):
    """Paths of video files and of folders of frames."""

    def sizes(self, row: int) -> int | str:
        path = self[row]
        if not os.path.isdir(path):
            return super().sizes(row)
        names = images_in(path)
        sizes = (os.path.getsize(os.path.join(path, name)) for name in names)
        return f"{len(names)} {sum(sizes)}"


@source(
    "video", extra="video", options=("frames", "fps", "clips", "image", "label", "caption", "group")
)
def open_video(spec: DataSpec) -> Splits:
    """Open ``video:ROOT``: a folder with video files or folders of frames at any depth, one file,
    or a table of paths.

    - In a folder, splits, classes and ``label=`` are those of `open_folder`. A folder of images is
      one video, with its frames sorted by name; images beside video files are skipped.
    - ``video:TABLE.csv`` has one row per video: its path, and optionally label and split, as
      ``csv:``.

    ``frames=8`` sets the frames per clip. ``fps=5`` takes them at this rate from a part of the
    video, instead of spreading them over the whole video. ``clips=4`` sets the clips per video that
    are evaluated together.

    Raises: ImportError without PyAV, unless there are only folders of frames; FileNotFoundError;
        ValueError for a folder without videos.
    """
    location = Path(spec.location).expanduser()
    sampling = Sampling(spec.frames or Sampling.frames, spec.fps, spec.clips or Sampling.clips)
    if location.suffix.lower() in TABLES:
        spec.takes("frames", "fps", "clips", "image", "label", "caption", "group")
        videos = read_table(spec, VideoData, VideoFiles)
    else:
        spec.takes("frames", "fps", "clips", "label")
        videos = _open_folder(spec, location)

    def choose(spec: DataSpec) -> ImageData:
        data = videos.open(spec)
        data.sampling = sampling
        if len(data) and not os.path.isdir(str(data.raw(0))):
            import_av()
        return data

    return Splits(videos.names, choose)


def _open_folder(spec: DataSpec, root: Path) -> Splits:
    check_option(spec, "label", ("folder", "none"))
    if root.is_file():
        root, names = root.parent, [root.name]
    else:
        files = find_files(root, spec.location, "video or frame", VIDEO_EXTENSIONS + EXTENSIONS)
        names = [name for name in files if name.lower().endswith(VIDEO_EXTENSIONS)]
        beside = {name.rpartition("/")[0] for name in names}
        names += {name.rpartition("/")[0] for name in files} - beside - {""}
        if not names:
            raise ValueError(
                f"video:{spec.location} contains {len(files)} images but no video; to read one "
                "folder of frames, give its parent folder."
            )
    return folder_splits(root, sorted(names), VideoFiles, VideoData)
