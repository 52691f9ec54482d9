"""What can be wrong with a datastore, an index or a trained combiner, one class a cause."""


class DatastoreError(ValueError):
    """A datastore cannot be built, opened or used."""


class MissingDatastoreError(DatastoreError):
    """There is no finished datastore in this folder: it may simply be built."""


class TruncatedDatastoreError(DatastoreError):
    """A file's size does not match the datastore's manifest."""


class DamagedDatastoreError(DatastoreError):
    """A file's content does not match the datastore's manifest."""


class StaleDatastoreError(DatastoreError):
    """The datastore is whole, but another model or tokenizer made it."""


class ForeignFilesError(DatastoreError):
    """What would be replaced holds files that are not ours, or is no folder."""


class DatastoreTooLargeError(DatastoreError):
    """The datastore, or the index over it, does not fit on the disk or into memory."""


class DatastoreBusyError(DatastoreError):
    """Another process is building this datastore right now."""


class KeyRangeError(DatastoreError):
    """A key is not finite, or too large for float16."""


class MissingIndexError(DatastoreError):
    """There is no finished index in this folder: it may simply be built."""


class StaleIndexError(DatastoreError):
    """The index is whole, but was built over other keys or for another question."""


class DamagedIndexError(DatastoreError):
    """A file's content does not match the index's manifest."""


class MissingFaissError(DatastoreError):
    """faiss is not installed."""


class IndexFactoryError(DatastoreError):
    """The description of an index, or of its search, is none that faiss knows for these keys."""


class CombinerError(ValueError):
    """A combiner cannot be made, trained, saved or loaded."""
