"""Map the three top-level folders into the `vim_ssl` package, and make the package index's text of
README.md; all other metadata is in pyproject.toml."""

import re
import tomllib
from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = ("kernels", "recipes", "downstream")
ROOT = Path(__file__).parent


def index_text() -> str:
    """README.md for a page without the repository's files: links to them lead to the repository if
    pyproject.toml has its address (project.urls.Source); otherwise they are text, without images.
    """
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    source = project.get("urls", {}).get("Source", "").rstrip("/")
    local = r"\]\((?![a-z]+:|#)([^)]+)\)"
    if source:
        text = re.sub(r"(!\[[^\]]*)" + local, rf"\1]({source}/raw/HEAD/\2)", text)
        return re.sub(local, rf"]({source}/blob/HEAD/\1)", text)
    text = re.sub(r"!\[[^\]]*" + local + r"\n*", "", text)
    return re.sub(r"\[([^\]]*)" + local, r"\1", text)


nested = [f"vim_ssl.{f}.{p}" for f in FOLDERS for p in find_packages(f)]
setup(
    long_description=index_text(),
    long_description_content_type="text/markdown",
    packages=["vim_ssl", *(f"vim_ssl.{p}" for p in find_packages("vim_ssl"))]
    + [f"vim_ssl.{f}" for f in FOLDERS]
    + nested,
    package_dir={f"vim_ssl.{f}": f for f in FOLDERS},
)
