"""Memories that were used lately, ready for attention: on the model's device, and in RAM.

Quantized ones are kept as they are, and are in the model's dtype only while they are in use.
"""

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
from beacon_memory.kv.quantize import QuantizedKV
from beacon_memory.modeling.model import BeaconModel
from beacon_memory.storage.files.locks import renew_in_forks

from .errors import InputError
from .results import Place

__all__ = ["HotMemories"]

_SHARE = 4  # of what is free on a device, or in RAM, this part is used
_MOST_SIZES = 100_000  # memories whose sizes are known though they are not kept
_ROOMS = 32  # interpolated memories are kept for so many different rooms, for the prompt's length changes it
_RAM = torch.device("cpu")
# What is kept: a memory ready for attention, or a quantized one.
_Ready = Section | QuantizedKV
_Loaded = MemoryKV | QuantizedKV


class HotMemories:
    """Keep memories ready for attention; those used longest ago go first, from the device to RAM, and from there.

    Threads share them: what one of them is loading, others wait for.

    limit: bytes on a device, and as many in RAM; by default a quarter of what is free there at first. 0 keeps nothing.
           RAM beside a CUDA device is pinned, see `kv.moving`.

    Raises InputError for a limit below 0.
    """

    def __init__(self, limit: int | None = None) -> None:
        if limit is not None and limit < 0:
            raise InputError(f"hot_bytes={limit} must be at least 0; 0 keeps no memory ready")
        self._limit = limit
        self._places: dict[torch.device, _Kept] = {}
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
        self._in_use: WeakValueDictionary[Hashable, Section] = WeakValueDictionary()  # of quantized memories
        self._loading: WeakValueDictionary[Hashable, threading.Lock] = WeakValueDictionary()

    def prefix(
        self, model: BeaconModel, wanted: Sequence[tuple[Hashable, Callable[[], _Loaded]]], room: int
    ) -> tuple[Prefix, list[Place]]:
        """Return memories, one behind another, as a prefix of what is read, and where each was found; see `sections`.

        While one is in use, others of the same memories are the same, so that they are attended to together.
        """
        sections, sources = zip(*self.sections(model, wanted, room), strict=True)
        return self._prefixes.setdefault(sections, model.prefix(*sections)), list(sources)

    def sections(
        self, model: BeaconModel, wanted: Sequence[tuple[Hashable, Callable[[], _Loaded]]], room: int
    ) -> list[tuple[Section, Place]]:
        """Return memories ready for attention, and where each was found.

        wanted: what tells a memory from every other and from its earlier versions, and what loads it.
        room:   positions for all of them together; if their spans need more, they are interpolated, see
                `MemoryKV.concat`, to a little less than the room, so that the next prompt finds them, too.
        """
        form = (model.fingerprint.digest, model.device, model.dtype, model.rope.key)
        loads = [((key, form), load) for key, load in wanted]
        read: dict[Hashable, _Loaded] = {}
        with self._alone({key for key, _ in loads}):
            sizes = [self._size(key, load, read) for key, load in loads]
            if sum(span for span, _ in sizes) > room:
                room -= room % max(1, model.max_positions // _ROOMS)
            spans = fitting_spans(sizes, room)
            return [self._section(model, *one, span, read) for one, span in zip(loads, spans, strict=True)]

    def _size(self, key: Hashable, load: Callable[[], _Loaded], read: dict[Hashable, _Loaded]) -> tuple[int, int]:
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
        self, model: BeaconModel, key: Hashable, load: Callable[[], _Loaded], span: int, read: dict[Hashable, _Loaded]
    ) -> tuple[Section, Place]:
        device = model.device
        with self._lock:  # what is quantized is not interpolated yet
            kept = [
                (self._place(place).take(name), place)
                for place in dict.fromkeys((device, _RAM))
                for name in ((key, span), key)
            ]
        ready, place = next(((one, place) for one, place in kept if one is not None), (None, None))
        source: Place = "cold" if place is None else "ram" if place == _RAM else "device"
        if ready is None:
            memory = read[key] if key in read else load()
            if isinstance(memory, QuantizedKV):
                ready = replace(memory, levels=None)  # of which nothing is left out any more
            else:
                ready = Section.of(memory.to(device, model.dtype).interpolated(span), model.rope)
        ready = ready.to(device)
        section = self._dequantized(model, (key, span), ready) if isinstance(ready, QuantizedKV) else ready
        with self._lock:
            gone = self._place(device).keep(key if isinstance(ready, QuantizedKV) else (key, span), ready)
            if device != _RAM:
                for old, its_memory in gone:
                    self._place(_RAM).keep(old, its_memory.to(_RAM))
        return section, source

    def _dequantized(self, model: BeaconModel, name: tuple[Hashable, int], memory: QuantizedKV) -> Section:
        """Return a quantized memory in the model's dtype: the same for all who use it at a time."""
        section = self._in_use.get(name)
        if section is None:
            section = Section.dequantized(memory.interpolated(name[1]), model.rope, model.dtype)
            self._in_use[name] = section
        return section

    def _place(self, device: torch.device) -> _Kept:
        if device not in self._places:
            self._places[device] = _Kept(_free(device) // _SHARE if self._limit is None else self._limit)
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


class _Kept:
    """Memories on one device in the order of their last use, `limit` bytes of them."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._memories: OrderedDict[Hashable, _Ready] = OrderedDict()

    def take(self, key: Hashable) -> _Ready | None:
        """Remove a memory and return it."""
        memory = self._memories.pop(key, None)
        self.used -= _size_of(memory) if memory else 0
        return memory

    def keep(self, key: Hashable, memory: _Ready) -> list[tuple[Hashable, _Ready]]:
        """Add a memory as the one used last; returns those that have to go for it."""
        gone = []
        self._memories[key] = memory
        self.used += _size_of(memory)
        while self.used > self.limit:
            gone.append(self._memories.popitem(last=False))
            self.used -= _size_of(gone[-1][1])
        return gone


def _size_of(memory: _Ready) -> int:
    """Return the bytes that a memory takes while it is kept."""
    return memory.nbytes + (memory.groups.nbytes if isinstance(memory, QuantizedKV) else 0)


def _free(device: torch.device) -> int:
    """Return the bytes that are free on a device; of one that cannot tell, those in RAM."""
    if device.type != "cpu":
        with contextlib.suppress(RuntimeError, NotImplementedError, AttributeError):
            return int(torch.accelerator.get_memory_info(device)[0])
    return int(psutil.virtual_memory().available)
