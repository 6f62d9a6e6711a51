"""docx to Markdown, by way of HTML: headings, lists, tables and notes stay what they are."""

from __future__ import annotations

from io import BytesIO
from typing import Any
from zipfile import ZipFile

import mammoth

from beacon_memory.errors import UnreadableFileError

from . import html

__all__ = ["read"]

_MOST_BYTES = 1 << 25  # of XML, unpacked; a long novel has a fifth of it, and some kB of zip can unpack to any number


def read(data: bytes) -> str:
    """Return the text of a document; raises UnreadableFileError if it would unpack to more than 32 MiB of XML."""
    with ZipFile(BytesIO(data)) as packed:
        markup = (part.file_size for part in packed.infolist() if part.filename.endswith((".xml", ".rels")))
        if sum(markup) > _MOST_BYTES:
            raise UnreadableFileError(f"it would unpack to more than {_MOST_BYTES >> 20} MiB of XML")
    converted = mammoth.convert_to_html(BytesIO(data), convert_image=mammoth.images.img_element(_left_out))
    return html.read(converted.value)


def _left_out(_picture: Any) -> dict[str, str]:
    return {"src": ""}
