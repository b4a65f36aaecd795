"""One word for one thing: words that the glossary of CONTRIBUTING.md replaces stay out."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("vim_ssl", "kernels", "recipes", "downstream", "benchmarks")
# Retired word -> what to write.
IN_NAMES = {
    "picture": "image", "found": "result, match", "told": "reported", "tell": "report, warn",
    "own": "its, local", "wanted": "requested", "asked": "requested", "place": "position, path",
    "judge": "evaluate", "judged": "evaluated", "figure": "metric", "sheet": "grid",
    "shown": "overlay", "bag": "slide", "joint": "dense", "doctor": "check", "glance": "online",
    "enough": "should_stop", "agreed": "broadcast", "said": "reported",
}  # fmt: skip
IN_TEXT = {
    "picture": "image", "doctor": "check", "judge": "evaluate", "judged": "evaluated",
    "judges": "evaluates", "told": "reported", "as_sheet": "fold_time",
}  # fmt: skip
# f-strings have tokens of their own from Python 3.12 on.
TEXT = (tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING))
# Keys of files and flags of earlier versions, which keep their names, and other libraries' names.
KEPT_NAMES = re.compile(r"judge_batch|tell|\w*NotFoundError")
KEPT_TEXT = re.compile(r"pictures?|pictures_an_epoch")

# Inside longer text: flags and paths that keep their names.
KEPT_LINE = re.compile(r"--judge-batch|--pictures|dense_pictures|judge_batch|\['pictures'\]")


def words(name: str) -> set[str]:
    """The words of an identifier, in the singular: FilePictures -> {"file", "picture"}."""
    parts = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|_", " ", name).lower().split()
    return {part.removesuffix("s") if part.removesuffix("s") in IN_NAMES else part
            for part in parts}  # fmt: skip


def retired_words(code: str) -> list[str]:
    """``line: word -> replacement`` for each retired word in names, strings and comments."""
    lines = []
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.NAME and not KEPT_NAMES.fullmatch(token.string):
            hits = {word: IN_NAMES[word] for word in words(token.string) & IN_NAMES.keys()}
        elif token.type in TEXT:
            text = token.string
            if token.type == tokenize.STRING and not text.startswith(("f", "rf", "fr")):
                text = str(ast.literal_eval(text))
            if KEPT_TEXT.fullmatch(text):
                continue
            plain = KEPT_LINE.sub("", text)
            hits = {word: better for word, better in IN_TEXT.items()
                    if re.search(rf"\b{word}s?\b", plain, re.IGNORECASE)}  # fmt: skip
        else:
            continue
        lines += [f"{token.start[0]}: {word!r} -> {better}" for word, better in hits.items()]
    return lines


def sources() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_retired_word_stands_in_names_or_messages(folder):
    hits = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sources()
        if path.relative_to(ROOT).parts[0] == folder
        for line in retired_words(path.read_text(encoding="utf-8"))
    ]
    assert not hits, "\n".join(hits)


@pytest.mark.parametrize(
    ("code", "hits"),
    [
        ("class FilePictures: pass", ["picture"]),
        ("def f(asked, x): return x", ["asked"]),
        ("raise ValueError(f'{n} pictures are broken')", ["picture"]),
        ("x = 1  # as the doctor told", ["doctor", "told"]),
        ('"""Judge an encoder."""', ["judge"]),
        ("row['pictures'] = images; error = FileNotFoundError", []),
        ("config.judge_batch; help = 'use --judge-batch 4'", []),
    ],
)
def test_the_check_sees_names_messages_and_comments(code, hits):
    assert sorted(line.split("'")[1] for line in retired_words(code)) == sorted(hits)
