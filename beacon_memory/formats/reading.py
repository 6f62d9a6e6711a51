"""One function for files of all formats: bytes to text."""

from __future__ import annotations

from collections.abc import Callable
from email.message import Message
from importlib import import_module

from beacon_memory.errors import UnreadableFileError

from .kinds import Format, find_format

__all__ = ["read_text"]

_MODULES = {Format.HTML: "html", Format.PDF: "pdf", Format.DOCX: "docx"}  # imported when they are needed


def read_text(data: bytes, *, name: str = "", media_type: str = "") -> str:
    r"""Return the text of a file; that of HTML and docx as Markdown, with headings, lists and tables.

        read_text(b"<h1>Lease</h1><p>It ends in <b>2031</b>.", media_type="text/html")  # "# Lease\n\nIt ends in 2031."

    name: of the file, of which the ending counts if the media type tells nothing. Without both, it is a PDF if it
          begins like one, and plain text otherwise.

    Raises UnsupportedFormatError for a format that is not read, UnreadableFileError for a file that is damaged, locked
    or has no text, and MissingDependencyError if the extra `formats` is not installed.
    """
    format_ = find_format(data, name=name, media_type=media_type)
    if format_ is Format.TEXT:
        return _plain(data, media_type)
    format_.require_packages()
    reader: Callable[[bytes], str] = import_module(f".{_MODULES[format_]}", __package__).read
    try:
        text = reader(data)
    except UnreadableFileError:
        raise
    except Exception as error:  # whatever a library finds in somebody else's bytes
        reason = type(error).__name__
        raise UnreadableFileError(f"it is no {format_.title} file, or it is damaged ({reason})") from error
    if not text.strip():
        raise UnreadableFileError("there is no text in it, perhaps only pictures of text; read them by OCR first")
    return text


def _plain(data: bytes, media_type: str) -> str:
    header = Message()
    header["content-type"] = media_type or "text/plain"
    charset = header.get_content_charset("utf-8")
    try:
        text = data.decode("utf-8-sig" if charset in ("utf-8", "us-ascii") else charset)
    except UnicodeDecodeError as error:
        what = "UTF-8" if charset == "utf-8" else charset
        raise UnreadableFileError(f"it is not {what} text (byte {error.start}); convert it first") from error
    except LookupError:
        raise UnreadableFileError(f"charset={charset!r} is no known encoding; send it as UTF-8") from None
    if "\0" in text:
        raise UnreadableFileError("it holds NUL characters: it is a binary file, not text")
    return text
