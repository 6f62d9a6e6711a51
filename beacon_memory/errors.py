"""Every exception that beacon_memory raises on purpose.

BeaconMemoryError
├── ConfigError (ValueError)           a setting is out of range, or settings contradict each other
├── InputError (ValueError)            a document, question or option cannot be used as it is
│   ├── UnsupportedFormatError         a file is of a format that is not read
│   └── UnreadableFileError            a file is damaged, locked or has no text
├── CapacityError (ValueError)         memory, prompt and answer together exceed the model's positions
├── MissingDependencyError (ImportError)   an optional package is not installed
├── ClusterError                    a Ray cluster cannot be reached, or has given up on a job
├── ServerError                     a server refused what a command asked of it, or cannot be reached
├── ModelError
│   ├── UnsupportedModelError          the base model cannot carry beacons
│   └── AdapterError                   an adapter is missing, damaged or made for another base
└── StoreError
    ├── DocumentNotFoundError (LookupError)   no document is stored under this id
    ├── CorruptFileError               a stored file is damaged, or was not written by this package
    │   ├── MissingFileError           a row names a file that is not there
    │   └── MismatchedFileError        a row names a file of another document
    ├── ConflictError                  another process has changed the document in the meantime
    ├── QuotaError                     there is no room for a document
    └── FingerprintMismatchError       stored K/V were made by another model, adapter or setting
"""

__all__ = [
    "AdapterError",
    "BeaconMemoryError",
    "CapacityError",
    "ClusterError",
    "ConfigError",
    "ConflictError",
    "CorruptFileError",
    "DocumentNotFoundError",
    "FingerprintMismatchError",
    "InputError",
    "MismatchedFileError",
    "MissingDependencyError",
    "MissingFileError",
    "ModelError",
    "QuotaError",
    "ServerError",
    "StoreError",
    "UnreadableFileError",
    "UnsupportedFormatError",
    "UnsupportedModelError",
]


_LONGEST = 2000  # characters of a message: it may quote what somebody gave, such as an id of any length


class BeaconMemoryError(Exception):
    """Base class of all errors of this package."""

    def __str__(self) -> str:
        """Return the message; of one that is too long to be read, beginning and end."""
        message = super().__str__()
        if len(message) <= _LONGEST:
            return message
        return f"{message[: _LONGEST * 2 // 3]} ... {message[-_LONGEST // 4 :]}"


class ConfigError(BeaconMemoryError, ValueError):
    """A setting is out of range, or settings contradict each other."""


class InputError(BeaconMemoryError, ValueError):
    """A document, question or option cannot be used as it is."""


class UnsupportedFormatError(InputError):
    """A file is of a format that is not read."""


class UnreadableFileError(InputError):
    """A file of a format that is read is damaged, locked, or has no text."""


class CapacityError(BeaconMemoryError, ValueError):
    """Memory, prompt and answer together exceed the positions of the model."""


class MissingDependencyError(BeaconMemoryError, ImportError):
    """An optional package is not installed."""


class ClusterError(BeaconMemoryError):
    """A Ray cluster cannot be reached, or has given up on a job."""


class ServerError(BeaconMemoryError):
    """A server refused what a command asked of it, or cannot be reached."""


class ModelError(BeaconMemoryError):
    """A model or adapter cannot be used."""


class UnsupportedModelError(ModelError):
    """The base model cannot carry beacons."""


class AdapterError(ModelError):
    """An adapter is missing, damaged or made for another base model."""


class StoreError(BeaconMemoryError):
    """The store of documents cannot do what was asked."""


class DocumentNotFoundError(StoreError, LookupError):
    """No document is stored under this id."""


class CorruptFileError(StoreError):
    """A stored file is damaged or was not written by this package."""


class MissingFileError(CorruptFileError):
    """A row names a file that is not there."""


class MismatchedFileError(CorruptFileError):
    """A row names a file of another document."""


class ConflictError(StoreError):
    """Another thread or process has changed or removed a document between reading and writing it."""


class QuotaError(StoreError):
    """There is no room for a document within the quota, even if all others that may go are evicted."""


class FingerprintMismatchError(StoreError):
    """Stored K/V were made by another model, adapter or setting than the loaded one."""
