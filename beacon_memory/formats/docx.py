"""docx to Markdown, by way of HTML: headings, lists, tables and notes stay what they are."""

from __future__ import annotations

from io import BytesIO
from typing import Any
from zipfile import ZipFile

import mammoth

from beacon_memory.errors import UnreadableFileError

from . import html

__all__ = ["read"]

_MOST_BYTES = 1 << 28  # unpacked, pictures included: some kB of zip can unpack to any number


def read(data: bytes) -> str:
    """Return the text of a document; raises UnreadableFileError if it would unpack to more than 256 MiB."""
    with ZipFile(BytesIO(data)) as packed:
        if sum(part.file_size for part in packed.infolist()) > _MOST_BYTES:
            raise UnreadableFileError(f"it would unpack to more than {_MOST_BYTES >> 20} MiB")
    converted = mammoth.convert_to_html(BytesIO(data), convert_image=mammoth.images.img_element(_left_out))
    return html.read(converted.value)


def _left_out(_picture: Any) -> dict[str, str]:
    return {"src": ""}
