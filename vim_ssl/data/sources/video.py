"""``video:`` — clips of video files, by PyAV, and of folders of frames.

A `Video` is read when a transform asks for its clips, so that which frames they have is drawn with
a sample's other random numbers. Frames are chosen by time, not by number: a video of varying frame
rate is seen as it is played.
"""

import os
from pathlib import Path

from vim_ssl.data.clips import Sampling, VideoData, images_in, import_av
from vim_ssl.data.dataset import ImageData
from vim_ssl.data.images import EXTENSIONS
from vim_ssl.data.registry import source
from vim_ssl.data.sources.folder import FileImages, find_files, read_layout
from vim_ssl.data.spec import DataSpec

VIDEO_EXTENSIONS = (
    ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts",
    ".webm", ".wmv",
)  # fmt: skip


# ---------------------------------------------------------------- reading


# ---------------------------------------------------------------- data


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
def open_video(spec: DataSpec) -> ImageData:
    """Open ``video:ROOT``: a folder with video files or folders of frames at any depth, one file,
    or a table of paths.

    - In a folder, splits and classes are found as those of images (see `open_folder`); a folder
      of images is one video, of which the frames follow one another as their names do. Images
      beside video files are passed over. ``label=folder`` and ``label=none`` are as there.
    - ``video:TABLE.csv`` has a line a video: its path, and where known label and split, as `csv:`.

    ``frames=8`` makes a clip; ``fps=5`` takes them so fast, from a part of the video, instead of
    spreading them over the whole; ``clips=4`` is how many of a video are judged together.

    Raises: ImportError without PyAV, unless there are only folders of frames; FileNotFoundError;
        ValueError for a folder without videos.
    """
    location = Path(spec.location).expanduser()
    sampling = Sampling(spec.frames or Sampling.frames, spec.fps, spec.clips or Sampling.clips)
    if location.suffix.lower() in (".csv", ".tsv"):
        from vim_ssl.data.sources.tables import read_table  # which opens tables of everything

        spec.takes("frames", "fps", "clips", "image", "label", "caption", "group")
        data = read_table(spec, VideoData, VideoFiles).open(spec)
    else:
        spec.takes("frames", "fps", "clips", "label")
        data = _open_folder(spec, location)
    assert isinstance(data, VideoData)
    data.sampling = sampling
    if any(not os.path.isdir(str(data.raw(i))) for i in range(min(len(data), 1))):
        import_av()
    return data


def _open_folder(spec: DataSpec, root: Path) -> VideoData:
    if spec.label not in (None, "none", "folder"):
        raise ValueError(
            f"video:{spec.location}: label={spec.label} is nothing a folder has; it takes "
            "label=folder or label=none."
        )
    if root.is_file():
        root, names = root.parent, [root.name]
    else:
        found = find_files(root, spec.location, "video or frame", VIDEO_EXTENSIONS + EXTENSIONS)
        names = [name for name in found if name.lower().endswith(VIDEO_EXTENSIONS)]
        beside = {name.rpartition("/")[0] for name in names}
        names += {name.rpartition("/")[0] for name in found} - beside - {""}
        if not names:
            raise ValueError(
                f"video:{spec.location} holds {len(found)} images and no video; for one folder "
                "of frames name the folder that holds it."
            )
    layout = read_layout(sorted(names), spec.split, spec.label, str(root))
    return VideoData(
        VideoFiles(str(root), layout.names), layout.names, name=str(spec), labels=layout.labels,
        classes=layout.classes, splits=layout.splits, split=layout.split,
    )  # fmt: skip


# ---------------------------------------------------------------- clips as tensors
