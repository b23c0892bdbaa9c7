"""Pages of results, as a benchmark writes them."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

WIDTH = 120
_WOULD_BEGIN = re.compile(r" (?=(?:[-+*|>!]|#+|\d+\.)(?: |$))")  # another kind of paragraph, if a line began so
_ITEM = re.compile(r"\s*(?:[-*] |\d+\. )")


def write(path: Path, text: str) -> None:
    """Write a page of Markdown, its folder too, with lines that are no longer than they may be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(wrapped(text), encoding="utf-8")


def wrapped(text: str) -> str:
    """The page with paragraphs filled anew that have long lines. Tables, headings and code stay as they are."""
    lines: list[str] = []
    for paragraph in _paragraphs(text):
        item = _ITEM.match(paragraph[0])
        if _is_prose(paragraph[0]) and max(map(len, paragraph)) > WIDTH:
            joined = " ".join([paragraph[0], *(line.lstrip() for line in paragraph[1:])])
            indent = " " * (item.end() if item else 0)
            glued = _WOULD_BEGIN.sub("\0", joined)
            filled = textwrap.wrap(
                glued, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
            )
            paragraph = [line.replace("\0", " ") for line in filled]
        lines += paragraph
    return "\n".join(lines) + "\n"


def _is_prose(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith(("|", "#", "!", ">", "```"))


def _paragraphs(text: str) -> Iterator[list[str]]:
    """Lines of prose that belong together, blocks of code, and every other line by itself."""
    found: list[str] = []
    is_code = False
    for line in text.splitlines():
        if found and not is_code and (not _is_prose(line) or _ITEM.match(line)):
            yield found
            found = []
        found.append(line)
        is_code ^= line.lstrip().startswith("```")
        if not is_code and not _is_prose(line):
            yield found
            found = []
    if found:
        yield found
