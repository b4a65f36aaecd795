"""A module is imported once another package is, in either order; timm's case is in test_imports."""

import importlib
import importlib.util
import sys

import pytest

from vim_ssl.utils.registration import import_after


@pytest.fixture(autouse=True)
def toys(tmp_path, monkeypatch):
    """A package `toy`, and a module `toy_plugin` that registers itself there."""
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "__init__.py").write_text("plugins = []\n")
    (tmp_path / "toy" / "part.py").write_text("import toy\nseen = list(toy.plugins)\n")
    (tmp_path / "toy_plugin.py").write_text("import toy\ntoy.plugins.append('plugin')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield
    for name in ("toy", "toy.part", "toy_plugin", "toy_other"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("first", ["toy", "hook"])
def test_either_order_registers_once(first):
    if first == "hook":
        import_after("toy", "toy_plugin")
        assert "toy" not in sys.modules
    toy = importlib.import_module("toy")
    import_after("toy", "toy_plugin")
    assert toy.plugins == ["plugin"]


def test_a_submodule_finds_the_registration_done():
    import_after("toy", "toy_plugin")
    assert importlib.import_module("toy.part").seen == ["plugin"]


def test_importing_the_plugin_first_registers_once():
    import_after("toy", "toy_plugin")
    importlib.import_module("toy_plugin")
    assert sys.modules["toy"].plugins == ["plugin"]


def test_a_spec_alone_imports_nothing_and_a_loader_ends_as_it_was():
    import_after("toy", "toy_plugin")
    spec = importlib.util.find_spec("toy")
    assert spec is not None
    assert "toy" not in sys.modules
    toy = importlib.import_module("toy")
    assert type(toy.__loader__) is type(spec.loader)
    assert "exec_module" not in vars(toy.__loader__)
    assert importlib.reload(toy).plugins == []  # a module runs once; a reload resets the toy
    assert "exec_module" not in vars(toy.__loader__)


def test_two_hooks_and_a_missing_package_do_no_harm():
    for _ in range(2):
        import_after("toy", "toy_plugin")
        import_after("toy_that_is_missing", "toy_plugin")
    assert importlib.import_module("toy").plugins == ["plugin"]
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("toy_that_is_missing")


def test_two_modules_register_at_one_package(tmp_path):
    (tmp_path / "toy_other.py").write_text("import toy\ntoy.plugins.append('other')\n")
    import_after("toy", "toy_plugin")
    import_after("toy", "toy_other")
    assert sorted(importlib.import_module("toy").plugins) == ["other", "plugin"]
    assert "exec_module" not in vars(sys.modules["toy"].__loader__)


def test_a_package_that_fails_to_import_registers_nothing(tmp_path):
    (tmp_path / "toy" / "__init__.py").write_text("1 / 0\n")
    import_after("toy", "toy_plugin")
    with pytest.raises(ZeroDivisionError):
        importlib.import_module("toy")
    assert "toy_plugin" not in sys.modules
