"""PDF to text: page by page, in the order in which a page draws it."""

from __future__ import annotations

from io import BytesIO

from pypdf import PasswordType, PdfReader

from beacon_memory.errors import UnreadableFileError

__all__ = ["read"]


def read(data: bytes) -> str:
    """Return the text of all pages, an empty line between them; raises UnreadableFileError if it needs a password."""
    file = PdfReader(BytesIO(data))
    if file.is_encrypted and file.decrypt("") is PasswordType.NOT_DECRYPTED:
        raise UnreadableFileError("it needs a password; save it without one")
    pages = (page.extract_text().strip() for page in file.pages)
    return "\n\n".join(page for page in pages if page)
