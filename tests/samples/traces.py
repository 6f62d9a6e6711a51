"""A document whose words are told from all others, and what is found of it on disk."""

from __future__ import annotations

from pathlib import Path

from kv_samples import sample

from beacon_memory.documents import Label
from beacon_memory.storage.catalog.sqlite import SQLiteCatalog
from beacon_memory.storage.store import MemoryStore

ID = "Xylograph/87"
# no two begin alike: an index keeps of a word only what differs from the one in front of it
WORDS = ("quicksilver", "Jabberwock", "zymurgy", "Vouchsafing", "éclaircissement", "wolframite")
LABELS = ("Ytterbium", "Kohlrabi", "Ombudsman")
TRACES = (*WORDS, "quicksilv", "vouchsaf", "eclairciss", "zymurgi", "wolframit", ID, *LABELS)


def put_secret(store: MemoryStore, id: str = ID, times: int = 300) -> None:
    """Store the document, or another version of it, with `times` as many words."""
    text = " ".join(WORDS * times)
    store.put(*sample(id, text), text, Label({LABELS[0]: LABELS[1]}, [LABELS[2]]))


def traces(folder: Path) -> set[str]:
    """What of the document is found in the bytes below a folder and in the indexes of the catalogs there."""
    found = set()
    for path in folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes().lower()
            found |= {trace for trace in TRACES if trace.lower().encode() in data}
            found |= {trace for trace in TRACES if trace.encode() in data}
    for path in folder.rglob("catalog.sqlite3"):
        catalog = SQLiteCatalog(path)
        with catalog.connections.use() as db:
            db.execute("CREATE VIRTUAL TABLE IF NOT EXISTS temp.words USING fts5vocab(main, passages_fts, row)")
            indexed = {str(word) for (word,) in db.execute("SELECT term FROM temp.words").fetchall()}
        catalog.close()
        found |= {trace for trace in TRACES if trace.lower() in indexed}
    return found
