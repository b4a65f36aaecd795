"""The pages: short enough, complete in the navigation, and with links that lead somewhere."""

import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from docs_pages import PAGES, ROOT, text_of

import vim_ssl
from vim_ssl.data.registry import SOURCES

FOLDERS = ("benchmarks", "kernels", "recipes", "tests")
OTHERS = [path.relative_to(ROOT).as_posix() for folder in FOLDERS
          for path in sorted((ROOT / folder).rglob("README.md"))]  # fmt: skip
CHECKED = sorted({*PAGES, "CONTRIBUTING.md", *OTHERS})
LINK = re.compile(r"\]\(([^)\s]+)\)")


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of the headings, as both GitHub and the site make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    plain = [re.sub(r"[`*]|\]\([^)]*\)|\[", "", line)
             for line in re.findall(r"^#+ (.*)$", text, re.M)]  # fmt: skip
    return {re.sub(r"[^\w\- ]", "", line.lower()).strip().replace(" ", "-") for line in plain}


def dead_links(page: str) -> list[str]:
    """The links of a page to a file or an anchor that is not there."""
    dead = []
    for link in LINK.findall(without_code(text_of(page))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", CHECKED)
def test_links_lead_to_files_and_headings(page):
    assert dead_links(page) == []


def test_a_dead_link_would_be_found(tmp_path, monkeypatch):
    import docs_pages

    (tmp_path / "a.md").write_text("# One `x`: two\n[a](a.md#one-x-two) [b](a.md#three) [c](c.md)")
    monkeypatch.setattr("test_pages.ROOT", tmp_path)
    monkeypatch.setattr(docs_pages, "ROOT", tmp_path)
    assert dead_links("a.md") == ["a.md#three", "c.md"]


def test_the_readme_is_short():
    assert len(text_of("README.md").splitlines()) <= 200


def test_the_navigation_has_every_page():
    """Each page once; a page that is not in the navigation is not found by anyone."""

    def names(entry) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        values = entry.values() if isinstance(entry, dict) else entry
        return [name for value in values for name in names(value)]

    config = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader=yaml.BaseLoader)
    listed = names(config["nav"])
    pages = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    assert sorted(name for name in listed if not name.startswith("files/")) == sorted(pages)
    for name in listed:
        assert (ROOT / name.removeprefix("files/")).exists() or (ROOT / "docs" / name).exists()


def test_every_source_is_documented():
    page, table = text_of("docs/api/sources.md"), text_of("docs/data.md")
    modules = {SOURCES[scheme].rpartition(".")[2]: scheme for scheme in SOURCES}
    for module, scheme in modules.items():
        assert f"::: vim_ssl.data.sources.{module}." in page or scheme == "sample", scheme
    for scheme in SOURCES.keys() - {"folder", "memory"}:  # the two that are not written as a spec
        assert f"`{scheme}:" in table, scheme


def test_every_public_name_is_documented():
    pages = "".join(text_of(page) for page in PAGES if page.startswith("docs/api/"))
    for name in set(vim_ssl.__all__) - {"__version__"}:
        assert re.search(rf"^::: vim_ssl\.\S*\.{name}$", pages, re.M), name


def test_figures_of_pages_have_their_rows():
    """Each section of the results names its file of rows, except the one that has none."""
    sections = re.split(r"^## ", text_of("docs/results.md"), flags=re.M)[1:]
    assert len(sections) >= 7
    for section in sections:
        title = section.partition("\n")[0]
        assert ".csv" in section or title in ("Objectives", "Released weights"), title


@pytest.fixture
def hooks():
    """docs/hooks.py, which `make docs` uses."""
    pytest.importorskip("mkdocs", reason="needs pip install 'vim-ssl[docs]'")
    spec = spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_site_copies_files_that_pages_link(hooks):
    from mkdocs.config import load_config
    from mkdocs.structure.files import get_files

    config = load_config(str(ROOT / "mkdocs.yml"), hooks=[], plugins=[])
    config.plugins._current_plugin = "docs/hooks.py"
    files = hooks.on_files(get_files(config), config)
    for name in ("LICENSE", "benchmarks/results/transfer.csv", "kernels/selective_scan/README.md"):
        assert (f"files/{name}" in files.src_uris) == (name != "LICENSE"), name
    assert (
        "files/benchmarks/learning/README.md" in files.src_uris
    )  # linked by a page that is copied
    page = SimpleNamespace(file=SimpleNamespace(src_uri="api/x.md"))
    text = "[a](../results.md#digits) ![b](../../benchmarks/results/cpu.csv) [c](https://a.b/c)"
    assert hooks.on_page_markdown(text, page, config, files) == text.replace("../../", "../files/")


@pytest.mark.parametrize(
    "html", ['<script async src="https://a.b/c.js">', '<link rel="x" href=//fonts.x/y>']
)
def test_a_page_that_loads_something_from_elsewhere_is_refused(hooks, html):
    page = SimpleNamespace(file=SimpleNamespace(src_uri="a.md"))
    fine = '<a href="https://a.b">x</a> <script src="../a.js"></script> <link href="a.css">'
    assert hooks.on_post_page(fine, page, None) == fine
    with pytest.raises(hooks.PluginError, match=r"a\.md loads"):
        hooks.on_post_page(fine + html, page, None)
