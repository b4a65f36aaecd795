"""Copy the files of the repository outside docs/ that a page links into the site, and refuse pages
that would load something from elsewhere.

`[rows](../benchmarks/results/transfer.csv)` is right where the repository is read. The site has a
copy of the file at files/benchmarks/results/transfer.csv, and the link points there. A linked file
of markdown becomes a page.
"""

import os
import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
COPIED = "files/"
# [text](path) and ![text](path), without links to elsewhere or within the page
LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)\s#]+)")
# What a browser would load from another server to show a page.
REMOTE = re.compile(r"<(?:script|img|iframe)[^>]*\ssrc=\"?(?:https?:)?//|"
                    r"<link[^>]*\shref=\"?(?:https?:)?//")  # fmt: skip


def on_files(files: Files, config) -> Files:
    """Add every linked file outside docs/; the files that these link are added in turn."""
    pages = [page.src_uri for page in files.documentation_pages()]
    pages += [uri for uri in _uris(config.nav) if uri.startswith(COPIED)]
    seen = set(files.src_uris)
    while pages:
        uri = pages.pop()
        if uri not in seen:
            seen.add(uri)
            path = str(ROOT / uri.removeprefix(COPIED))
            level = InclusionLevel.NOT_IN_NAV
            files.append(File.generated(config, uri, abs_src_path=path, inclusion=level))
        if uri.endswith(".md"):
            text = source(uri).read_text(encoding="utf-8")
            targets = [site_uri(uri, link) for _, link in LINK.findall(text)]
            pages += [name for name in targets if name.startswith(COPIED) and name not in seen]
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Point the links at the files of the site."""
    here = os.path.dirname(page.file.src_uri) or "."

    def moved(found: re.Match) -> str:
        uri = site_uri(page.file.src_uri, found[2])
        return found[1] + os.path.relpath(uri, here).replace(os.sep, "/") if uri else found[0]

    return LINK.sub(moved, markdown)


def on_post_page(output: str, page, config) -> str:
    """Raises: PluginError for a page that loads something from another server."""
    if found := REMOTE.search(output):
        raise PluginError(f"{page.file.src_uri} loads {found[0]}…; the site must work offline.")
    return output


def source(uri: str) -> Path:
    """The file of the repository that a page of the site is made of."""
    return ROOT / uri.removeprefix(COPIED) if uri.startswith(COPIED) else ROOT / "docs" / uri


def site_uri(uri: str, link: str) -> str:
    """Where the site has the file that the page ``uri`` links; "" if there is no such file.

    >>> site_uri("api/data.md", "../../LICENSE")
    'files/LICENSE'
    >>> site_uri("files/CONTRIBUTING.md", "docs/extending.md")
    'extending.md'
    """
    path = Path(os.path.normpath(source(uri).parent / link))
    if not path.is_file() or not path.is_relative_to(ROOT):
        return ""
    name = path.relative_to(ROOT).as_posix()
    return name.removeprefix("docs/") if name.startswith("docs/") else COPIED + name


def _uris(nav) -> list[str]:
    """All files that the navigation names."""
    if isinstance(nav, str):
        return [nav]
    entries = nav.values() if isinstance(nav, dict) else nav or []
    return [uri for entry in entries for uri in _uris(entry)]
