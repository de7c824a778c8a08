"""A hook of mkdocs: the pages link to files of the repository, which are not part of the site.

Pictures come along. Other links lead to ``repo_url`` where mkdocs.yml has one; without, the path is
shown in their place.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(!?)\[([^\]]*)\]\(((?:\.\./)+[^)#]+)\)")
PICTURES = "repository"  # their folder in the site


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pictures = set()
    for file in files.documentation_pages():
        for picture, _, target in LINK.findall(file.content_string):
            path = outside(file.src_uri, target)
            if picture and path:
                pictures.add(path)
    for path in sorted(pictures):
        source = str(ROOT / path)
        files.append(File.generated(config, f"{PICTURES}/{path}", abs_src_path=source))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    def replace(match: re.Match[str]) -> str:
        picture, text, target = match.groups()
        path = outside(page.file.src_uri, target)
        if path is None:
            return match.group()
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{page.file.src_uri} links to {path}, which is not there")
        if picture:
            start = posixpath.dirname(page.file.src_uri) or "."
            return f"![{text}]({posixpath.relpath(f'{PICTURES}/{path}', start)})"
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path})"
        return f"`{path}`" if text in path else f"{text} (`{path}`)"

    return LINK.sub(replace, markdown)


def outside(page: str, target: str) -> str | None:
    """The path from the repository's root, of a link that leaves docs/; else None."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return None if path.startswith("docs/") else path
