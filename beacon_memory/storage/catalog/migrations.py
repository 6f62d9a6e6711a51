"""The catalog's tables, as the append-only list of steps that make them.

A step that was released is never edited: a change to the tables is a new function at the end. Each runs once, in its
own transaction, which also records it.
"""

from __future__ import annotations

import json
import re
import secrets
from datetime import UTC, datetime

from sqlite_utils import Database, Migrations

from beacon_memory.errors import CorruptFileError, StoreError

from .connections import begin_immediate
from .passages import split_passages
from .rows import checksum, printable, properties_of
from .sqlite_texts import misindexed, stored_passages
from .texts import sound_text
from .words import indexed_form

__all__ = ["migrate", "migrations"]

migrations = Migrations("beacon_memory")


@migrations()
def m001_documents(db: Database) -> None:
    """Create a row for each document. `text` comes last, so that listing rows never reads the pages it fills."""
    db.execute(
        """
        CREATE TABLE documents (
            id TEXT PRIMARY KEY NOT NULL,
            file TEXT NOT NULL UNIQUE,
            content_hash TEXT NOT NULL,
            fingerprint TEXT NOT NULL,
            tokens INTEGER NOT NULL,
            slots INTEGER NOT NULL,
            bytes INTEGER NOT NULL,
            ratios TEXT NOT NULL,
            metadata TEXT NOT NULL,
            created_at TEXT NOT NULL,
            updated_at TEXT NOT NULL,
            text TEXT NOT NULL
        )
        """
    )


@migrations()
def m002_passages(db: Database) -> None:
    """Keep the texts in passages, too, with a full-text index that triggers keep in step.

    `id` is spelled out because VACUUM may renumber the rows of a table that has none, and the index refers to them.
    """
    db.execute(
        """
        CREATE TABLE passages (
            id INTEGER PRIMARY KEY,
            document TEXT NOT NULL REFERENCES documents(id) ON DELETE CASCADE,
            ordinal INTEGER NOT NULL,
            start INTEGER NOT NULL,
            stop INTEGER NOT NULL,
            text TEXT NOT NULL,
            UNIQUE (document, ordinal)
        )
        """
    )
    db.table("passages").enable_fts(["text"], create_triggers=True, tokenize="porter unicode61")


@migrations()
def m003_compression(db: Database) -> None:
    """Add the compression of a document. SQLite adds columns at the end, so `text` is moved behind it again."""
    db.execute("ALTER TABLE documents ADD COLUMN compression TEXT NOT NULL DEFAULT 'beacon'")
    db.execute("ALTER TABLE documents RENAME COLUMN text TO moved")
    db.execute("ALTER TABLE documents ADD COLUMN text TEXT NOT NULL DEFAULT ''")
    db.execute("UPDATE documents SET text = moved")
    db.execute("ALTER TABLE documents DROP COLUMN moved")


@migrations()
def m004_lifetimes(db: Database) -> None:
    """Add precision, tags, pin, expiry, time of use and checksum, kept versions, and what the whole catalog knows.

    The text is no longer kept twice: its passages, joined, are the text.
    """
    for column in (
        "precision TEXT NOT NULL DEFAULT ''",
        "tags TEXT NOT NULL DEFAULT '[]'",
        "pinned INTEGER NOT NULL DEFAULT 0",
        "expires_at TEXT",
        "used_at INTEGER NOT NULL DEFAULT 0",
        "seal TEXT NOT NULL DEFAULT ''",
    ):
        db.execute(f"ALTER TABLE documents ADD COLUMN {column}")
    _keep_texts(db)
    db.execute("ALTER TABLE documents DROP COLUMN text")
    db.execute("CREATE INDEX documents_used ON documents (pinned, used_at)")
    db.execute("CREATE INDEX documents_expiring ON documents (expires_at) WHERE expires_at IS NOT NULL")
    # tags, and the plain values at the top of metadata, to filter by
    db.execute(
        """
        CREATE TABLE labels (
            name TEXT NOT NULL,
            value TEXT NOT NULL,
            document TEXT NOT NULL REFERENCES documents(id) ON DELETE CASCADE,
            PRIMARY KEY (name, value, document)
        ) WITHOUT ROWID
        """
    )
    db.execute("CREATE INDEX labels_document ON labels (document)")
    # K/V of the same text that another model made, kept while its readers go on
    db.execute(
        """
        CREATE TABLE versions (
            document TEXT NOT NULL REFERENCES documents(id) ON DELETE CASCADE,
            fingerprint TEXT NOT NULL,
            file TEXT NOT NULL UNIQUE,
            bytes INTEGER NOT NULL,
            record TEXT NOT NULL,
            PRIMARY KEY (document, fingerprint)
        )
        """
    )
    # numbers in names of files that lost their row because they were replaced or removed, and are about to go
    db.execute("CREATE TABLE unsettled (number TEXT PRIMARY KEY NOT NULL) WITHOUT ROWID")
    db.execute("CREATE TABLE facts (name TEXT PRIMARY KEY NOT NULL, value NOT NULL)")
    facts = {"identity": secrets.token_hex(16), "last": int(datetime.now(UTC).timestamp() * 1000), "documents": 0}
    db.table("facts").insert_all({"name": name, "value": value} for name, value in facts.items())
    db.execute("INSERT INTO facts SELECT 'bytes', coalesce(sum(bytes), 0) FROM documents")
    db.execute("UPDATE facts SET value = (SELECT count(*) FROM documents) WHERE name = 'documents'")
    named = "DELETE FROM unsettled WHERE number = substr(new.file, -24, 12)"  # ...-<number>.safetensors
    # not OR IGNORE, which is nothing to a trigger that an upsert fires
    left = "INSERT INTO unsettled SELECT substr(old.file, -24, 12) EXCEPT SELECT number FROM unsettled"
    for table, counted in (("documents", 1), ("versions", 0)):
        for event, bytes_, documents, files in (
            ("INSERT", "new.bytes", counted, named),
            ("DELETE", "-old.bytes", -counted, left),
            ("UPDATE OF bytes, file", "new.bytes - old.bytes", 0, f"{left}; {named}"),
        ):
            db.execute(
                f"""
                CREATE TRIGGER {table}_{event.split()[0].lower()} AFTER {event} ON {table} BEGIN
                    UPDATE facts SET value = value + ({bytes_}) WHERE name = 'bytes';
                    UPDATE facts SET value = value + ({documents}) WHERE name = 'documents';
                    {files};
                END
                """  # noqa: S608  # our own names
            )
    for row in list(db.query("SELECT * FROM documents")):
        db.execute("UPDATE documents SET seal = ? WHERE id = ?", [checksum(row), row["id"]])
        for name, value in properties_of(json.loads(row["metadata"]), ()):
            db.execute("INSERT INTO labels VALUES (?, ?, ?)", [name, value, row["id"]])


@migrations()
def m005_sealed_facts(db: Database) -> None:
    """Add a checksum to what does not follow from the rows, such as settings."""
    db.execute("ALTER TABLE facts ADD COLUMN seal TEXT NOT NULL DEFAULT ''")
    for fact in list(db.query("SELECT name, value FROM facts")):
        db.execute("UPDATE facts SET seal = ? WHERE name = ?", [checksum(fact), fact["name"]])


@migrations()
def m006_names(db: Database) -> None:
    """Call tables and columns as the code does."""
    db.execute("ALTER TABLE facts RENAME TO properties")
    for table in ("properties", "documents"):
        db.execute(f"ALTER TABLE {table} RENAME COLUMN seal TO checksum")


@migrations()
def m007_method(db: Database) -> None:
    """The parameters of the compression method, so that an unchanged text is known without its file."""
    db.execute("ALTER TABLE documents ADD COLUMN method TEXT")


@migrations()
def m008_words(db: Database) -> None:
    """Index texts without spaces, accents and case in a form of their own, and say which are of conversations."""
    for trigger in ("ai", "ad", "au"):
        db.execute(f"DROP TRIGGER IF EXISTS passages_{trigger}")
    db.execute("DROP TABLE passages_fts")
    db.execute("ALTER TABLE passages ADD COLUMN indexed_form TEXT")  # NULL: as it is
    made = "coalesce(indexed_form, text)"
    db.execute(f"ALTER TABLE passages ADD COLUMN indexed TEXT GENERATED ALWAYS AS ({made}) VIRTUAL")
    db.execute("ALTER TABLE passages ADD COLUMN kind TEXT")  # 'conversation', or NULL
    for values in misindexed(db):
        db.execute("UPDATE passages SET indexed_form = ?, kind = ? WHERE id = ?", values)
    db.execute(
        """
        CREATE VIRTUAL TABLE passages_fts USING fts5(
            indexed, kind, content = 'passages', content_rowid = 'id',
            tokenize = "porter unicode61 categories 'L* M* N* Co'"
        )
        """
    )
    db.execute("INSERT INTO passages_fts(passages_fts) VALUES('rebuild')")
    inserted = "INSERT INTO passages_fts(rowid, indexed, kind) VALUES (new.id, new.indexed, new.kind)"
    deleted = """
        INSERT INTO passages_fts(passages_fts, rowid, indexed, kind) VALUES ('delete', old.id, old.indexed, old.kind)
    """
    for trigger, event, done in (
        ("ai", "INSERT", inserted),
        ("ad", "DELETE", deleted),
        ("au", "UPDATE OF text, indexed_form, kind", f"{deleted}; {inserted}"),
    ):
        db.execute(f"CREATE TRIGGER passages_{trigger} AFTER {event} ON passages BEGIN {done}; END")


@migrations()
def m009_copies(db: Database) -> None:
    """Find the documents that have the same text."""
    db.execute("CREATE INDEX documents_content ON documents (content_hash)")


@migrations()
def m010_root(db: Database) -> None:
    """The hash that stands for the whole K/V file, so that no other one, such as an older one, is taken for it."""
    db.execute("ALTER TABLE documents ADD COLUMN root TEXT NOT NULL DEFAULT ''")


@migrations()
def m011_conversations(db: Database) -> None:
    """Keep the recent turns of conversations."""
    db.execute(
        """
        CREATE TABLE conversations (
            id TEXT PRIMARY KEY NOT NULL,
            turns TEXT NOT NULL,
            parts TEXT NOT NULL,
            folding TEXT NOT NULL,
            created_at TEXT NOT NULL,
            updated_at TEXT NOT NULL,
            checksum TEXT NOT NULL
        )
        """
    )


@migrations()
def m012_short_passages(db: Database) -> None:
    """Cut texts into passages so short that what is found is little more than what was sought.

    Damaged ones stay as they are, for `verify` to find.
    """
    insert = """
        INSERT INTO passages (document, ordinal, start, stop, text, indexed_form, kind) VALUES (?, ?, ?, ?, ?, ?, ?)
    """
    for id, content_hash in db.execute("SELECT id, content_hash FROM documents").fetchall():
        if (
            not isinstance(id, str)
            or printable(id) != id
            or not (text := sound_text(stored_passages(db, id), content_hash))
        ):
            continue
        cuts = split_passages(text)
        before = db.execute(
            "SELECT start, stop, kind FROM passages WHERE document = ? ORDER BY ordinal", [id]
        ).fetchall()
        if [(start, stop) for start, stop, _ in before] == cuts:
            continue
        kind = before[0][2]
        db.execute("DELETE FROM passages WHERE document = ?", [id])
        for number, (start, stop) in enumerate(cuts):
            passage = text[start:stop]
            db.execute(insert, [id, number, start, stop, passage, indexed_form(passage), kind])


@migrations()
def m013_segments(db: Database) -> None:
    """Name the files behind the first: what was appended to a document has files of its own."""
    for table in ("documents", "versions"):
        db.execute(f"ALTER TABLE {table} ADD COLUMN segments TEXT NOT NULL DEFAULT '[]'")


def _keep_texts(db: Database) -> None:
    """Cut the texts anew whose passages, joined, are not what the column holds."""
    of_one = "SELECT text FROM passages WHERE document = documents.id ORDER BY ordinal"
    joined = f"SELECT coalesce(group_concat(text, ''), '') FROM ({of_one})"  # noqa: S608  # our own words
    for (id,) in db.execute(f"SELECT id FROM documents WHERE text != ({joined})").fetchall():  # noqa: S608
        (text,) = db.execute("SELECT text FROM documents WHERE id = ?", [id]).fetchone()
        db.execute("DELETE FROM passages WHERE document = ?", [id])
        db.table("passages").insert_all(
            {"document": id, "ordinal": n, "start": start, "stop": stop, "text": text[start:stop]}
            for n, (start, stop) in enumerate(split_passages(text))
        )


def migrate(db: Database) -> None:
    """Apply the steps that `db` lacks; raises StoreError if it has steps that this version does not know."""
    known = {name for name in globals() if re.match(r"m\d{3}_", name)}
    if unknown := [step.name for step in migrations.applied(db) if step.name not in known]:
        if db.execute("PRAGMA integrity_check(1)").fetchone() != ("ok",):
            raise CorruptFileError(f"the catalog's list of changes is damaged: {', '.join(map(repr, unknown))}")
        raise StoreError(
            f"the catalog was changed by a newer beacon_memory ({', '.join(unknown)}); upgrade beacon_memory to open it"
        )
    while pending := migrations.pending(db):
        with begin_immediate(db):
            # Read again under the write lock: another process may have been faster.
            later = [step.name for step in migrations.pending(db) if step.name != pending[0].name]
            migrations.apply(db, stop_before=later)
