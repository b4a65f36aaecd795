"""The examples of every page run, in the order of the page: commands in this process, Python too.

Trainings are cut short by `docs_world.REDUCED`, which is added to the command of the page. Blocks
that need a GPU, the network or hours are marked (`docs_pages`) and only parsed (test_commands.py).
"""

import importlib
import shutil

import docs_world
import pytest
from docs_pages import PAGES, ROOT, RUN_ELSEWHERE, blocks, commands, script

import vim_ssl
from vim_ssl import cli
from vim_ssl.utils.config import parse

pytestmark = pytest.mark.slow
# Pages of which a test runs at least one block.
RUN = [
    page for page in PAGES
    if page not in RUN_ELSEWHERE
    and any(block.language in ("sh", "python") and not block.needs for block in blocks(page))
]  # fmt: skip
# Page -> what it needs in addition: (package, the function that writes the data).
EXTRA = {
    "docs/medical.md": ("pydicom", docs_world.xrays),
    "docs/remote-sensing.md": ("rasterio", docs_world.scenes),
    "docs/video-slides.md": ("tiffslide", docs_world.slides),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The data of all pages and, from the five commands of the README, its two runs."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("docs")
        docs_world.build(root)
        patch.chdir(root)
        for words in commands(chain().code):
            run_command(words)
        yield root


def readme_python() -> str:
    """The Python of the README, which another page repeats."""
    (block,) = [b for b in blocks("README.md") if b.language == "python"]
    return block.code


def chain():
    """The block of the README with the path for one's own images."""
    (block,) = [b for b in blocks("README.md") if "vim-ssl finetune" in b.code]
    return block


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    """A copy of the world for one page, so that pages may run in any order."""
    root = tmp_path / "world"
    shutil.copytree(world, root)
    monkeypatch.chdir(root)
    return root


def run_command(words: list[str]) -> None:
    """Run a command line of a page in this process."""
    if words[0] == "make":
        return  # its target exists: test_commands.py
    if words[:2] == ["python", "-m"] and not script(words):
        with pytest.raises(SystemExit) as stop:  # --help
            importlib.import_module(words[2]).main(words[3:])
        assert stop.value.code == 0
        return
    assert script(words), f"no command of the suite: {' '.join(words)}"
    name, argv = script(words)
    if name in docs_world.REDUCED and "--output" in argv and "--resume" not in argv:
        shutil.rmtree(argv[argv.index("--output") + 1], ignore_errors=True)  # of another page
    assert cli.main([name, *docs_world.reduced(name, argv)]) == 0, " ".join(words)


class Short:
    """A function of the Python API with the settings that shorten its command."""

    def __init__(self, name: str, command: str):
        self.function = getattr(vim_ssl, name)
        module = importlib.import_module(cli.all_commands()[command].module)
        argv = docs_world.REDUCED[command]
        given = vars(parse(module.Config, getattr(module, "PRESETS", {}), argv))
        flags = {word[2:].replace("-", "_") for word in argv if word.startswith("--")}
        self.settings = {flag: given[flag] for flag in flags}

    def __call__(self, *args, **settings):
        return self.function(*args, **(self.settings | settings))


@pytest.fixture
def short_functions(monkeypatch):
    shortened = {"pretrain": "mim-pretrain", "finetune": "finetune", "linear_probe": "linear-probe"}
    for name, command in shortened.items():
        monkeypatch.setattr(vim_ssl, name, Short(name, command))


@pytest.mark.parametrize("page", RUN)
def test_the_examples_of_a_page_run(page, here, short_functions):
    if page in EXTRA:
        package, write = EXTRA[page]
        pytest.importorskip(package)
        write(here)
    names: dict = {}
    done = [script(words) for words in commands(chain().code)]  # by the world
    for block in blocks(page):
        if block.needs or block.run_by or (block.code == readme_python() and page != "README.md"):
            continue
        if block.language == "sh":
            for words in commands(block.code):
                if (script(words) or words) not in done:  # forms of one command are run once
                    run_command(words)
                    done.append(script(words) or words)
        elif block.language == "python":
            code = compile("\n" * block.line + block.code, str(block.page), "exec")
            exec(code, names)


def test_blocks_that_another_test_runs_are_run_there():
    others = {block.run_by: block for page in PAGES for block in blocks(page) if block.run_by}
    assert set(others) == {
        "tests/downstream/test_trial.py", "tests/models/test_transformers.py",
    }  # fmt: skip
    for test, block in others.items():
        assert block.page in (ROOT / test).read_text()
