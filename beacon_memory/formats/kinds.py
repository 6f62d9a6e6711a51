"""The formats that can be read, and which one a file is of: by its media type, its name, or how it begins."""

from __future__ import annotations

from enum import Enum
from importlib.util import find_spec
from pathlib import PurePath

from beacon_memory.errors import MissingDependencyError, UnsupportedFormatError

__all__ = ["Format", "find_format"]

_UNKNOWN_TYPES = ("", "application/octet-stream", "binary/octet-stream")  # say nothing of what a file is
_PDF_BEGINS = b"%PDF-"


class Format(Enum):
    """A format with its name, the endings of its files, its media types, and the packages that read it."""

    TEXT = (
        "plain text or Markdown",
        ("", ".text", ".txt", ".markdown", ".md", ".rst"),
        ("text/plain", "text/markdown", "text/x-markdown", "text/x-rst", "text/prs.fallenstein.rst"),
        (),
    )
    HTML = (
        "HTML",
        (".html", ".htm", ".xhtml"),
        ("text/html", "application/xhtml+xml"),
        ("bs4", "lxml", "markdownify"),
    )
    PDF = ("PDF", (".pdf",), ("application/pdf", "application/x-pdf"), ("pypdf",))
    DOCX = (
        "docx",
        (".docx",),
        ("application/vnd.openxmlformats-officedocument.wordprocessingml.document",),
        ("bs4", "lxml", "mammoth", "markdownify"),
    )

    def __init__(
        self, title: str, suffixes: tuple[str, ...], media_types: tuple[str, ...], packages: tuple[str, ...]
    ) -> None:
        self.title, self.suffixes, self.media_types, self.packages = title, suffixes, media_types, packages

    def require_packages(self) -> None:
        """Raise MissingDependencyError if files of this format cannot be read for want of a package."""
        if any(find_spec(package) is None for package in self.packages):
            raise MissingDependencyError(f"reading {self.title} needs the extra: pip install 'beacon-memory[formats]'")


def find_format(data: bytes = b"", *, name: str = "", media_type: str = "") -> Format:
    """Return the format of a file; raises UnsupportedFormatError for one that is not read.

    The media type decides, without its parameters; if it tells nothing, the ending of the name; if there is no name,
    the first bytes of `data`.
    """
    media_type = media_type.partition(";")[0].strip().lower()
    if media_type not in _UNKNOWN_TYPES:
        for one in Format:
            if media_type in one.media_types:
                return one
        raise UnsupportedFormatError(f"files of type {media_type[:100]!r} are not read; {_known()}")
    if name:
        suffix = PurePath(name).suffix.lower()
        for one in Format:
            if suffix in one.suffixes:
                return one
        raise UnsupportedFormatError(f"{suffix} files are not read; {_known()}")
    return Format.PDF if data.startswith(_PDF_BEGINS) else Format.TEXT


def _known() -> str:
    titles = [one.title for one in Format]
    return f"convert it to {', '.join(titles[:-1])} or {titles[-1]} first"
