"""Videos: which frames a clip has, whatever the container; and what is wrong with files."""

import os
import pickle
import weakref
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vim_ssl import VimEncoder
from vim_ssl.data import BadImage, create_transform, open_data
from vim_ssl.data import clips as clips_module
from vim_ssl.data.check import check
from vim_ssl.data.clips import Sampling, Video
from vim_ssl.evaluation.features import _times
from vim_ssl.models.video import inflate

av = pytest.importorskip("av")
STEP = 12  # grey levels between two frames


def frame_image(i: int, size=(48, 32)) -> np.ndarray:
    """Grey by its number; the top left corner is red."""
    values = np.full((size[1], size[0], 3), STEP * i, np.uint8)
    values[:8, :12] = (255, 0, 0)
    return values


def write(path: Path, count: int = 16, codec: str = "mpeg4", stamps=None, gop: int = 5) -> Path:
    """A video of 10 frames a second, or at these milliseconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10 if stamps is None else 1000)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.bit_rate, stream.gop_size = 4_000_000, gop
        if stamps is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(frame_image(i), format="rgb24")
            if stamps is not None:
                frame.pts, frame.time_base = stamps[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers(clip: list[Image.Image]) -> list[int]:
    """Which frames they are, by their grey; the corner must be where it was."""
    assert all(image.getpixel((3, 3))[0] > image.getpixel((3, 3))[1] + 60 for image in clip)
    return [round(image.getpixel((40, 24))[0] / STEP) for image in clip]


def seen(path: Path, **sampling) -> list[list[int]]:
    return [numbers(clip) for clip in Video(path, Sampling(**sampling)).clips()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("videos")


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.mkv", "a.mov", "a.ts", "b.mp4"])
def test_uniform_clips_take_the_middle_of_each_part(folder, name):
    codec = "mpeg2video" if name.endswith(".ts") else "libx264" if name[0] == "b" else "mpeg4"
    path = write(folder / name, codec=codec)
    assert seen(path, frames=4) == [[2, 6, 10, 14]]
    assert seen(path, frames=16) == [list(range(16))]
    assert seen(path, frames=2, clips=2) == [[2, 10], [6, 14]]


def test_dense_clips_go_at_their_own_speed(folder):
    path = write(folder / "dense.mp4")  # 1.6 s
    assert seen(path, frames=4, fps=5) == [[4, 6, 8, 10]]
    assert seen(path, frames=4, fps=10, clips=3) == [[2, 3, 4, 5], [6, 7, 8, 9], [10, 11, 12, 13]]
    assert seen(path, frames=4, fps=2) == [[0, 5, 10, 15]]  # what lies beyond the end is the last


def test_training_draws_from_the_seeded_generator(folder):
    path = write(folder / "drawn.mp4")
    for fps in (None, 5):
        video, found = Video(path, Sampling(4, fps, clips=3)), set()
        for seed in range(8):
            draws = []
            for _ in range(2):
                torch.manual_seed(seed)
                draws.append([numbers(clip) for clip in video.clips(training=True)])
            assert draws[0] == draws[1]
            (clip,) = draws[0]
            if fps is None:
                assert [n // 4 for n in clip] == [0, 1, 2, 3]
            else:
                assert all(b - a == 2 for a, b in pairwise(clip))
            found.add(tuple(clip))
        assert len(found) > 3


def test_a_varying_frame_rate_is_seen_as_it_is_played(folder):
    # The fifth frame stands for a second.
    stamps = [0, 50, 100, 150, 200, 1200, 1250, 1300]
    path = write(folder / "vfr.mkv", count=8, stamps=stamps)
    assert seen(path, frames=4, clips=1) == [[3, 4, 4, 4]]


def test_a_single_frame_is_a_clip(folder):
    assert seen(write(folder / "one.mp4", count=1), frames=3, clips=2) == [[0] * 3] * 2
    assert seen(folder / "one.mp4", frames=3, fps=30) == [[0] * 3]


# (left, top, width, height): where the red corner comes to be.
@pytest.mark.parametrize(
    ("turn", "corner"),
    [
        ((0, 1, -1, 0), (24, 0, 8, 12)),  # as phones write for an image taken upright
        ((-1, 0, 0, -1), (36, 24, 12, 8)),
        ((0, -1, 1, 0), (0, 36, 8, 12)),
        ((-1, 0, 0, 1), (36, 0, 12, 8)),
        ((0, 1, 1, 0), (0, 0, 8, 12)),
    ],
    ids=["quarter", "half", "back", "mirrored", "mirrored quarter"],
)
def test_a_phones_rotation_is_undone(folder, turn, corner):
    size = (48, 32)
    content = bytearray(write(folder / "upright.mp4", count=4).read_bytes())
    at = content.index(b"tkhd") + 44  # the track header's matrix
    a, b, c, d = (step << 16 for step in turn)
    matrix = [a, b, 0, c, d, 0, 48 << 16, 32 << 16, 1 << 30]
    content[at : at + 36] = b"".join(v.to_bytes(4, "big", signed=True) for v in matrix)
    turned = folder / "turned.mp4"
    turned.write_bytes(content)
    (clip,) = Video(turned, Sampling(frames=1)).clips()
    assert clip[0].size == (size if corner[2] == 12 else size[::-1])
    red = np.asarray(clip[0]).astype(int)
    red = red[..., 0] - red[..., 1] > 60
    x, y, width, height = corner
    assert red[y : y + height, x : x + width].mean() > 0.8
    assert red.sum() < 1.5 * 12 * 8


def test_what_an_edit_list_cuts_away_is_not_counted(folder):
    content = bytearray(write(folder / "edited.mp4", gop=16).read_bytes())
    at = content.index(b"elst") + 12  # 0.8 s of 1.6, in thousandths, from the seventh frame on
    content[at : at + 8] = (800).to_bytes(4, "big") + (6 * 1024).to_bytes(4, "big")
    path = folder / "cut-out.mp4"
    path.write_bytes(content)
    assert seen(path, frames=8) == [list(range(6, 14))]


def test_frames_stored_in_another_order_are_seen_as_shown(folder):
    path = folder / "reordered.avi"  # which stores no times; x264 uses B-frames
    assert seen(write(path, codec="libx264"), frames=16) == [list(range(16))]
    assert seen(path, frames=4) == [[2, 6, 10, 14]]


def test_a_codec_that_nobody_knows_is_named(folder):
    content = write(folder / "known.mp4", codec="libx264").read_bytes()
    path = folder / "unknown.mp4"
    path.write_bytes(content.replace(b"avc1", b"zzzz"))
    with pytest.raises(BadImage, match="no decoder for its video stream"):
        Video(path, Sampling()).clips()


def test_damage_is_passed_over_or_named(folder):
    path = write(folder / "hurt.avi", gop=2)
    content = bytearray(path.read_bytes())
    middle = content.index(b"movi") + (len(content) - content.index(b"movi")) // 2
    content[middle : middle + 150] = bytes(150)
    path.write_bytes(content)
    (clip,) = Video(path, Sampling(frames=16)).clips()
    assert len(clip) == 16
    assert sum(round(im.getpixel((40, 24))[0] / STEP) == i for i, im in enumerate(clip)) >= 8

    cut = folder / "cut.mkv"
    whole = write(folder / "whole.mkv").read_bytes()
    cut.write_bytes(whole[: len(whole) * 3 // 4])
    (clip,) = Video(cut, Sampling(frames=4)).clips()
    assert len(clip) == 4

    for name, text in (("empty.mp4", b""), ("text.mp4", b"no video " * 99)):
        (folder / name).write_bytes(text)
        with pytest.raises(BadImage, match="not a video that FFmpeg can read"):
            Video(folder / name, Sampling()).clips()
    with pytest.raises(BadImage, match="FileNotFoundError"):
        Video(folder / "gone.mp4", Sampling()).clips()


def test_sound_alone_is_no_video(folder):
    path = folder / "sound.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(BadImage, match="no video stream; it has audio"):
        Video(path, Sampling()).clips()


class Stream:
    """A stream of video, as PyAV describes it."""

    type, codec_context = "video", True

    def __init__(self, cover: bool):
        self.disposition = av.stream.Disposition.attached_pic if cover else 0


def container_of(*streams: Stream):
    """A file with these streams; which comes first depends on the program that wrote it."""

    class Streams(list):
        video = streams

    class Container:
        pass

    container = Container()
    container.streams = Streams(streams)
    return container


def test_a_cover_image_is_no_film(folder):
    cover, film = Stream(cover=True), Stream(cover=False)
    for streams in ((cover, film), (film, cover), (cover, film, Stream(cover=False))):
        assert clips_module._video_stream(container_of(*streams), "a.m4v") is film
    with pytest.raises(BadImage, match=r"no video stream; it has video, of which .* cover image"):
        clips_module._video_stream(container_of(cover), "a.mp3")


def test_a_film_with_a_cover_image_is_seen(folder):
    path = folder / "cover.mp4"
    with av.open(str(path), "w") as container:
        film = container.add_stream("mpeg4", rate=10)
        film.width, film.height, film.pix_fmt, film.bit_rate = 48, 32, "yuv420p", 4_000_000
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 20, 20, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        for i in range(4):
            container.mux(film.encode(av.VideoFrame.from_ndarray(frame_image(i), format="rgb24")))
        container.mux(cover.encode(av.VideoFrame.from_image(Image.new("RGB", (20, 20), "blue"))))
        for stream in (film, cover):
            container.mux(stream.encode())
    assert seen(path, frames=4) == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("aspect", "size"), [("16/11", (70, 32)), ("8/9", (48, 36)), ("1/1", (48, 32)), ("9/1", None)]
)
def test_pixels_become_square(folder, aspect, size, caplog):
    path = folder / f"aspect{aspect[0]}.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        for i in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_image(i), format="rgb24")))
        container.mux(stream.encode())
    (clip,) = Video(path, Sampling(frames=1)).clips()
    assert clip[0].size == (size or (48, 32))
    assert ("9 times as wide as high, which is ignored" in caplog.text) == (size is None)


def test_what_is_not_shown_as_meant_is_told(folder, caplog):
    path = folder / "hdr.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p10le"
        stream.codec_context.color_trc = 16  # PQ
        stream.codec_context.color_primaries = stream.codec_context.colorspace = 9  # BT.2020
        for i in range(2):
            frame = av.VideoFrame.from_ndarray(frame_image(i + 5), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p10le")))
        container.mux(stream.encode())
    (clip,) = Video(path, Sampling(frames=2)).clips()
    assert clip[0].info["notes"] == ["HDR, shown without tone mapping"]
    assert caplog.text.count("hdr.mkv: HDR") == 1
    remark = "all: 1 images are HDR, shown without tone mapping: hdr.mkv."
    assert remark in check(f"video:{path}").remarks


def test_interlaced_frames_are_told(folder):
    path = folder / "interlaced.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg2video", rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.options = {"flags": "+ildct+ilme"}
        container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_image(4), format="rgb24")))
        container.mux(stream.encode())
    assert "all: 1 images are interlaced: interlaced.mkv." in check(f"video:{path}").remarks


def test_transparency_is_white_as_in_images(folder):
    path = folder / "clear.mov"
    values = np.zeros((32, 48, 4), np.uint8)
    values[:, 24:] = (0, 0, 255, 255)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "rgba"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(values, format="rgba")))
        container.mux(stream.encode())
    (clip,) = Video(path, Sampling(frames=1)).clips()
    assert [clip[0].getpixel((x, 9)) for x in (3, 40)] == [(255, 255, 255), (0, 0, 255)]


def test_an_old_decoder_is_refused_with_the_command_for_a_new_one(monkeypatch):
    monkeypatch.setattr(av, "__version__", "16.1.0")
    with pytest.raises(
        ImportError, match=r"av 16\.1\.0 .* colours .*pip install 'vim-ssl\[video\]'"
    ):
        clips_module.import_av()
    monkeypatch.setattr(av, "__version__", "17.0.0")
    assert clips_module.import_av() is av


@pytest.mark.parametrize("name", ["a.MTS", "a.3gp", "a.m2ts", "a.TS", "a.MOV", "a.3G2", "a.Mp4"])
def test_files_of_cameras_and_phones_are_videos(tmp_path, name):
    ending = name.lower()[1:]
    kind = ".ts" if ending in (".mts", ".m2ts", ".ts") else ".mp4"
    write(tmp_path / f"b{kind}", count=4, codec="mpeg2video" if kind == ".ts" else "mpeg4")
    (tmp_path / f"b{kind}").rename(tmp_path / name)
    data = open_data(f"video:{tmp_path}?frames=2")
    assert data.ids == [name]
    assert [numbers(clip) for clip in data[0]["image"].clips()] == [[1, 3]]


# ---------------------------------------------------------------- animations


def animate(path: Path, count: int = 8, duration=100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = [Image.fromarray(frame_image(i)) for i in range(count)]
    more = {"lossless": True} if path.suffix == ".webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=duration, **more)
    return path


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "apng"])
def test_an_animation_is_a_video_of_its_frames(tmp_path, ending):
    path = animate(tmp_path / f"a.{ending}")
    assert seen(path, frames=4) == [[1, 3, 5, 7]]
    assert seen(path, frames=2, clips=2) == [[1, 5], [3, 7]]
    assert open_data(f"video:{path}").ids == [path.name]
    slow = animate(tmp_path / f"slow.{ending}", duration=[100] * 4 + [1000] + [100] * 3)
    assert seen(slow, frames=4) == [[2, 4, 4, 5]]
    assert seen(animate(tmp_path / f"one.{ending}", count=1), frames=2) == [[0, 0]]


def test_of_a_cut_animation_the_whole_frames_are_used(tmp_path):
    path = animate(tmp_path / "a.gif")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    (clip,) = seen(path, frames=8)
    assert clip == sorted(clip)
    assert 2 <= clip[-1] <= 6
    for name, content in (("b.gif", b"GIF89a"), ("c.gif", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadImage, match=name):
            Video(tmp_path / name, Sampling()).clips()


def test_class_folders_hold_animations_and_what_is_beside_them_is_counted(tmp_path):
    for name in ("a/0.gif", "a/1.gif", "b/0.GIF", "b/1.webp", "c/0.gif"):
        animate(tmp_path / name, count=1 if name == "a/1.gif" else 8)
    for name in ("a/poster.png", "b/0.jpg", "top.png"):
        Image.new("RGB", (48, 32)).save(tmp_path / name)
    for i in range(3):  # frames that are GIFs
        (tmp_path / "c/frames").mkdir(exist_ok=True)
        Image.fromarray(frame_image(i)).save(tmp_path / f"c/frames/{i}.gif")
    data = open_data(f"video:{tmp_path}?frames=2")
    assert data.ids == ["a/0.gif", "a/1.gif", "b/0.GIF", "b/1.webp", "c/0.gif", "c/frames"]
    assert (data.classes, data.labels) == (["a", "b", "c"], [0, 0, 1, 1, 2, 2])
    assert data.passed_over == {"images that are not in a folder of frames": 3}
    assert [len(item["image"].clips()[0]) for item in data] == [2] * 6


# ---------------------------------------------------------------- folders and tables


@pytest.fixture(scope="module")
def classes(tmp_path_factory) -> Path:
    """Two classes: files, and folders of frames."""
    root = tmp_path_factory.mktemp("classes")
    for kind in ("jump", "run"):
        for i in range(2):
            write(root / kind / f"{i}.mp4", count=4)
        frames = root / kind / "frames"
        frames.mkdir()
        for i in range(6):
            Image.fromarray(frame_image(i)).save(frames / f"{i:03}.png")
    return root


def test_class_folders_hold_files_and_folders_of_frames(classes):
    data = open_data(f"video:{classes}?frames=3")
    assert data.ids == ["jump/0.mp4", "jump/1.mp4", "jump/frames",
                        "run/0.mp4", "run/1.mp4", "run/frames"]  # fmt: skip
    assert (data.classes, data.labels) == (["jump", "run"], [0, 0, 0, 1, 1, 1])
    again = pickle.loads(pickle.dumps(data)).subset([2, 0])
    assert [numbers(item["image"].clips()[0]) for item in again] == [[1, 3, 5], [0, 2, 3]]
    before = data.fingerprint
    (classes / "run" / "frames" / "006.png").write_bytes(b"broken")
    assert open_data(f"video:{classes}?frames=3").fingerprint != before
    assert seen(classes / "run" / "frames", frames=7) == [[0, 1, 2, 3, 4, 5, 5]]
    (classes / "run" / "frames" / "006.png").unlink()
    assert str(check(f"video:{classes}")).count("48×32") == 1


def test_frames_without_leading_zeros_follow_one_another(tmp_path):
    for i in range(12):
        Image.fromarray(frame_image(i)).save(tmp_path / f"frame{i}.png")
    assert seen(tmp_path, frames=12) == [list(range(12))]


def test_a_frame_that_is_overwritten_changes_what_caches_go_by(tmp_path):
    """Frames of equal size, as BMPs are: their folder stays as it was."""
    for i in range(3):
        (tmp_path / "clips/a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(frame_image(i)).save(tmp_path / f"clips/a/{i}.bmp")
    data = open_data(f"video:{tmp_path / 'clips'}")
    before = _times(data)
    assert len(before) == 3
    Image.fromarray(frame_image(9)).save(tmp_path / "clips/a/1.bmp")
    os.utime(tmp_path / "clips/a/1.bmp", ns=(0, 10**18))
    assert _times(data) != before


def test_frames_that_are_missing_or_of_another_size_are_told(tmp_path):
    for name, kept in (("whole", range(1, 9)), ("every fifth", range(0, 50, 5)),
                       ("gap", (1, 2, 3, 4, 7, 8))):  # fmt: skip
        (tmp_path / name).mkdir()
        for i in kept:
            Image.fromarray(frame_image(1)).save(tmp_path / name / f"img_{i}.png")
    data = open_data(f"video:{tmp_path}?frames=8")
    (fault,) = data.faults
    assert "1 folders of frames skip numbers, such as gap/" in fault
    Image.new("RGB", (20, 20), "red").save(tmp_path / "whole" / "img_9.png")
    with pytest.raises(BadImage, match=r"whole: its frames have several sizes, 48×32 and 20×20"):
        Video(tmp_path / "whole", Sampling(frames=9)).clips()


def test_a_video_that_a_table_names_and_is_not_there_is_named(classes, tmp_path):
    (tmp_path / "t.csv").write_text(f"path,label\n{classes}/jump/0.mp4,a\ngone.mp4,b\nno/dir,a\n")
    report = check(f"video:{tmp_path / 't.csv'}?frames=2")
    (problem,) = [line for line in report.problems if "cannot be decoded" in line]
    assert "2 images" in problem
    assert "gone.mp4 (FileNotFoundError" in problem


def test_a_table_and_a_single_file(classes, tmp_path):
    table = tmp_path / "videos.csv"
    lines = [f"{classes}/jump/0.mp4,a,train", f"{classes}/run/frames,b,test"]
    table.write_text("\n".join(["path,label,split", *lines]))
    data = open_data(f"video:{table}?split=all&frames=2")
    assert (data.labels, data.classes, data.splits) == ([0, 1], ["a", "b"], ["train", "test"])
    assert [len(item["image"].clips()[0]) for item in data] == [2, 2]
    assert open_data(f"video:{classes}/jump/0.mp4").ids == ["0.mp4"]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("video:{0}?frames=0", "not a whole number above 0"),
        ("video:{0}?fps=fast", "not a number above 0"),
        ("video:{0}?tile=4", "takes no option 'tile'"),
        ("video:{0}?label=name", "use label=folder"),
        ("video:{0}/jump/frames", "contains 6 images but no video"),
        ("{0}/jump?frames=3", "takes no option 'frames'"),
        ("video:{0} + video:{0}", "only images can be joined"),
    ],
)
def test_what_does_not_fit_is_told(classes, spec, says):
    with pytest.raises(ValueError, match=says):
        open_data(spec.format(classes))


# ---------------------------------------------------------------- tensors

SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_classes": 0}


def test_an_encoder_of_clips_gets_clips(classes):
    encoder = inflate(VimEncoder(**SMALL), frames=4, tubelet=2)
    item = open_data(f"video:{classes}?frames=4&clips=2")[0]
    many = create_transform(encoder)(item["image"])
    assert many.shape == (2, 3, 4, 16, 16)
    images = create_transform(VimEncoder(**SMALL))
    clip = item["image"].clips()[1]
    assert torch.equal(many[1], torch.stack([images(frame) for frame in clip], 1))


def test_one_augmentation_holds_for_a_whole_clip(folder):
    path = write(folder / "still.mp4", count=6, gop=6)
    still = Video(path, Sampling(frames=4))
    frame = still.clips()[0][0]
    still.clips = lambda training, prepare: [[prepare(frame) for _ in range(4)]]
    augment = {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 1.0, "re_mode": "pixel"}
    transform = create_transform(inflate(VimEncoder(**SMALL)), is_training=True, **augment)
    first, second = transform(still), transform(still)
    assert all(torch.equal(first[:, 0], first[:, t]) for t in range(4))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("kind", ["file", "frames"])
@pytest.mark.parametrize(("clips", "training"), [(1, False), (2, False), (1, True)])
def test_few_frames_are_held_in_full_size(folder, monkeypatch, kind, clips, training):
    path = folder / "long.mp4"
    if kind == "file":
        write(path)
    else:
        path = folder / "long"
        path.mkdir(exist_ok=True)
        for i in range(16):
            Image.fromarray(frame_image(i)).save(path / f"{i}.png")
    frames, most = [], 0
    reader = {"file": "_image", "frames": "decode_image"}[kind]
    decode = getattr(clips_module, reader)

    def watched(*args, **more):
        nonlocal most
        image = decode(*args, **more)
        frames.append(weakref.ref(image))
        most = max(most, sum(frame() is not None for frame in frames))
        return image

    monkeypatch.setattr(clips_module, reader, watched)
    transform = create_transform(inflate(VimEncoder(**SMALL), tubelet=1), is_training=training)
    assert transform(Video(path, Sampling(12, clips=clips))).shape[-3:] == (12, 16, 16)
    assert 1 <= most <= 3


def test_the_wrong_kind_of_data_is_told(classes):
    with pytest.raises(TypeError, match=r"video:ROOT"):
        create_transform(inflate(VimEncoder(**SMALL)))(Image.new("RGB", (8, 8)))
