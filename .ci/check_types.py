"""Run mypy on the packages as a wheel has them: kernels, recipes and downstream inside vim_ssl.

In a checkout the three folders stand beside vim_ssl, which registers them at run time. mypy does
not see that and would take everything of `vim_ssl.kernels` for Any. It therefore reads a folder of
links in the wheel's order; messages name the files of the checkout. Arguments go to mypy: options,
or further files to check with the packages.
"""

import contextlib
import os
import sys
from pathlib import Path

from mypy import api

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "recipes", "downstream")
CACHE = ROOT / ".mypy_cache"


def link_packages(package: Path) -> None:
    """Fill ``package`` with links to the files of vim_ssl/ and to the three folders."""
    package.mkdir(parents=True, exist_ok=True)
    for link in package.iterdir():
        if not link.exists():
            link.unlink(missing_ok=True)
    for target in [*(ROOT / "vim_ssl").iterdir(), *(ROOT / name for name in FOLDERS)]:
        with contextlib.suppress(FileExistsError):
            (package / target.name).symlink_to(os.path.relpath(target, package))


def main(argv: list[str]) -> int:
    arguments = [arg if arg.startswith("-") else os.path.abspath(arg) for arg in argv]
    link_packages(CACHE / "tree" / "vim_ssl")
    # Where mypy runs, it finds modules: in ROOT, `kernels` for what transformers imports.
    os.chdir(CACHE / "tree")
    settings = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(CACHE)]
    messages, problems, status = api.run([*settings, *arguments, "vim_ssl"])
    for name in FOLDERS:
        messages = messages.replace(os.path.join("vim_ssl", name, ""), os.path.join(name, ""))
    sys.stdout.write(messages)
    sys.stderr.write(problems)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
