"""Every command of the pages is one that can be given: names, flags and values, run or not."""

import importlib
import re
from collections import Counter

import pytest
from docs_pages import NEEDS, PAGES, ROOT, RUN_ELSEWHERE, blocks, commands, launcher, script

from vim_ssl.cli import all_commands
from vim_ssl.training.run import stored_or
from vim_ssl.utils.config import parse

SHELL = [block for page in PAGES for block in blocks(page) if block.language == "sh"]
ALL = [(block, words) for block in SHELL for words in commands(block.code)]
OURS = [(f"{block}", words) for block, words in ALL if script(words)]
# Marked blocks of all pages, by need. A block that can be run should not be marked.
MARKED = {"gpu": 8, "network": 4, "hours": 2}


def test_every_block_says_its_language_and_a_known_need():
    for page in PAGES:
        for block in blocks(page):
            if page not in RUN_ELSEWHERE:
                assert block.language in ("sh", "python", "text", "toml"), block
            assert block.needs in ("", *NEEDS), block


def test_the_number_of_blocks_that_are_not_run():
    needs = Counter(block.needs for page in PAGES for block in blocks(page) if block.needs)
    assert needs == MARKED


def test_commands_are_found():
    """An empty list would pass everything below."""
    names = {script(words)[0] for _, words in OURS}
    assert names >= {"data", "mim-pretrain", "clip-pretrain", "linear-probe", "knn", "finetune",
                     "predict", "segmentation", "detection", "video", "slide", "embed"}  # fmt: skip
    assert len(OURS) > 50


@pytest.mark.parametrize(("place", "words"), OURS, ids=[place for place, _ in OURS])
def test_the_script_takes_what_a_page_shows(place, words):
    name, argv = script(words)
    if name.startswith("-"):
        return  # vim-ssl --help
    known = all_commands()
    assert name in known, f"{place}: no command {name}"
    module = importlib.import_module(known[name].module)
    if not hasattr(module, "Config"):
        return  # a tool; it is run
    default = stored_or(getattr(module, "default_preset", None))
    if "--help" in argv:
        with pytest.raises(SystemExit) as stop:
            parse(module.Config, getattr(module, "PRESETS", {}), argv, default_preset=default)
        assert stop.value.code == 0
    else:  # leaves with a message if a flag or a value is wrong
        parse(module.Config, getattr(module, "PRESETS", {}), argv, default_preset=default)


LAUNCHED = [(place, words) for place, words in OURS if "accelerate" in words]


@pytest.mark.parametrize(("place", "words"), LAUNCHED, ids=[place for place, _ in LAUNCHED])
def test_the_launcher_takes_what_a_page_shows(place, words):
    from accelerate.commands.launch import launch_command_parser

    before = launcher(words)
    at = before.index("accelerate")
    assert before[at + 1] == "launch"
    args = launch_command_parser().parse_args([*before[at + 2 :], words[len(before)]])
    assert args.training_script == words[len(before)]


def test_targets_of_make_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    text = " ".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    shown = {words[1] for _, words in ALL if words[0] == "make"}
    shown |= set(re.findall(r"`make ([a-z-]+)", text))
    assert {"demo", "test", "docs"} <= shown
    assert shown <= targets


def test_extras_exist():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    text = " ".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    shown = {name for names in re.findall(r"pip install '?\S*?\[([\w,-]+)\]", text)
             for name in names.split(",")}  # fmt: skip
    assert "medical" in shown
    assert shown <= extras.keys()
    listed = set(re.findall(r"^\| `([\w-]+)` \|", (ROOT / "docs/install.md").read_text(), re.M))
    assert extras.keys() - {"test", "dev"} <= listed
