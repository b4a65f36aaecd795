"""Every command line for a recipe that a page shows is one that the recipe takes."""

import re
import shlex
from pathlib import Path

import pytest

from vim_ssl.recipes import clip_pretrain, mim_pretrain
from vim_ssl.training.run import stored_or
from vim_ssl.utils.config import parse

ROOT = Path(__file__).parents[2]
SCRIPTS = {"recipes/mim_pretrain.py": mim_pretrain, "recipes/clip_pretrain.py": clip_pretrain}


def commands(page: str) -> list[list[str]]:
    """The words of each command that runs a recipe, variables of the shell replaced by 1."""
    found = []
    text = (ROOT / page).read_text(encoding="utf-8")
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        block = re.sub(r"\$\(\(.*?\)\)|\$\(.*?\)|\$\w+|\\\n", _shell, block)
        lines = [shlex.split(line, comments=True) for line in block.splitlines()]
        lines += [
            shlex.split(word)
            for line in lines
            for word in line
            if re.search(r" recipes/\S+ ", word)
        ]
        found += [line for line in lines if SCRIPTS.keys() & set(line)]
    return found


def script(command: list[str]) -> int:
    """The recipe's place in a command."""
    return next(i for i, word in enumerate(command) if word in SCRIPTS)


def _shell(found: re.Match) -> str:
    return " " if found[0].startswith("\\") else "1"


PAGES = {"README.md": 8, "recipes/README.md": 7}
SHOWN = [(page, command) for page in PAGES for command in commands(page)]
IDS = [f"{page}-{i}" for i, (page, _) in enumerate(SHOWN)]


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_are_found(page):
    assert len(commands(page)) == PAGES[page]


@pytest.mark.parametrize(("page", "command"), SHOWN, ids=IDS)
def test_the_recipe_takes_what_a_page_shows(page, command):
    place = script(command)
    recipe, argv = SCRIPTS[command[place]], command[place + 1 :]
    default = stored_or(recipe.default_preset)
    if "--help" in argv:
        with pytest.raises(SystemExit) as stop:
            parse(recipe.Config, recipe.PRESETS, argv, default_preset=default)
        assert stop.value.code == 0
    else:  # leaves with a message if a flag or a value is wrong
        parse(recipe.Config, recipe.PRESETS, argv, default_preset=default)


@pytest.mark.parametrize(("page", "command"), SHOWN, ids=IDS)
def test_the_launcher_takes_what_a_page_shows(page, command):
    name = command[script(command)]
    before = command[: script(command)]
    if before[-1] == "python":
        return
    from accelerate.commands.launch import launch_command_parser

    place = before.index("accelerate")
    assert before[place + 1] == "launch"
    args = launch_command_parser().parse_args([*before[place + 2 :], name])
    assert args.training_script == name
