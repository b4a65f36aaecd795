"""The two copies of the plugins' loader, for the library and for kernels, behave alike."""

import sys
from importlib.metadata import EntryPoint

import pytest

from vim_ssl.kernels import plugins as of_kernels
from vim_ssl.utils import plugins as of_library

COPIES = (of_library, of_kernels)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """``install(code)``: put a package `toy_plugin` with this code and its entry point in place."""
    entry = EntryPoint("toy", "toy_plugin:done", of_library.GROUP)
    for module in COPIES:
        monkeypatch.setattr(module, "_loaded", set())
        monkeypatch.setattr(module, "entry_points", lambda group: [entry])
    monkeypatch.syspath_prepend(tmp_path)
    yield (tmp_path / "toy_plugin.py").write_text
    sys.modules.pop("toy_plugin", None)


def test_both_look_in_the_same_group():
    assert of_kernels.GROUP == of_library.GROUP == "vim_ssl.plugins"


@pytest.mark.parametrize("order", [COPIES, COPIES[::-1]], ids=["library", "kernels"])
def test_a_plugin_that_both_load_runs_once(install, order, capsys):
    install("print('runs')\ndone = True")
    for module in (*order, *order):
        module.load_plugins()
    assert capsys.readouterr().out == "runs\n"


@pytest.mark.parametrize("module", COPIES, ids=["library", "kernels"])
def test_a_plugin_may_come_back_while_it_is_imported(install, module):
    install(f"import {module.__name__} as m\nm.load_plugins()\ndone = True")
    module.load_plugins()
    assert sys.modules["toy_plugin"].done


@pytest.mark.parametrize("module", COPIES, ids=["library", "kernels"])
def test_a_plugin_that_fails_is_named_each_time(install, module):
    install("raise OSError('no such driver')")
    message = r"^The plugin 'toy' \(toy_plugin:done\) failed to load: OSError: no such driver\."
    for _ in range(2):
        with pytest.raises(ImportError, match=message):
            module.load_plugins()
