"""Formats of images, videos, volumes and archives that a source may find but not read."""

import os
from collections.abc import Mapping, Sequence

from vim_ssl.data.images import EXTENSIONS
from vim_ssl.data.passed_over import PassedOver, pass_over
from vim_ssl.utils.names import printable

NO_EXTENSION = "without extension"
# Raw files of cameras, other images, videos, volumes and slides, tables, archives.
_FORMATS = """
image 3fr arw cr2 cr3 crw dcr dng erf iiq kdc mef mos mrw nef nrw orf pef raf raw rw2 rwl sr2 srf
image srw x3f
image ai apng avifs dds djvu emf eps exr fit fits fts hdr heic heics heif heifs hif icns ico j2c j2k
image jng jpc jpf jpm jpx jxl jxr mng mpo pam pcx pdf pfm psb psd qoi sgi svg svgz tga wdp wmf xbm
image xcf xpm
video 3g2 3gp asf avi divx f4v flv m2t m2ts m2v m4v mjpeg mkv mod mov mp4 mpe mpeg mpg mpv mts mxf
video ogm ogv qt rm rmvb ts vob webm wmv
volume bif czi dcm img lif lsm mgh mgz mha mhd mrxs nd2 ndpi nhdr nii nii.gz nrrd oir scn svs
volume svslide vms vmu vrt vsi
table h5 hdf hdf5 lmdb mat nc npy npz parquet tfrecord zarr
archive 7z bz2 gz rar tar tar.gz tbz2 tgz txz xz zip zst
"""
MEDIA = dict.fromkeys(EXTENSIONS, "plain") | {
    f".{ending}": kind
    for kind, *endings in map(str.split, _FORMATS.strip().splitlines())
    for ending in endings
}
_REMEDIES = {
    "plain": "give their folder without a scheme",
    "image": "convert them to PNG or JPEG",
    "video": "read them as video:FOLDER, or convert them to MP4",
    "volume": "read them as slide:, nifti:, dicom: or geotiff:FOLDER, or convert them",
    "table": "read tables as parquet: or hf:, or convert them",
    "archive": "unpack them",
    "": "give them an ending such as .png or .jpg",
}
# First bytes of images.
_MAGIC = (
    b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*", b"8BPS", b"\xff\x0a",
    b"\0\0\0\x0cJXL ", b"\0\0\0\x0cjP  ",
)  # fmt: skip


def ending_of(name: str) -> str:
    """Return the ending of a file name in lower case, ".nii.gz" as one; `NO_EXTENSION` for none."""
    stem, ending = os.path.splitext(name.lower())
    if ending == ".gz" and (double := os.path.splitext(stem)[1] + ending) in MEDIA:
        return double
    return ending or NO_EXTENSION


def pass_over_others(
    others: Mapping[str, int], examples: Mapping[str, Sequence[str]], root: str | None = None
) -> None:
    """Count as passed over those of the files that are not read which hold images, videos,
    volumes or archives of them, by their ending.

    Args:
        others: ending, as from `ending_of` -> number of files that are not read.
        examples: ending -> names of some of them.
        root: folder of the names. With it, a file with another ending counts if it begins like an
            image: all of an ending, if one of the examples does.
    """
    for ending, count in others.items():
        names = examples.get(ending, ())
        paths = (os.path.join(root, name) for name in names) if root is not None else ()
        if ending in MEDIA or any(map(_is_image, paths)):
            pass_over(ending if ending == NO_EXTENSION else ending[1:].upper(), count, names)


def explain(passed_over: PassedOver, reason: str) -> str:
    """Describe what is passed over for one reason, with examples and what to do about it."""
    line = f"passed over: {passed_over[reason]:,} {reason}"
    if names := list(map(printable, passed_over.examples.get(reason, ()))):
        line += f": {', '.join(names)}{' …' if passed_over[reason] > len(names) else ''}"
    if reason == NO_EXTENSION or reason == reason.upper():  # a format
        line += f"; to use them, {_REMEDIES[MEDIA.get(f'.{reason.lower()}', '')]}"
    return f"{line}."


def _is_image(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError:
        return False
    iso = head[4:8] == b"ftyp" and head[8:10] in (b"he", b"av", b"mi")
    return iso or head[8:12] == b"WEBP" or head.startswith(_MAGIC)
