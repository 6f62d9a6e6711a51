# Recipes for development; CI calls the same ones. `just` comes with the dev extra (rust-just).

_default:
    @just --list

# Everything that CI checks, in the order of its cost.
check: lint contracts types docs test

# Style and likely bugs.
lint:
    ruff check
    ruff format --check

# Repair what ruff can repair.
format:
    ruff check --fix
    ruff format

# Static types.
types:
    mypy

# Imports point one way.
contracts:
    lint-imports --no-cache

# The site of docs/ and of the docstrings, into site/; a broken link or anchor fails (not with --quiet, which hides it).
docs *args:
    NO_MKDOCS_2_WARNING=1 mkdocs build --strict {{ args }}

# Tests on all cores; `just test -m "not slow"` leaves out those that need the default model.
test *args:
    pytest -n logical --dist worksteal {{ args }}

# A store under kills, power cuts, mutations, failing calls and many processes: `just torture --minutes 60 --seed 1`.
torture *args:
    python tests/samples/torture.py {{ args }}

# Speed and quality figures.
bench *args:
    beacon-memory bench {{ args }}

# Renew constraints.txt with the newest versions that resolve in a clean environment, beside the torch release given.
constraints torch="2.13.0":
    #!/usr/bin/env bash
    set -euo pipefail
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install 'torch=={{ torch }}' '.[dev]'
    # pip itself stays free, and torch's local label (+cpu) goes, so that any build of that release will do.
    {
        grep '^#' constraints.txt
        "$work/venv/bin/pip" freeze --all --exclude pip --exclude beacon-memory | sed 's/+[a-z0-9.]*$//'
    } > "$work/constraints.txt"
    cp "$work/constraints.txt" constraints.txt
