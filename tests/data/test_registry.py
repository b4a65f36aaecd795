"""The sources: each is one file and one line, and those of other packages register themselves."""

import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from PIL import Image

from vim_ssl.data import ImageData, open_data, parse_spec, registry
from vim_ssl.data.registry import OPTIONS, SOURCES, find_opener, source
from vim_ssl.data.samples.fetch import list_samples
from vim_ssl.utils import plugins

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Forget what a test registers."""
    monkeypatch.setattr(plugins, "_loaded", set())
    registry.stream_schemes()  # a module registers its sources only when it is first imported
    tables = [(table, dict(table)) for table in (SOURCES, OPTIONS, registry._openers)]
    yield
    for table, before in tables:
        for key in set(table) - set(before):
            del table[key]


def test_every_scheme_of_the_table_is_registered_by_its_module():
    for scheme in list(SOURCES):
        assert find_opener(scheme) or find_opener(scheme, stream=True), scheme
    assert registry.stream_schemes() == ["hf", "wds"]


def test_opening_data_imports_no_other_source_and_no_heavy_library(tmp_path):
    """timm and torchvision double the time of a process; they wait for the first transform."""
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    code = (
        "import sys; from vim_ssl.data import create_transform, open_data\n"
        "from vim_ssl.data.check import main\n"
        "for spec in sys.argv[1:]: open_data(spec); print(*sys.modules)\n"
        "main(['check', sys.argv[1]]); print(*sys.modules)"
    )
    specs = [str(tmp_path), *(["sample:mnist5k"] if list_samples()["mnist5k"] else [])]
    done = subprocess.run(
        [sys.executable, "-c", code, *specs], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    opened = done.stdout.splitlines()[: len(specs)]
    loaded = [set(line.split()) for line in (*opened, done.stdout.splitlines()[-1])]
    assert loaded[0] & set(SOURCES.values()) == {"vim_ssl.data.sources.folder"}
    heavy = {"timm", "torchvision", "datasets", "sklearn", "skimage", "mlxtend"}
    assert not loaded[-2] & (heavy | {"scipy"})
    assert not loaded[-1] & heavy  # the check's hashes of images need scipy


def open_squares(spec):
    names = [str(i) for i in range(spec.more.get("count", 3))]
    return ImageData(names, names, name=str(spec))


def test_a_new_scheme_declares_its_options():
    source("squares", options=("label",), declares={"count": int, "side": float})(open_squares)
    spec = parse_spec("squares:x?count=5&side=0.5")
    assert spec.more == {"count": 5, "side": 0.5}
    assert parse_spec(str(spec)) == spec
    assert len(open_data(str(spec))) == 5
    assert len(open_data("squares:x?limit=2")) == 2
    with pytest.raises(ValueError, match=r"takes no option 'tile'; .*limit, label, count, side\."):
        open_data("squares:x?tile=4")
    with pytest.raises(ValueError, match="count=none is not a whole number above 0"):
        parse_spec("squares:x?count=none")
    with pytest.raises(ValueError, match="side=0 is not a number above 0"):
        parse_spec("squares:x?side=0")
    with pytest.raises(ValueError, match="takes no option 'count'"):
        open_data("sample:mnist5k?count=5")


def test_a_scheme_or_an_option_is_of_one_source_only():
    with pytest.raises(ValueError, match=r"registers 'dicom', which .*dicom already opens"):
        source("dicom")(open_squares)
    with pytest.raises(ValueError, match="declares the option 'tile' as str"):
        source("squares", declares={"tile": str})(open_squares)
    with pytest.raises(ValueError, match="unknown options colour; add them to declares="):
        source("other", options=("colour",))(open_squares)


def test_a_missing_library_names_the_extra_to_install():
    def opener(spec):
        import no_such_library  # noqa: F401

    for scheme, function in (
        ("squares", opener),
        ("split-squares", lambda spec: registry.Splits((), opener)),
    ):
        source(scheme, extra="medical")(function)
        says = rf"{scheme}: needs no_such_library: .*vim-ssl\[medical\]"
        with pytest.raises(ImportError, match=says):
            open_data(f"{scheme}:x")


# ------------------------------------------------------------------------ plugins


def plug_in(monkeypatch, tmp_path, code):
    (tmp_path / "a_plugin.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "a_plugin", raising=False)
    entry = EntryPoint("shapes", "a_plugin", plugins.GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [entry])


def test_an_unknown_scheme_loads_plugins(monkeypatch, tmp_path):
    code = """
from vim_ssl.data import ImageData
from vim_ssl.data.registry import source

@source("disks", declares={"radius": int})
def open_disks(spec):
    return ImageData(["a"], [str(spec.more["radius"])], name=str(spec))
"""
    plug_in(monkeypatch, tmp_path, code)
    assert open_data("disks:x?radius=7").ids == ["7"]
    with pytest.raises(ValueError, match=r"unknown scheme 'diks'\. Did you mean 'disks'\?"):
        parse_spec("diks:x")


def test_a_plugin_is_loaded_once_and_one_that_fails_is_named(monkeypatch, tmp_path):
    plug_in(monkeypatch, tmp_path, "import os; os.environ['LOADED'] += 'x'")
    monkeypatch.setenv("LOADED", "")
    for _ in range(2):
        with pytest.raises(ValueError, match="unknown scheme"):
            parse_spec("nothing:x")
    assert os.environ["LOADED"] == "x"
    plug_in(monkeypatch, tmp_path, "raise RuntimeError('no licence')")
    monkeypatch.setattr(plugins, "_loaded", set())
    with pytest.raises(ImportError, match=r"plugin 'shapes' \(a_plugin\) .*: no licence"):
        parse_spec("nothing:x")
