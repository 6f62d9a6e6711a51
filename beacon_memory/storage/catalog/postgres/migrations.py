"""The catalog's tables in PostgreSQL, as the append-only list of steps that make them.

A step that was released is never edited: a change to the tables is a new function at the end of `STEPS`. Each runs
once, in a transaction of its own, which also records it, while no other process makes one.
"""

from __future__ import annotations

import json
import secrets
import time

from beacon_memory.documents import utc_now
from beacon_memory.errors import StoreError
from beacon_memory.storage.catalog.rows import checksum

from .connections import PostgresConnections, PostgresDatabase

__all__ = ["STEPS", "exists", "migrate"]


def m001_tables(db: PostgresDatabase) -> None:
    """Create the tables as SQLite has them after its own steps.

    `rowid` is what SQLite calls the number of a row. Ids compare by their bytes in UTF-8, that is, by code points.
    """
    db.execute(
        """
        CREATE TABLE documents (
            rowid bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
            id text COLLATE "C" PRIMARY KEY,
            file text COLLATE "C" NOT NULL UNIQUE,
            content_hash text NOT NULL,
            fingerprint text NOT NULL,
            compression text NOT NULL,
            precision text NOT NULL,
            tokens bigint NOT NULL,
            slots bigint NOT NULL,
            bytes bigint NOT NULL,
            ratios text NOT NULL,
            metadata text NOT NULL,
            tags text NOT NULL,
            pinned integer NOT NULL,
            expires_at text COLLATE "C",
            created_at text NOT NULL,
            updated_at text COLLATE "C" NOT NULL,
            used_at bigint NOT NULL,
            method text,
            root text NOT NULL,
            segments text NOT NULL,
            checksum text NOT NULL
        );
        CREATE INDEX documents_used ON documents (pinned, used_at);
        CREATE INDEX documents_expiring ON documents (expires_at) WHERE expires_at IS NOT NULL;
        CREATE INDEX documents_content ON documents (content_hash);
        CREATE TABLE labels (
            name text COLLATE "C" NOT NULL,
            value text COLLATE "C" NOT NULL,
            document text COLLATE "C" NOT NULL REFERENCES documents(id) ON DELETE CASCADE,
            PRIMARY KEY (name, value, document)
        );
        CREATE INDEX labels_document ON labels (document);
        CREATE TABLE versions (
            rowid bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
            document text COLLATE "C" NOT NULL REFERENCES documents(id) ON DELETE CASCADE,
            fingerprint text COLLATE "C" NOT NULL,
            file text COLLATE "C" NOT NULL UNIQUE,
            bytes bigint NOT NULL,
            segments text NOT NULL,
            record text NOT NULL,
            PRIMARY KEY (document, fingerprint)
        );
        CREATE TABLE conversations (
            rowid bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
            id text COLLATE "C" PRIMARY KEY,
            turns text NOT NULL,
            parts text NOT NULL,
            folding text NOT NULL,
            created_at text NOT NULL,
            updated_at text NOT NULL,
            checksum text NOT NULL
        );
        CREATE TABLE properties (name text PRIMARY KEY, value text NOT NULL, checksum text NOT NULL DEFAULT '')
        """
    )
    for name, value in {
        "identity": secrets.token_hex(16),
        "last": int(time.time() * 1000),
        "documents": 0,
        "bytes": 0,
    }.items():
        kept = [name, json.dumps(value), checksum({"name": name, "value": value})]
        db.execute("INSERT INTO properties (name, value, checksum) VALUES (?, ?, ?)", kept)


def m002_files(db: PostgresDatabase) -> None:
    """Count bytes and documents, and know the files that have lost their row, or have not got one yet.

    unsettled: numbers in names of files whose row was replaced or removed, and that are about to go
    begun:     numbers of files that some machine is storing; they go when a row names the file
    """
    db.execute(
        """
        CREATE TABLE unsettled (number text PRIMARY KEY);
        CREATE TABLE begun (number text PRIMARY KEY);
        CREATE FUNCTION count_files() RETURNS trigger LANGUAGE plpgsql AS $$
        DECLARE
            more bigint := 0;
            documents integer := 0;
        BEGIN
            IF TG_OP <> 'INSERT' THEN
                more := more - OLD.bytes;
                documents := documents - 1;
                INSERT INTO unsettled VALUES (left(right(OLD.file, 24), 12)) ON CONFLICT DO NOTHING;
            END IF;
            IF TG_OP <> 'DELETE' THEN
                more := more + NEW.bytes;
                documents := documents + 1;
                DELETE FROM unsettled WHERE number = left(right(NEW.file, 24), 12);
                DELETE FROM begun WHERE number = left(right(NEW.file, 24), 12);
                IF NEW.segments <> '[]' THEN
                    DELETE FROM begun WHERE number IN (
                        SELECT left(right(name, 24), 12) FROM json_array_elements_text(CAST(NEW.segments AS json)) name
                    );
                END IF;
            END IF;
            IF more <> 0 THEN
                UPDATE properties SET value = CAST(CAST(value AS bigint) + more AS text) WHERE name = 'bytes';
            END IF;
            IF documents <> 0 AND TG_TABLE_NAME = 'documents' THEN
                UPDATE properties SET value = CAST(CAST(value AS bigint) + documents AS text) WHERE name = 'documents';
            END IF;
            RETURN NULL;
        END $$;
        CREATE TRIGGER count_documents AFTER INSERT OR DELETE OR UPDATE OF bytes, file, segments ON documents
            FOR EACH ROW EXECUTE FUNCTION count_files();
        CREATE TRIGGER count_versions AFTER INSERT OR DELETE OR UPDATE OF bytes, file, segments ON versions
            FOR EACH ROW EXECUTE FUNCTION count_files()
        """
    )


def m003_passages(db: PostgresDatabase) -> None:
    """Keep the texts in passages, with the words of each and how often it holds them.

    lengths: one row, how many passages there are and how many words all of them have, for BM25.
    """
    db.execute(
        """
        CREATE SEQUENCE passage_ids;
        CREATE TABLE passages (
            id bigint PRIMARY KEY,
            document text COLLATE "C" NOT NULL REFERENCES documents(id) ON DELETE CASCADE,
            ordinal integer NOT NULL,
            start integer NOT NULL,
            stop integer NOT NULL,
            text text NOT NULL,
            length integer NOT NULL,
            kind text,
            UNIQUE (document, ordinal)
        );
        CREATE TABLE words (word text COLLATE "C" NOT NULL, passage bigint NOT NULL, count integer NOT NULL);
        CREATE UNIQUE INDEX words_word ON words (word, passage) INCLUDE (count);
        CREATE INDEX words_passage ON words (passage);
        CREATE TABLE lengths (passages bigint NOT NULL, words bigint NOT NULL);
        INSERT INTO lengths VALUES (0, 0);
        CREATE FUNCTION count_passages() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF TG_OP = 'INSERT' THEN
                UPDATE lengths l SET passages = l.passages + n, words = l.words + sum
                    FROM (SELECT count(*) AS n, coalesce(sum(length), 0) AS sum FROM come) c WHERE n > 0;
            ELSE
                UPDATE lengths l SET passages = l.passages - n, words = l.words - sum
                    FROM (SELECT count(*) AS n, coalesce(sum(length), 0) AS sum FROM gone) g WHERE n > 0;
                DELETE FROM words USING gone WHERE words.passage = gone.id;
            END IF;
            RETURN NULL;
        END $$;
        CREATE TRIGGER passages_come AFTER INSERT ON passages REFERENCING NEW TABLE AS come
            FOR EACH STATEMENT EXECUTE FUNCTION count_passages();
        CREATE TRIGGER passages_go AFTER DELETE ON passages REFERENCING OLD TABLE AS gone
            FOR EACH STATEMENT EXECUTE FUNCTION count_passages()
        """
    )


STEPS = (m001_tables, m002_files, m003_passages)


def exists(connections: PostgresConnections) -> bool:
    """Tell whether a schema has a catalog."""
    with connections.use() as db:
        return bool(_applied(db, connections.schema))


def migrate(connections: PostgresConnections) -> None:
    """Apply the steps that a schema lacks; raises StoreError if it has steps that this version does not know."""
    known = [step.__name__ for step in STEPS]
    with connections.use() as db:
        applied = _applied(db, connections.schema)
    if unknown := sorted(applied - set(known)):
        raise StoreError(
            f"the catalog was changed by a newer beacon_memory ({', '.join(unknown)}); upgrade beacon_memory to open it"
        )
    for step in STEPS:
        if step.__name__ in applied:
            continue
        with connections.transaction() as db:
            if step.__name__ in _applied(db, connections.schema):  # another process has been faster
                continue
            db.execute(
                f"""
                CREATE SCHEMA IF NOT EXISTS {connections.schema};
                CREATE TABLE IF NOT EXISTS migrations (name text PRIMARY KEY, applied_at text NOT NULL)
                """
            )
            step(db)
            db.execute("INSERT INTO migrations VALUES (?, ?)", [step.__name__, utc_now()])


def _applied(db: PostgresDatabase, schema: str) -> set[str]:
    """Return the names of the steps that a schema has."""
    (table,) = db.execute("SELECT to_regclass(?)", [f"{schema}.migrations"]).fetchone()
    return {name for (name,) in db.execute("SELECT name FROM migrations").fetchall()} if table else set()
