"""The pages of the documentation: their blocks of code, and the commands in these.

A block of the languages ``sh`` and ``python`` is run by docs/test_docs_examples.py. An HTML comment
on the line before it, which no reader sees, leaves it out and says what it would need:

    <!-- not run: gpu -->      or network, or hours
    <!-- run by: tests/models/test_transformers.py -->      a test that has imported what it needs
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Pages whose blocks other tests run.
RUN_ELSEWHERE = {
    "docs/extending.md": "tests/test_extending.py",
    "kernels/selective_scan/README.md": "tests/kernels/test_selective_scan.py",
}
PAGES = [
    "README.md",
    "recipes/README.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")),
]
NEEDS = ("gpu", "network", "hours")
_BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>not run|run by): (?P<value>[^\n]*) -->\n)?"
    r"```(?P<language>\S*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        line: line of its fence in the page, from 1.
        needs: what it would need to be run; "" if a test runs it.
        run_by: another test that runs it, or "".
    """

    page: str
    line: int
    language: str
    code: str
    needs: str = ""
    run_by: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    """The blocks of a page in order."""
    text, result = text_of(page), []
    for found in _BLOCK.finditer(text):
        fence = text.count("\n", 0, found.start()) + 1 + bool(found["mark"])
        mark = {"not run": "needs", "run by": "run_by"}.get(found["mark"])
        marks = {mark: found["value"]} if mark else {}
        result.append(Block(page, fence, found["language"], found["code"], **marks))
    return result


def commands(code: str) -> list[list[str]]:
    """The words of each command of a shell block, variables replaced by 1.

    A command that another one runs (``srun bash -c '…'``) follows it.
    """
    code = re.sub(r"\\\n", " ", code)
    code = re.sub(r"\$\(\(.*?\)\)|\$\(.*?\)|\$\w+", "1", code)
    lines = [shlex.split(line, comments=True) for line in _lines(code)]
    nested = [shlex.split(word) for line in lines for word in line if " recipes/" in word]
    return [line for line in [*lines, *nested] if line]


def _lines(code: str) -> list[str]:
    """The lines of a shell block; those within quotes stay together."""
    joined: list[str] = []
    for line in code.splitlines():
        bare = re.sub(r"(^|\s)#.*", "", joined[-1]) if joined else ""
        if bare.count("'") % 2:
            joined[-1] += " " + line
        else:
            joined.append(line)
    return joined


def script(words: list[str]) -> tuple[str, list[str]] | None:
    """(name of the `vim-ssl` command, its arguments) of a command line that runs one of the suite,
    in any of its forms; None for another program."""
    if words[0] == "vim-ssl":
        return words[1], words[2:]
    for i, word in enumerate(words):
        form = re.fullmatch(
            r"(?:recipes|downstream)/(\w+)\.py|vim_ssl\.(?:recipes|downstream)\.(\w+)", word
        )
        if form:
            return (form[1] or form[2]).replace("_", "-"), words[i + 1 :]
    return None


def launcher(words: list[str]) -> list[str]:
    """What stands before the script: [] for `vim-ssl`."""
    for i, word in enumerate(words):
        if re.match(r"(recipes|downstream)/\w+\.py|vim_ssl\.", word):
            return words[:i]
    return []
