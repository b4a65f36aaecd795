"""Importing stays light, and each folder imports only what stands below it."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import vim_ssl

ROOT = Path(__file__).parents[1]
# From the ground up: a folder imports those of the floors below it, never beside or above.
FLOORS = (
    ("utils",),
    ("kernels", "data"),
    ("models", "metrics"),
    ("checkpoints",),
    ("objectives",),
    ("training",),
    ("evaluation", "report"),
    ("tasks",),
    ("recipes", "downstream"),
)
FLOOR_OF = {folder: floor for floor, folders in enumerate(FLOORS) for folder in folders}
SCRIPTS = ("recipes", "downstream")
SIBLINGS = ("kernels", *SCRIPTS)  # beside vim_ssl/ in a checkout, imported as vim_ssl.<name>
USED_LATE = {"accelerate", "datasets", "sklearn", "numba", "tokenizers", "transformers"}
# Kernels import torch; the compilers of two backends are known to the files named after them.
COMPILERS = {"numba": {"numba", "numpy", "llvmlite"}, "triton": {"triton"}}


# ------------------------------------------------------------------------- light imports


def run_fresh(code: str) -> tuple[float, set[str], list[str]]:
    """Run code in its own process: (processor seconds, modules loaded, lines printed)."""
    code += "\nimport sys, time; print(time.process_time(), *sys.modules)"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True
    )
    *lines, last = done.stdout.splitlines()
    seconds, *modules = last.split()
    return float(seconds), set(modules), lines


def third_party(modules: set[str]) -> set[str]:
    names = {name.partition(".")[0] for name in modules} - set(sys.stdlib_module_names)
    return {name for name in names if name[0] != "_" and name != "vim_ssl"}


@pytest.fixture(scope="module")
def nothing() -> set[str]:
    """Third-party modules that the interpreter loads by itself, such as those of .pth files."""
    return third_party(run_fresh("")[1])


@pytest.mark.parametrize(
    "code",
    ["import vim_ssl", "import vim_ssl; dir(vim_ssl)", "import vim_ssl.cli"]
    + [f"from vim_ssl import cli; assert cli.main(['{flag}']) == 0" for flag in ("-h", "-V")],
)
def test_the_package_and_the_commands_help_need_the_standard_library_alone(nothing, code):
    seconds, modules, _ = run_fresh(code)
    assert third_party(modules) <= nothing
    assert seconds < 3, "a quarter of a second is usual; with torch it takes six"


IMPORTED = """
import sys, time
for code in ("import timm", "from vim_ssl import *"):
    began = time.process_time()
    exec(code)
    print(time.process_time() - began, *sys.modules)
"""


@pytest.mark.slow
def test_the_public_names_are_light():
    """After timm, no heavy modules, and under half its time (processor time)."""
    (timm_s, *timm), (ours_s, *ours) = (line.split() for line in run_fresh(IMPORTED)[2])
    assert float(ours_s) < 0.5 * float(timm_s)

    loaded, before = ({name.partition(".")[0] for name in names} for names in (ours, timm))
    assert not loaded & {*USED_LATE, "numba"}  # numba only when it computes
    small = {"PIL", "yaml", "safetensors", "torch", "torchvision"}
    assert third_party(loaded - before) <= small, (
        "each slows every import down; import it where it is used"
    )


def test_the_public_names_are_listed_and_found():
    assert dir(vim_ssl) == sorted(vim_ssl.__all__)
    for name in vim_ssl.__all__:
        assert getattr(vim_ssl, name) is not None
    assert vim_ssl.load_encoder is vim_ssl.checkpoints.loading.load_encoder
    for name in ("nothing_of_this_name", "tests", "vim_ssl", "_private", "Path", "sys"):
        assert not hasattr(vim_ssl, name)


# ------------------------------------------------------------------------- registration


ORDERS = [
    "import vim_ssl, timm",
    "import timm, vim_ssl",
    "import vim_ssl, timm.layers",
    "import timm, vim_ssl.models.encoder",
    "import vim_ssl.models.encoder, timm",
    "import vim_ssl, importlib; importlib.reload(vim_ssl); import timm; importlib.reload(timm)",
]
# A spec without an import loads nothing; a module keeps a loader like any other's.
LOADER = """
import importlib.util, pickle, vim_ssl
spec = importlib.util.find_spec('timm')
assert 'timm' not in sys.modules and spec.loader.get_source('timm') != ''
import timm
loader = timm.__loader__
assert 'exec_module' not in vars(loader) and type(loader) is type(spec.loader)
assert pickle.loads(pickle.dumps(vim_ssl.VimEncoder)) is vim_ssl.VimEncoder
assert timm.create_model('vim_nano_patch4_28', depth=1).in_chans == 1
"""
IN_CHILDREN = """
import os, sys, torch, torchvision
for code in {codes}:
    assert not {{"timm", "vim_ssl"}} & set(sys.modules)
    if (child := os.fork()) == 0:
        exec(code)
        os._exit(0 if timm.is_model("vim_tiny_patch16_224") else 7)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_the_presets_are_registered_at_timm_in_any_order_of_imports():
    """Every order in a process of its own, which has torch from the one that all come from."""
    codes = [*ORDERS, LOADER]
    results = run_fresh(IN_CHILDREN.format(codes=codes))[2]
    assert dict(zip(codes, results, strict=True)) == dict.fromkeys(codes, "0")


# ------------------------------------------------------------------------- floors


def modules(root: Path) -> dict[str, Path]:
    """Import name -> file of everything below vim_ssl, as it is installed."""
    result = {}
    for top in ("vim_ssl", *SIBLINGS):
        for path in sorted((root / top).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            parts = parts if top == "vim_ssl" else ("vim_ssl", *parts)
            result[".".join(parts).removesuffix(".__init__")] = path
    return result


def imported(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """The absolute names that import statements name: modules, and what is taken from them."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: import absolutely"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def walk_module_level(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when a module is imported: no bodies of functions, nothing for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from walk_module_level(child)


def folder_of(name: str) -> str | None:
    """vim_ssl.data.open -> data; vim_ssl.cli and vim_ssl.load_encoder -> ""; torch -> None."""
    top, *below = name.split(".")
    if top != "vim_ssl":
        return None
    return below[0] if below and below[0] in FLOOR_OF else ""


def may_import(folder: str, other: str, name: str) -> bool:
    """Whether a module of ``folder`` may import ``name``, which stands in ``other``."""
    if folder in ("", other):  # cli.py, __init__.py and api.py stand above all floors
        return True
    if other == "":  # scripts use the public names as a user does, and hand errors to the command
        return folder in SCRIPTS and (name == "vim_ssl.cli.guarded" or name.count(".") == 1)
    return folder != "kernels" and FLOOR_OF[other] < FLOOR_OF[folder]


def wrong_imports(root: Path) -> list[str]:
    """Every import that does not look downwards, and every folder without a floor."""
    wrong = []
    for name, path in modules(root).items():
        folder = folder_of(name) or ""
        if not folder and path.parent != root / "vim_ssl":
            wrong.append(f"{name}: its folder has no floor")
        for other in imported(ast.walk(parse(path))):
            below = folder_of(other)
            if below is not None and not may_import(folder, below, other):
                wrong.append(f"{name} imports {other}")
    return wrong


def circle(root: Path) -> list[str]:
    """Modules of which each imports the next at module level, the last the first; or nothing."""
    files = modules(root)
    edges: dict[str, set[str]] = {}
    for name, path in files.items():
        edges[name] = set()
        for other in imported(walk_module_level(parse(path))):
            # `from vim_ssl.data import open` names a module, `from vim_ssl.data.open import x` too.
            target = next((m for m in (other, other.rpartition(".")[0]) if m in files), name)
            edges[name] |= {target} - {name, "vim_ssl"}
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_every_folder_imports_only_what_stands_below_it():
    assert wrong_imports(ROOT) == []


def test_no_modules_import_each_other_in_a_circle():
    assert circle(ROOT) == []


SOUND = {
    "vim_ssl/__init__.py": "from vim_ssl.data.open import open_data",
    "vim_ssl/cli.py": "import vim_ssl.tasks.train",
    "vim_ssl/utils/files.py": "",
    "vim_ssl/data/open.py": "from vim_ssl.utils import files\nfrom vim_ssl.data import late",
    "vim_ssl/data/late.py": "def f():\n    from vim_ssl.data.open import open_data",
    "vim_ssl/models/encoder.py": "import vim_ssl.kernels.scan",
    "vim_ssl/tasks/train.py": "from vim_ssl.models.encoder import Encoder",
    "kernels/scan.py": "import torch\nfrom vim_ssl.kernels.other import f",
    "kernels/other.py": "",
    "recipes/train.py": "from vim_ssl import open_data\nfrom vim_ssl.cli import guarded",
}


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("file", "text", "reported"),
    [
        ("vim_ssl/data/open.py", "import vim_ssl.models.encoder", "imports vim_ssl.models.encoder"),
        ("vim_ssl/data/late.py", "def f():\n    from vim_ssl.tasks import train", "tasks.train"),
        ("vim_ssl/data/open.py", "from vim_ssl.kernels.scan import f", "vim_ssl.kernels.scan.f"),
        ("kernels/scan.py", "from vim_ssl.utils import files", "imports vim_ssl.utils.files"),
        ("recipes/train.py", "import vim_ssl.downstream.probe", "vim_ssl.downstream.probe"),
        ("vim_ssl/models/encoder.py", "from vim_ssl import open_data", "vim_ssl.open_data"),
        ("vim_ssl/tasks/train.py", "from vim_ssl.cli import guarded", "vim_ssl.cli.guarded"),
        ("recipes/train.py", "from vim_ssl.cli import all_commands", "vim_ssl.cli.all_commands"),
        ("vim_ssl/news/page.py", "", "vim_ssl.news.page: its folder has no floor"),
    ],
)
def test_an_import_that_does_not_look_downwards_is_reported(tmp_path, file, text, reported):
    assert wrong_imports(write_tree(tmp_path, SOUND)) == []
    (found,) = wrong_imports(write_tree(tmp_path, {file: text}))
    assert reported in found


@pytest.mark.parametrize(
    ("text", "is_circle"),
    [
        ("from vim_ssl.data.open import open_data", True),
        ("try:\n    from vim_ssl.data import open\nexcept ImportError:\n    pass", True),
        ("class A:\n    import vim_ssl.data.open", True),
        (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import vim_ssl.data.open",
            False,
        ),
    ],
)
def test_a_circle_is_reported(tmp_path, text, is_circle):
    assert circle(write_tree(tmp_path, SOUND)) == []
    found = circle(write_tree(tmp_path, {"vim_ssl/data/late.py": text}))
    assert set(found) == ({"vim_ssl.data.open", "vim_ssl.data.late"} if is_circle else set())


@pytest.mark.parametrize(
    "path", modules(ROOT).values(), ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_folders_are_imported_by_their_name_in_the_package(path):
    top = {name.partition(".")[0] for name in imported(ast.walk(parse(path)))}
    assert not top & {*SIBLINGS, "tests"}, "use the vim_ssl.… name"
    if path.is_relative_to(ROOT / "kernels"):
        known = {"torch", "vim_ssl"}.union(*(COMPILERS[w] for w in COMPILERS if w in path.stem))
        assert top - set(sys.stdlib_module_names) <= known


# ------------------------------------------------------------------------- names


@pytest.mark.parametrize("folder", SIBLINGS)
def test_the_three_folders_are_no_packages(folder):
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("folder", SCRIPTS)
def test_no_script_hides_a_library(folder):
    """A script's own folder is first on sys.path, before every installed package."""
    taken = {path.stem for path in (ROOT / folder).glob("*.py")} & (
        {"torch", "timm", "vim_ssl", "torchvision"} | USED_LATE | set(sys.stdlib_module_names)
    )
    assert not taken


LONG_FILES = {  # kernels in one piece, the encoder, and a table of data
    "kernels/numba_kernels.py", "vim_ssl/models/encoder.py", "vim_ssl/data/samples/sets.py",
}  # fmt: skip


def test_no_file_is_longer_than_one_reading_holds():
    folders = ("vim_ssl", "kernels", "recipes", "downstream")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    long = {path.relative_to(ROOT).as_posix() for path in paths
            if len(path.read_text(encoding="utf-8").splitlines()) > 500}  # fmt: skip
    assert long <= LONG_FILES, "split the file, or shorten it to 500 lines"
