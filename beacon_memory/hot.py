"""Memories that were used lately, ready for attention: on the model's device, and in RAM."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from weakref import WeakValueDictionary

import psutil
import torch

from beacon_memory.kv.memory_kv import MemoryKV, fitting_spans
from beacon_memory.kv.prefix import Prefix, Section
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.storage.files.locks import renew_in_forks

from .errors import InputError
from .results import Source

__all__ = ["HotMemories"]

_SHARE = 4  # of what is free on a device, or in RAM, this part is used
_MOST_SIZES = 100_000  # memories whose sizes are known though they are not kept
_ROOMS = 32  # interpolated memories are kept for so many different rooms, for the prompt's length changes it
_RAM = torch.device("cpu")


class HotMemories:
    """Keep memories ready for attention; those used longest ago go first, from the device to RAM, and from there.

    Threads share them: what one of them is loading, others wait for.

    limit: bytes on a device, and as many in RAM; by default a quarter of what is free there at first. 0 keeps nothing.

    Raises InputError for a limit below 0.
    """

    def __init__(self, limit: int | None = None) -> None:
        if limit is not None and limit < 0:
            raise InputError(f"hot_bytes={limit} must be at least 0; 0 keeps no memory ready")
        self._limit = limit
        self._places: dict[torch.device, _Place] = {}
        self._sizes: OrderedDict[Hashable, tuple[int, int]] = OrderedDict()
        self._renew()
        renew_in_forks(self)

    def __reduce__(self) -> tuple[type[HotMemories], tuple[int | None]]:
        """Pickle the limit; what comes out keeps nothing yet."""
        return HotMemories, (self._limit,)

    def _renew(self) -> None:
        """Replace the locks, which threads may have held when this process was forked; see `renew_in_forks`."""
        self._lock = threading.Lock()
        self._prefixes: WeakValueDictionary[tuple[Section, ...], Prefix] = WeakValueDictionary()
        self._loading: WeakValueDictionary[Hashable, threading.Lock] = WeakValueDictionary()

    def prefix(
        self, model: BeaconModel, wanted: Sequence[tuple[Hashable, Callable[[], MemoryKV]]], room: int
    ) -> tuple[Prefix, list[Source]]:
        """Return memories, one behind another, as a prefix of what is read, and where each was found; see `sections`.

        While one is in use, others of the same memories are the same, so that they are attended to together.
        """
        sections, sources = zip(*self.sections(model, wanted, room), strict=True)
        return self._prefixes.setdefault(sections, model.prefix(*sections)), list(sources)

    def sections(
        self, model: BeaconModel, wanted: Sequence[tuple[Hashable, Callable[[], MemoryKV]]], room: int
    ) -> list[tuple[Section, Source]]:
        """Return memories ready for attention, and where each was found.

        wanted: what tells a memory from every other and from its earlier versions, and what loads it.
        room:   positions for all of them together; if their spans need more, they are interpolated, see
                `MemoryKV.concat`, to a little less than the room, so that the next prompt finds them, too.
        """
        form = (model.fingerprint.digest, model.device, model.dtype, model.rope.key)
        loads = [((key, form), load) for key, load in wanted]
        read: dict[Hashable, MemoryKV] = {}
        with self._alone({key for key, _ in loads}):
            sizes = [self._size(key, load, read) for key, load in loads]
            if sum(span for span, _ in sizes) > room:
                room -= room % max(1, model.max_positions // _ROOMS)
            spans = fitting_spans(sizes, room)
            return [self._section(model, *one, span, read) for one, span in zip(loads, spans, strict=True)]

    def _size(self, key: Hashable, load: Callable[[], MemoryKV], read: dict[Hashable, MemoryKV]) -> tuple[int, int]:
        """Return span and least span of a memory, which is loaded for it where they are not known."""
        with self._lock:
            size = self._sizes.get(key)
        if size is None:
            read[key] = load()
            size = (read[key].span, read[key].least_span)
            with self._lock:
                self._sizes[key] = size
                if len(self._sizes) > _MOST_SIZES:
                    self._sizes.popitem(last=False)
        return size

    def _section(
        self, model: BeaconModel, key: Hashable, load: Callable[[], MemoryKV], span: int, read: dict[Hashable, MemoryKV]
    ) -> tuple[Section, Source]:
        device = model.device
        with self._lock:
            kept = [(self._place(place).take((key, span)), place) for place in dict.fromkeys((device, _RAM))]
        found = next(((section, place) for section, place in kept if section is not None), None)
        source: Source = "cold"
        if found is None:
            memory = (read[key] if key in read else load()).to(device, model.dtype).interpolated(span)
            # a copy, for the values may be those of a file that is mapped
            section = Section.of(replace(memory, values=memory.values.clone()), model.rope)
        else:
            section, source = found[0].to(device), "ram" if found[1] == _RAM else "device"
        with self._lock:
            gone = self._place(device).keep((key, span), section)
            if device != _RAM:
                for old, its_section in gone:
                    self._place(_RAM).keep(old, its_section.to(_RAM))
        return section, source

    def _place(self, device: torch.device) -> _Place:
        if device not in self._places:
            self._places[device] = _Place(_free(device) // _SHARE if self._limit is None else self._limit)
        return self._places[device]

    @contextlib.contextmanager
    def _alone(self, keys: Iterable[Hashable]) -> Iterator[None]:
        """Let no other thread load these; all take them in one order, so that none waits for another in a circle."""
        with contextlib.ExitStack() as held:
            for key in sorted(keys, key=repr):
                with self._lock:
                    lock = self._loading.setdefault(key, threading.Lock())
                held.enter_context(lock)
            yield


class _Place:
    """Sections on one device in the order of their last use, `limit` bytes of them."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._sections: OrderedDict[Hashable, Section] = OrderedDict()

    def take(self, key: Hashable) -> Section | None:
        """Remove a section and return it."""
        section = self._sections.pop(key, None)
        self.used -= section.nbytes if section else 0
        return section

    def keep(self, key: Hashable, section: Section) -> list[tuple[Hashable, Section]]:
        """Add a section as the one used last; returns those that have to go for it."""
        gone = []
        self._sections[key] = section
        self.used += section.nbytes
        while self.used > self.limit:
            gone.append(self._sections.popitem(last=False))
            self.used -= gone[-1][1].nbytes
        return gone


def _free(device: torch.device) -> int:
    """Return the bytes that are free on a device; of one that cannot tell, those in RAM."""
    if device.type != "cpu":
        with contextlib.suppress(RuntimeError, NotImplementedError, AttributeError):
            return int(torch.accelerator.get_memory_info(device)[0])
    return int(psutil.virtual_memory().available)
