"""The index of a store in PostgreSQL, which many machines read and write. Needs psycopg (the extra `postgres`)."""
