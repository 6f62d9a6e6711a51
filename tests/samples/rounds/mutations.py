"""Bytes, files and whole folders of a store are changed behind its back, as disks, copies and people do it.

Until a repair, what is read is right, or an error, or missing, and then `verify` finds something; what the catalog's
last commits said may be as it was before them. After a repair all is there again, but for K/V that were hurt: then the
text is there. What was removed cannot be read at any time, unless somebody has put back a file of it.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from crashing import copied
from damage import KINDS, Damage
from kv_samples import FINGERPRINT, same, write_kv_file
from store_samples import kept_text
from workload import State, after, document, label, look, perform, words

from beacon_memory.conversation import Conversation
from beacon_memory.errors import BeaconMemoryError, CorruptFileError
from beacon_memory.kv.memory_kv import MemoryKV
from beacon_memory.storage.archive import export_documents, import_documents
from beacon_memory.storage.files.kv_file import read_kv_file
from beacon_memory.storage.files.stored_kv import with_precision
from beacon_memory.storage.repair import RECOMPRESSED, repair, verify
from beacon_memory.storage.store import MemoryStore

SCENES = 10  # of a round
NAMESPACES = ("", "other")
OLD_MODEL = replace(FINGERPRINT, adapter="old")
QUOTA = 10**12
OLD_TURN, TURN = "a conversation", "a conversation goes on"

Documents = dict[str, State]
Read = TypeVar("Read")


class World:
    """A store, and what is acknowledged of each of its namespaces.

    states: the documents as they are. past: all that each of them ever was.
    """

    def __init__(self, folder: Path, files: str | None = None) -> None:
        self.folder = folder
        self.stores = {name: MemoryStore(folder, name, files=files) for name in NAMESPACES}
        self.states: dict[str, Documents] = {name: {} for name in NAMESPACES}
        self.past: dict[str, dict[str, set[State]]] = {name: {} for name in NAMESPACES}

    def do(self, namespace: str, *operation: str) -> None:
        """Change a document, and note what it is now."""
        assert perform(self.stores[namespace], operation)
        self.note(namespace, after(self.states[namespace], operation))

    def note(self, namespace: str, states: Documents) -> None:
        self.states[namespace] = states
        for id, state in states.items():
            self.past[namespace].setdefault(id, set()).add(state)

    def close(self) -> None:
        for store in self.stores.values():
            store.close()


def fill(world: World, rng: random.Random, older: Path) -> None:
    """Give a store a past; leaves a copy of what it was before its last changes, which may be in the catalogs' logs."""

    def version() -> str:
        return str(rng.getrandbits(30))

    world.stores[""].configure(quota=QUOTA)
    for name, store in world.stores.items():
        header, kv, text = document("renewed", "7")
        store.put(replace(header, fingerprint=OLD_MODEL), kv, text)
        store.put(header, kv, text, keep_version=True)
        world.note(name, {"renewed": State("7", "")})
        store.close()  # what is done to its K/V is in no log
        for id in ("same", "changed", "labelled", "removed", "old name"):
            world.do(name, "put", id, version())
        for id in ("grown", "narrow"):
            world.do(name, "put", id, version())
            world.do(name, "append", id, version())
        world.do(name, "convert", "narrow")
        world.do(name, "append", "narrow", version())
        talk(store, OLD_TURN)
    copied(world.folder, older)
    for name in world.stores:
        world.do(name, "put", "changed", version())
        world.do(name, "append", "grown", version())
        world.do(name, "append", "grown", version())
        world.do(name, "update", "labelled", version())
        world.do(name, "rename", "old name", "new name")
        world.do(name, "delete", "removed")
        world.do(name, "put", "new", version())
        talk(world.stores[name], TURN)


FILES = {
    "K/V": "kv/*/*.safetensors",
    "label": "kv/*/*.json",
    "catalog": "catalog.sqlite3",
    "log": "catalog.sqlite3-wal",
    "index of the log": "catalog.sqlite3-shm",
    "settings": "settings.json",
    "conversation": "sessions/*.json",
    "lock": "*.lock",
    "cached file": "cache/kv/*/*",
}
FOLDERS = {name: name for name in ("kv", "kv/*", "sessions", "cache", "cache/kv", "cache/kv/*")}


@dataclass
class Scene:
    """What mutations are done to: the folder of a namespace, a copy of it of before, and what chance wants.

    other: the folder of the other namespace.
    undo:  what makes room for what was there, where something that is no file or folder of ours took its place.
    """

    folder: Path
    older: Path
    other: Path
    rng: random.Random
    undo: list[Callable[[], object]] = field(default_factory=list)

    def some(self, pattern: str, count: int) -> list[Path]:
        """So many files or folders, each another; raises ValueError if there are not as many."""
        return self.rng.sample(sorted(self.folder.glob(pattern)), count)

    def one(self, pattern: str) -> Path:
        return self.some(pattern, 1)[0]

    def then(self, path: Path) -> Path:
        """Where a file or folder lay before."""
        return self.older / path.relative_to(self.folder)


def damage(scene: Scene, pattern: str) -> None:
    path, rng = scene.one(pattern), scene.rng
    what = Damage(rng.choice(KINDS), rng.random(), rng.choice([1, 2, 4, 16, 100, 1000]), rng.getrandbits(16))
    if data := path.read_bytes():
        path.write_bytes(what.done_to(data))


def empty(scene: Scene, pattern: str) -> None:
    scene.one(pattern).write_bytes(b"")


def remove(scene: Scene, pattern: str) -> None:
    path = scene.one(pattern)
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def put_back(scene: Scene, pattern: str) -> None:
    """Put what was there before in place of something, also if that is gone."""
    then = scene.rng.choice(sorted(scene.older.glob(pattern)))
    now = scene.folder / then.relative_to(scene.older)
    if then.is_dir():
        copied(then, now)
    else:
        now.parent.mkdir(exist_ok=True, parents=True)
        shutil.copyfile(then, now)


def swap(scene: Scene, pattern: str) -> None:
    one, other = scene.some(pattern, 2)
    exchange(one, other)
    if any(path.is_dir() != (pattern in FOLDERS) for path in (one, other)):  # what obstructs is taken away where it was
        scene.undo.append(lambda: exchange(one, other))


def exchange(one: Path, other: Path) -> None:
    """Let two files or folders change places."""
    between = one.with_name("between")
    one.rename(between)
    other.rename(one)
    between.rename(other)


def copy_over(scene: Scene, pattern: str) -> None:
    one, other = scene.some(pattern, 2)
    shutil.copyfile(one, other)


def mix_up(scene: Scene, pattern: str) -> None:
    """Put a file of another kind in place of one."""
    path = scene.one(pattern)
    shutil.copyfile(scene.one(scene.rng.choice(list(FILES.values()))), path)


def link(scene: Scene, pattern: str) -> None:
    """Move something elsewhere, and put a link in its place."""
    path, elsewhere = scene.one(pattern), scene.older / f"linked {len(scene.undo)}"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)

    def undo() -> None:
        if path.is_symlink():
            path.unlink()
            elsewhere.rename(path)

    scene.undo.append(undo)


def obstruct(scene: Scene, pattern: str) -> None:
    """Put a folder in place of a file, or a file in place of a folder."""
    path = scene.one(pattern)
    remove(replace(scene, folder=path.parent), path.name)
    if pattern in FOLDERS:
        path.write_bytes(b"no folder")
    else:
        path.mkdir()
    scene.undo.append(lambda: remove(replace(scene, folder=path.parent), path.name))


def bring_from_other(scene: Scene, pattern: str) -> None:
    """Copy something of the other namespace to where it would lie in this one."""
    theirs = scene.rng.choice(sorted(scene.other.glob(pattern)))
    if pattern in (FILES["catalog"], FILES["log"]):  # then it is that of the other: nothing is damaged, but misplaced
        ours = {path: path.read_bytes() for path in scene.folder.glob("catalog.sqlite3*")}

        def undo() -> None:
            for path in scene.folder.glob("catalog.sqlite3*"):
                path.unlink()
            for path, data in ours.items():
                path.write_bytes(data)

        scene.undo.append(undo)
    put_back(replace(scene, older=scene.other), theirs.relative_to(scene.other).as_posix())


def same_text(scene: Scene, pattern: str) -> None:
    """Put in place of a K/V file an older one, of the same text."""
    path = scene.one(pattern)
    file = read_kv_file(path)
    if not isinstance(file.kv, MemoryKV):
        raise ValueError("its K/V are quantized")
    write_kv_file(path, file.header, replace(file.kv, values=file.kv.values.flip(0)), file.text)


def mutations_of(patterns: Mapping[str, str], *acts: Callable[..., None]) -> dict[str, Callable[[Scene], None]]:
    return {
        f"{act.__name__} {kind}": partial(act, pattern=pattern) for kind, pattern in patterns.items() for act in acts
    }


MUTATIONS = {
    **mutations_of(FILES, damage, empty, remove, put_back, swap, copy_over, mix_up, link, obstruct, bring_from_other),
    **mutations_of(FOLDERS, remove, put_back, swap, link, obstruct, bring_from_other),
    **mutations_of({"K/V": FILES["K/V"]}, same_text),
}
DAMAGE = [name for name in MUTATIONS if name.startswith("damage")]
OF_THE_CACHE = [name for name in MUTATIONS if "cache" in name and not name.startswith(("link", "obstruct"))]
OF_THE_CATALOG = [name for name in MUTATIONS if name.endswith(("catalog", "log"))]


def mutations(folder: Path, seed: int) -> int:
    """Mutate copies of a store, or of an archive, and look what comes of it; returns how many mutations."""
    rng = random.Random(seed)
    place = folder / "world"
    files = (place / "bucket").as_uri() if rng.random() < 0.2 else None
    world = World(place / "store", files)
    fill(world, rng, folder / "older")
    if rng.random() < 0.5:  # else the last commits are in the logs
        world.close()
    template = copied(place, folder / "template")
    older = copied(folder / "older", folder / "older template")
    done = of_an_archive(world, folder, rng) if rng.random() < 0.2 else 0
    world.close()
    for number in range(1, SCENES + 1):
        copied(template, place)
        copied(older, folder / "older")
        name, other = rng.sample(NAMESPACES, 2)
        ours, theirs = world.stores[name].folder, world.stores[other].folder
        scene = Scene(ours, folder / "older" / ours.relative_to(world.folder), theirs, rng)
        mutated = mutate(scene)
        done += len(mutated)
        try:
            check(world, name, mutated, scene)
            id, state = rng.choice(list(world.states[other].items()))
            assert look(world.stores[other], id) == state
        except BaseException as error:
            error.add_note(f"after mutations of {name!r} in scene {number}: {', '.join(mutated)}")
            raise
        finally:
            world.close()
    return done


def mutate(scene: Scene) -> list[str]:
    """Do one mutation of the catalog, or several of all else, or of the cache alone; returns their names."""
    done: list[str] = []
    count = scene.rng.randint(1, 8)
    cache = (scene.folder / "cache").is_dir() and scene.rng.random() < 0.5
    names = OF_THE_CACHE if cache else list(MUTATIONS)
    while not done or (len(done) < count and done[0] not in OF_THE_CATALOG):
        name = scene.rng.choice(DAMAGE if not cache and scene.rng.random() < 0.5 else names)
        if not done or name not in OF_THE_CATALOG:
            with suppress(ValueError, IndexError, OSError, CorruptFileError):  # there is none, or none that is whole
                MUTATIONS[name](scene)
                done.append(name)
    return done


def check(world: World, namespace: str, mutated: Sequence[str], scene: Scene) -> None:
    """What a mutated store says is right, it is noticed what is missing, and a repair brings back what it can."""
    store, states = world.stores[namespace], world.states[namespace]
    before = mutated[0] in OF_THE_CATALOG
    past = world.past[namespace] if before else {id: {state} for id, state in states.items()}
    missed = survey(store, states, past)
    assert tried(lambda: verify(store)) or not missed, f"verify does not notice that there is no {missed}"
    assert not missed or not all(name in OF_THE_CACHE for name in mutated), missed
    repaired = tried(lambda: repair(store))
    if isinstance(repaired, BeaconMemoryError) or not all(problem.mended for problem in repaired):
        store.close()
        for undo in reversed(scene.undo):
            with suppress(OSError, ValueError):  # of what lies in a folder that is gone, too
                undo()
        repair(store)
    assert_back(store, states, mutated)


def of_an_archive(world: World, folder: Path, rng: random.Random) -> int:
    """Mutate an archive, which is then taken as it was, or refused as damaged; returns how many times."""
    archive = folder / "archive"
    export_documents(world.stores[""], archive)
    data, states = archive.read_bytes(), world.states[""]
    for _ in range(SCENES):
        damage(Scene(folder, folder, folder, rng), archive.name)
        with MemoryStore(folder / "imported") as store:
            try:
                import_documents(store, archive)
            except CorruptFileError:
                assert store.list() == []
            else:
                assert {row.id: look(store, row.id) for row in store.list()} == states
        shutil.rmtree(store.folder, ignore_errors=True)
        archive.write_bytes(data)
    return SCENES


def survey(store: MemoryStore, states: Documents, past: Mapping[str, set[State]]) -> list[object]:
    """Read all; fails if something is wrong. Returns what could not be read, or was not all.

    past: what may be read of each document.
    """
    missed: list[object] = []

    def attempt(what: object, read: Callable[[], Read], expected: Read) -> Read | None:
        """What is read, None if it is an error."""
        result = tried(read)
        if isinstance(result, BeaconMemoryError) or result != expected:
            missed.append((what, result))
        return None if isinstance(result, BeaconMemoryError) else result

    for id, state in states.items():
        assert attempt(id, lambda: look(store, id, still=False), state) in (None, *past[id])  # noqa: B023
        texts = [text_of(one) for one in past[id]]
        assert attempt(id, lambda: store.text(id), text_of(state)) in (None, *texts)  # noqa: B023
        hits = attempt(id, lambda: search(store, state), [(id, text_of(state))])  # noqa: B023
        assert all(text in texts for found, text in hits or () if found == id)
    rows = attempt("rows", lambda: {row.id: row.label for row in store.list()}, labels_of(states))
    for id, found in (rows or {}).items():
        assert id in past
        assert found in [label(one.label) for one in past[id]]
    said = attempt("conversation", lambda: turn(store), f"{TURN} in {store.namespace!r}")
    assert said in (None, f"{TURN} in {store.namespace!r}", f"{OLD_TURN} in {store.namespace!r}")
    attempt("totals", lambda: store.totals().documents, len(states))
    attempt("settings", lambda: store.settings.quota, QUOTA)
    kept = tried(lambda: store.read("renewed", OLD_MODEL.digest)[1].text)
    assert isinstance(kept, BeaconMemoryError) or kept == text_of(states["renewed"])
    for id in past.keys() - states.keys():
        if store.parts.given is None:  # else nobody is asked whether a file is there
            assert isinstance(tried(lambda: store.text(id)), BeaconMemoryError)  # noqa: B023
        assert isinstance(tried(lambda: store.get(id)), BeaconMemoryError)  # noqa: B023
    return missed


def assert_back(store: MemoryStore, states: Documents, mutated: Sequence[str]) -> None:
    """All is there after a repair, but for K/V that were hurt, and can be written anew.

    What was removed has not come back, unless an old file of it was put back.
    """
    if any(name.startswith(("put_back", "bring_from_other")) for name in mutated):
        remove_strangers(store)
    left = verify(store)
    assert {problem.kind for problem in left} <= RECOMPRESSED, left
    hurt = {problem.document for problem in left}
    for row in store.list():
        if row.id not in states:
            read = tried(lambda: store.get(row.id))  # noqa: B023
            put_back = any(name.startswith("put_back") for name in mutated)
            assert put_back or isinstance(read, BeaconMemoryError), f"{row.id!r} has come back"
            store.delete(row.id)
    for id, state in states.items():
        if id in hurt:
            header, kv, text = document(id, state.content)
            read = tried(lambda: store.read(id)[1].kv)  # noqa: B023
            stored = with_precision(kv, state.precision, header.window_starts)
            assert isinstance(read, CorruptFileError) or same(read, stored)
            assert kept_text(store, id) == text
            assert store.row(id).label == label(state.label)
            store.put(header, kv, text, label(state.label), precision=state.precision)
        assert look(store, id) == state, f"{id!r} is not what it was"
    assert {row.id for row in store.list()} == states.keys()
    assert turn(store) == f"{TURN} in {store.namespace!r}"
    assert store.settings.quota == QUOTA
    assert verify(store) == []


def remove_strangers(store: MemoryStore) -> None:
    """Remove files that were brought from elsewhere and have no place here, which a repair leaves to people."""
    while strangers := [problem for problem in verify(store) if problem.kind in ("orphan-file", "lost-row")]:
        for problem in strangers:
            assert store.files.remove(str(problem.path))


def talk(store: MemoryStore, content: str) -> None:
    """Let the last turn of a conversation be this one, in its namespace."""
    turns = [{"role": "user", "content": f"{content} in {store.namespace!r}"}]
    store.conversations.put(Conversation("talk", turns))


def turn(store: MemoryStore) -> str | None:
    """The last turn of the conversation, None if there is none."""
    found = store.conversations.get("talk")
    return None if found is None else found.turns[-1]["content"]


def text_of(state: State) -> str:
    return document("any", state.content)[2]


def labels_of(states: Documents) -> dict[str, object]:
    return {id: label(state.label) for id, state in states.items()}


def search(store: MemoryStore, state: State) -> list[tuple[str, str]]:
    return [(hit.document, hit.text) for hit in store.search(words(state.content))]


def tried(read: Callable[[], Read]) -> Read | BeaconMemoryError:
    """What `read` returns, or which of our errors it raises; any other one is a failure."""
    try:
        return read()
    except BeaconMemoryError as error:
        return error
