"""Small real files of several formats, written by the packages that people write them with."""

from __future__ import annotations

from io import BytesIO

import docx
from fpdf import FPDF

HTML = b"""<!doctype html><html><head><meta charset="iso-8859-1"><title>The mill</title>
<style>p { color: red }</style><script>alert('no')</script></head><body>
<nav><a href="https://example.org/home">Home</a></nav>
<h2>Rent</h2><p>Paid by <b>Ada</b> Flint, at the caf\xe9 <i>every</i> month_end.</p>
<ul><li>wheels: two<li>owls: *many*</ul>
<table><tr><th>year<th>rent</tr><tr><td>2030<td>40</tr></table>
<img src="mill.png" alt="a picture"><noscript>no</noscript></body></html>"""


def pdf(*pages: str, password: str = "") -> bytes:
    """A PDF with a page for each text; of one without pages' texts, a page that is only drawn on."""
    file = FPDF()
    file.set_font("Helvetica", size=12)
    for text in pages:
        file.add_page()
        file.multi_cell(0, 8, text)
    if not pages:
        file.add_page()
        file.rect(10, 10, 50, 50)
    if password:
        file.set_encryption(owner_password="owner", user_password=password)
    return bytes(file.output())


def word() -> bytes:
    """A docx file with a heading, a paragraph, a list and a table."""
    file = docx.Document()
    file.add_heading("The mill", level=1)
    file.add_paragraph("The rent is paid by ").add_run("Ada Flint").bold = True
    file.add_paragraph("two wheels", style="List Bullet")
    table = file.add_table(rows=2, cols=2)
    for cell, text in zip(table._cells, ("year", "rent", "2030", "40 \u0142"), strict=True):
        cell.text = text
    written = BytesIO()
    file.save(written)
    return written.getvalue()
