"""Wheel, sdist, editable install and plain checkout give the same modules under `vim_ssl` alone.

Everything is built from a copy of the checkout, without network and without touching what is
installed. Each form is then tried by a Python that does not run `site` (-S): it sees the form and
the dependencies, but not the installation that runs these tests. One such Python imports torch and
torchvision, and forks those that try the forms.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "recipes", "downstream")
FORMS = ("wheel", "editable", "checkout")
SITE = [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
pytestmark = pytest.mark.slow


def python(*args: str, paths: list[Path], cwd: Path) -> subprocess.CompletedProcess:
    """Run a bare Python whose only modules are those of ``paths`` and the dependencies."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*paths, *SITE]))}
    return subprocess.run(
        [sys.executable, "-S", *args], env=env, cwd=cwd, capture_output=True, text=True
    )


FORKED = """
import json, os, sys, torch, torchvision
assert not {"timm", "vim_ssl"} & set(sys.modules)
for paths, code, argv, cwd, out in json.load(sys.stdin):
    if (child := os.fork()) == 0:
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT), 1)
        os.chdir(cwd)
        sys.path[0:1] = ["", *paths]
        sys.argv[1:] = argv
        exec(code, {"__name__": "__main__"})
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def run_forked(folder: Path, tasks: dict[str, tuple[list[Path], str, list[str]]]) -> dict:
    """Run tasks (name -> paths, code, arguments) as `python` would, one after the other.

    Returns: name -> what the code printed, as JSON."""
    orders = []
    for name, (paths, code, argv) in tasks.items():
        (folder / name).mkdir()
        orders.append((list(map(str, paths)), code, argv, str(folder / name),
                       str(folder / f"{name}.json")))  # fmt: skip
    env = os.environ | {"PYTHONPATH": os.pathsep.join(SITE)}
    done = subprocess.run(
        [sys.executable, "-S", "-c", FORKED], env=env, input=json.dumps(orders),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split() == ["0"] * len(tasks), done.stdout + done.stderr
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in tasks}


def build(source: Path, out: Path, kind: str) -> Path:
    """Call the build backend as pip would: kind is wheel, sdist or editable."""
    out.mkdir(parents=True)
    code = f"import sys, setuptools.build_meta as b; b.build_{kind}(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (made,) = out.iterdir()
    return made


def copy_checkout(target: Path) -> Path:
    """Builds leave files behind, and files left by earlier builds get into wheels."""
    junk = (".*", "__pycache__", "build", "dist", "runs", "*.egg-info", "results", "golden")
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*junk))
    return target


def source_files(root: Path) -> set[str]:
    """Where every file of a checkout's four folders belongs in a wheel, templates included."""
    return {
        (
            path.relative_to(root)
            if folder == "vim_ssl"
            else Path("vim_ssl", path.relative_to(root))
        ).as_posix()
        for folder in ("vim_ssl", *FOLDERS)
        for path in (root / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def contents(wheel: Path) -> set[str]:
    names = zipfile.ZipFile(wheel).namelist()
    return {name for name in names if ".dist-info/" not in name and not name.endswith("/")}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """The wheel, the sdist and the wheel made from the sdist."""
    folder = tmp_path_factory.mktemp("built with spaces")
    source = copy_checkout(folder / "checkout")
    wheel = build(source, folder / "wheel", "wheel")
    shutil.rmtree(source / "build")
    sdist = build(source, folder / "sdist", "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return {
        "source": source,
        "wheel": wheel,
        "sdist": unpacked,
        "wheel from sdist": build(unpacked, folder / "wheel2", "wheel"),
    }


@pytest.fixture(scope="module")
def forms(built, tmp_path_factory) -> dict[str, dict]:
    """Form -> how to reach it: paths, and the code that an installed .pth file would run."""
    folder = tmp_path_factory.mktemp("forms")
    with zipfile.ZipFile(built["wheel"]) as archive:
        archive.extractall(folder / "wheel")
    source = copy_checkout(folder / "source")
    with zipfile.ZipFile(build(source, folder / "built", "editable")) as archive:
        archive.extractall(folder / "editable")
    return {
        "wheel": {"paths": [folder / "wheel"], "start": ""},
        "editable": {
            "paths": [folder / "editable"],
            "start": f"import site; site.addsitedir({str(folder / 'editable')!r});",
        },
        "checkout": {"paths": [copy_checkout(folder / "plain")], "start": ""},
    }


@pytest.mark.parametrize("kind", ["wheel", "wheel from sdist"])
def test_wheel_holds_every_source_file_under_one_name(built, kind):
    assert contents(built[kind]) == source_files(built["source"])


def test_sdist_leaves_the_suite_out(built):
    for name in ("tests", "benchmarks"):
        assert not (built["sdist"] / name).exists()
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        assert (built["sdist"] / name).is_file()


def test_the_text_of_the_package_index_needs_no_other_file(built):
    """The index has README.md alone: a link to docs/ would lead nowhere there."""
    with zipfile.ZipFile(built["wheel"]) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        text = archive.read(name).decode()
    assert "# vim_ssl" in text
    assert "The first hour explains each step." in text
    assert not re.findall(r"\]\((?!https?:|#)[^)]*\)", text)


def test_the_command_starts_from_an_installed_wheel(built, tmp_path):
    """pip writes the script that runs `vim_ssl.cli:main`; outside the checkout it must start."""
    target = tmp_path / "target"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(built["wheel"])], check=True)
    (script,) = [path for path in (target / "bin").iterdir() if path.name.startswith("vim-ssl")]
    done = python(str(script), "--help", paths=[target], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "vim-ssl COMMAND" in done.stdout
    for folder in FOLDERS[1:]:
        for path in (ROOT / folder).glob("[!_]*.py"):
            assert path.stem.replace("_", "-") in done.stdout


PROBE = """
import importlib, importlib.util, json, pathlib, sys
import vim_ssl, vim_ssl.kernels.selective_scan as scan
def refused(name):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        return True
    return False
import kernels
print(json.dumps({
    "foreign": kernels.MINE,
    "refused": [n for n in ("vim_ssl.vim_ssl", "vim_ssl.tests", "vim_ssl.setup",
                            "vim_ssl.benchmarks") if refused(n)],
    "missing": [n for n in sys.argv[1:] if importlib.util.find_spec(n) is None],
    "home": str(pathlib.Path(vim_ssl.__file__).parent),
    "twice": "kernels.selective_scan" in sys.modules,
}))
"""


HELP = """
import contextlib, io, json, os, runpy, sys
texts = {}
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    sys.path.insert(0, os.path.dirname(script))
    run = runpy.run_path if script.endswith(".py") else runpy.run_module
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        run(script, run_name="__main__")
    texts[script] = out.getvalue()
    del sys.path[0]
print(json.dumps(texts))
"""


@pytest.fixture(scope="module")
def tried(forms, tmp_path_factory) -> dict[str, dict]:
    """What each form imports, with a foreign `kernels` package behind it on the path; and the help
    of every script, by path in a checkout that is on PYTHONPATH, by module from the wheel."""
    folder = tmp_path_factory.mktemp("tried")
    (folder / "foreign" / "kernels").mkdir(parents=True)
    (folder / "foreign" / "kernels" / "__init__.py").write_text("MINE = 'foreign'\n")
    checkout = forms["checkout"]["paths"][0]
    files = sorted(source_files(checkout))
    names = [name[:-3].replace("/", ".") for name in files if name[-3:] == ".py"]
    names = [name.removesuffix(".__init__") for name in names]
    tasks = {
        form: ([*how["paths"], folder / "foreign"], how["start"] + PROBE, names)
        for form, how in forms.items()
    }
    scripts = [path for name in FOLDERS[1:] for path in (checkout / name).glob("[!_]*.py")]
    modules = [f"vim_ssl.{path.parent.name}.{path.stem}" for path in scripts]
    for form, targets in (("checkout", list(map(str, scripts))), ("wheel", modules)):
        tasks[f"help of {form}"] = (forms[form]["paths"], HELP, targets)
    return run_forked(folder, tasks)


@pytest.fixture(scope="module")
def seen(forms, tried) -> dict[str, dict]:
    return {form: tried[form] | {"root": str(forms[form]["paths"][0].parent)} for form in FORMS}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_every_module(seen, form):
    assert seen[form]["home"].startswith(seen[form]["root"]), "tried another installation"
    assert seen[form]["missing"] == []


@pytest.mark.parametrize("form", FORMS)
def test_a_foreign_kernels_package_wins(seen, form):
    assert seen[form]["foreign"] == "foreign"
    assert not seen[form]["twice"]


@pytest.mark.parametrize("form", FORMS)
def test_nothing_else_of_the_checkout_is_importable(seen, form):
    assert seen[form]["refused"] == [
        "vim_ssl.vim_ssl",
        "vim_ssl.tests",
        "vim_ssl.setup",
        "vim_ssl.benchmarks",
    ]


@pytest.mark.parametrize("form", ["checkout", "wheel"])
def test_every_script_starts(tried, form):
    texts = tried[f"help of {form}"]
    scripts = [path for name in FOLDERS[1:] for path in (ROOT / name).glob("[!_]*.py")]
    assert len(texts) == len(scripts)
    assert [name for name, text in texts.items() if "--config FILE" not in text] == []


# ------------------------------------------------------------------------------- types

USE = """
import torch, vim_ssl
from vim_ssl.kernels.selective_scan import bi_selective_scan, selective_scan
x = torch.ones(2, 1, 3, 4)
y = bi_selective_scan(x, x, x, x, x, scale=0.5) + vim_ssl.load_encoder("a_run", num_classes=10)(x)
selective_scan(x, x, x, x, x, backend="torch")
bi_selective_scan("not a tensor", x, x, x, x)
selective_scan(x, x, x, x, x, nonsense=4)
vim_ssl.load_encoder("a_run", num_classes="ten")
text: str = vim_ssl.create_transform("a_run")
"""
ERRORS = {(7, "arg-type"), (8, "call-arg"), (9, "arg-type"), (10, "assignment")}


def errors(done: subprocess.CompletedProcess, file: Path) -> set[tuple[int, str]]:
    """(line, mypy's code) of every error; all must be in ``file``."""
    assert done.returncode == 1, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if ": error: " in line]
    matches = [re.search(rf"{file.name}:(\d+): error: .*\[(.+)\]$", line) for line in lines]
    assert None not in matches, done.stdout
    return {(int(match[1]), match[2]) for match in matches if match}


def test_mypy_sees_the_checkout_under_its_import_names(tmp_path):
    """The packages have no error; wrong calls of the encoder and of the scan are reported."""
    pytest.importorskip("mypy", reason="mypy comes with the extra dev")
    file = tmp_path / "beside.py"
    file.write_text(USE)
    command = [sys.executable, str(ROOT / ".ci" / "check_types.py"), str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert errors(done, file) == ERRORS


def test_a_project_that_installs_the_wheel_gets_types(built, tmp_path):
    """mypy reads installed packages only where they hold py.typed."""
    pytest.importorskip("mypy", reason="mypy comes with the extra dev")
    venv.create(tmp_path / "venv")
    (site,) = (tmp_path / "venv" / "lib").glob("*/site-packages")
    with zipfile.ZipFile(built["wheel"]) as archive:
        archive.extractall(site)
    (site / "dependencies.pth").write_text("\n".join(SITE))
    file = tmp_path / "project.py"
    file.write_text(USE)
    known = ROOT / ".mypy_cache"  # to read the dependencies anew takes a minute
    if known.is_dir():
        shutil.copytree(known, tmp_path / "cache", symlinks=True)
    command = [
        *(sys.executable, "-m", "mypy", "--python-executable", tmp_path / "venv/bin/python"),
        *("--config-file", ROOT / "pyproject.toml", "--cache-dir", tmp_path / "cache", file),
    ]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert errors(done, file) == ERRORS
