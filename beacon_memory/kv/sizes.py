"""How many bytes keys and values take, told from numbers alone.

An *entry* is one slot of one head; see docs/file-format.md for what a file has of it.
"""

from __future__ import annotations

from beacon_memory.documents import Precision

__all__ = ["GROUP", "group_bytes", "ready_entry_bytes", "stored_entry_bytes"]

GROUP = 64  # entries of one head whose keys share scales, see `quantize`; part of the stored form
_SCALE = 2  # bytes of a scale or zero, float16
_PLACE = 1  # of the place of an entry in its section
_NUMBER = 4  # of a position or the number of a group in RAM, int32


def stored_entry_bytes(head_dim: int, precision: Precision) -> int:
    """Return the bytes of an entry in a file: key, value, place, and of quantized ones scale and zero of the value."""
    return _codes(head_dim, precision) + _PLACE + (2 * _SCALE if precision.quantized else 0)


def ready_entry_bytes(head_dim: int, precision: Precision) -> int:
    """Return the bytes of an entry that is ready for attention, in RAM or on a device.

    A quantized one is kept as it is, with its position and group; any other is key and value, in the model's dtype.
    """
    return _codes(head_dim, precision) + (2 * _SCALE + 2 * _NUMBER if precision.quantized else 0)


def group_bytes(head_dim: int, precision: Precision) -> int:
    """Return the bytes of the scales and zeros that a group of keys shares, in a file and in RAM alike."""
    return 2 * _SCALE * head_dim if precision.quantized else 0


def _codes(head_dim: int, precision: Precision) -> int:
    return 2 * head_dim * precision.bits // 8
