"""Files of several formats become texts, or say why they do not."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import zipfile
from io import BytesIO

import pytest
from file_samples import HTML, pdf, word

from beacon_memory import InputError, MissingDependencyError, UnreadableFileError, UnsupportedFormatError
from beacon_memory.formats import kinds
from beacon_memory.formats.reading import read_text

DOCX = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"


def test_a_page_is_read_as_a_person_sees_it() -> None:
    assert read_text(HTML, media_type="text/html; charset=utf-8").splitlines() == [
        "# The mill",
        "",
        "Home",
        "",
        "## Rent",
        "",
        "Paid by Ada Flint, at the caf\u00e9 every month_end.",
        "",
        "- wheels: two",
        "- owls: *many*",
        "",
        "| year | rent |",
        "| --- | --- |",
        "| 2030 | 40 |",
    ]


def test_a_title_that_the_first_heading_repeats_is_read_once() -> None:
    assert read_text(b"<title>Lease</title><h1>Lease</h1><p>2031</p>", name="a.htm") == "# Lease\n\n2031"


def test_a_document_keeps_headings_lists_and_tables() -> None:
    assert read_text(word(), name="The Mill.DOCX").splitlines() == [
        "# The mill",
        "",
        "The rent is paid by Ada Flint",
        "",
        "- two wheels",
        "",
        "| year | rent |",
        "| --- | --- |",
        "| 2030 | 40 \u0142 |",
    ]


def test_a_pdf_is_read_page_by_page() -> None:
    assert read_text(pdf("The lease ends in 2031.", "Ada Flint pays."), media_type="application/pdf") == (
        "The lease ends in 2031.\n\nAda Flint pays."
    )


def test_the_media_type_decides_then_the_name_then_the_first_bytes() -> None:
    file = pdf("Ada")
    assert read_text(file, name="a.txt", media_type="application/pdf") == "Ada"
    assert read_text(file, name="a.pdf", media_type="application/octet-stream") == "Ada"
    assert read_text(file) == "Ada"
    assert read_text(b"<p>Ada", name="a.md") == "<p>Ada"
    assert read_text(b"<p>Ada", media_type="text/plain", name="a.html") == "<p>Ada"
    assert read_text("\ufeffŁódź".encode()) == "Łódź"
    assert read_text("café".encode("latin-1"), media_type="text/plain; charset=iso-8859-1") == "café"


@pytest.mark.parametrize(
    ("name", "media_type", "said"),
    [
        ("a.xls", "", ".xls files are not read; convert it to plain text or Markdown, HTML, PDF or docx first"),
        ("a.doc", "application/octet-stream", ".doc files are not read"),
        ("a.txt", "image/png", "files of type 'image/png' are not read"),
        ("", "nonsense", "files of type 'nonsense' are not read"),
    ],
)
def test_another_format_is_refused_by_its_name(name: str, media_type: str, said: str) -> None:
    with pytest.raises(UnsupportedFormatError, match=said.replace(".", r"\.")) as refused:
        read_text(b"x", name=name, media_type=media_type)
    assert isinstance(refused.value, InputError)


def zipped(*parts: tuple[str, bytes]) -> bytes:
    written = BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in parts:
            packed.writestr(name, data)
    return written.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.pdf", b"%PDF-1.7 and no more", "no PDF file, or it is damaged"),
        ("a.pdf", b"", "no PDF file, or it is damaged"),
        ("a.pdf", pdf("Ada")[:-600], "no PDF file, or it is damaged"),
        ("a.pdf", pdf("Ada", password="sesame"), "it needs a password"),
        ("a.pdf", pdf(), "there is no text in it, perhaps only pictures"),
        ("a.docx", b"PK\x03\x04 and no more", "no docx file, or it is damaged"),
        ("a.docx", zipped(("other.xml", b"<a/>")), "no docx file, or it is damaged"),
        ("a.docx", zipped(("word/document.xml", bytes((1 << 25) + 1))), "it would unpack to more than 32 MiB of XML"),
        ("a.html", b"<script>1</script>", "there is no text in it"),
        ("a.html", b"<div>" * 100_000 + b"Ada", "no HTML file, or it is damaged"),
        ("a.txt", "café".encode("latin-1"), r"it is not UTF-8 text \(byte 3\); convert it first"),
        ("a.txt", b"a\0b", "it holds NUL characters"),
    ],
    ids=lambda value: value if isinstance(value, str) else len(value),
)
def test_what_cannot_be_read_says_why(name: str, data: bytes, said: str) -> None:
    with pytest.raises(UnreadableFileError, match=said):
        read_text(data, name=name)


@pytest.mark.parametrize(
    ("name", "data"), [("a.pdf", pdf("Ada pays.", "In 2031.")), ("a.docx", word()), ("a.html", HTML)]
)
def test_damaged_bytes_are_read_or_refused_and_never_anything_else(name: str, data: bytes) -> None:
    drawn = random.Random(0)
    for _ in range(60):
        damaged = bytearray(data[: drawn.randrange(len(data) // 2, len(data))])
        for _ in range(drawn.randrange(20)):
            damaged[drawn.randrange(len(damaged))] = drawn.randrange(256)
        with contextlib.suppress(UnreadableFileError):
            assert isinstance(read_text(bytes(damaged), name=name), str)


def test_an_encoding_that_does_not_exist_is_named() -> None:
    with pytest.raises(UnreadableFileError, match="charset='klingon' is no known encoding"):
        read_text(b"a", media_type="text/plain; charset=klingon")


def test_without_the_extra_plain_text_is_read_and_other_formats_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kinds, "find_spec", lambda _: None)
    assert read_text(b"Ada", name="a.txt") == "Ada"
    for name in ("a.html", "a.pdf", "a.docx"):
        with pytest.raises(MissingDependencyError, match=r"pip install 'beacon-memory\[formats\]'"):
            read_text(b"x", name=name)


def test_plain_text_is_read_without_importing_what_reads_other_formats() -> None:
    script = (
        "import sys; from beacon_memory.formats.reading import read_text; read_text(b'Ada', name='a.txt'); "
        "sys.exit(bool({'bs4', 'mammoth', 'markdownify', 'pypdf', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
