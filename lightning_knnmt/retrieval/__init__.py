"""Keys, values, neighbours, mixtures: what kNN-MT adds to a translation model.

A `Datastore` holds hidden states and the tokens that followed them; an `Index` finds the nearest of
them; a `Retriever` turns queries into `Neighbours`; a `Combiner` weighs those; `KNNDistribution`
mixes the result with the model's own distribution. This room imports none of the others.
"""

from lightning_knnmt.retrieval.adaptive import (
    AdaptiveCombiner,
    KNNBoxCombiner,
)
from lightning_knnmt.retrieval.auto import (
    Candidate,
    IndexReport,
    choose_index,
)
from lightning_knnmt.retrieval.checks import (
    check_integer,
    check_number,
)
from lightning_knnmt.retrieval.choice import (
    AutoChoice,
    FaissChoice,
    FlatChoice,
    IndexChoice,
    MeasuredIndex,
)
from lightning_knnmt.retrieval.combiner import (
    Combiner,
    FixedCombiner,
    Mixture,
    ModelView,
    Weighting,
    interpolate,
    neighbour_probs,
    spread,
)
from lightning_knnmt.retrieval.combiner_file import (
    VARIANTS,
    TrainedCombiner,
    load_combiner,
    save_combiner,
)
from lightning_knnmt.retrieval.combiner_training import (
    CombinerTrainer,
    CombinerTraining,
    TrainableCombiner,
    distance_offset,
)
from lightning_knnmt.retrieval.datastore import (
    DEFAULT_KEY_LAYER,
    Datastore,
    KeyLayer,
    Manifest,
    refuse_foreign_datastore,
)
from lightning_knnmt.retrieval.distribution import (
    BaseDistribution,
    KNNDistribution,
)
from lightning_knnmt.retrieval.errors import (
    CombinerError,
    DamagedDatastoreError,
    DamagedIndexError,
    DatastoreBusyError,
    DatastoreError,
    DatastoreTooLargeError,
    ForeignFilesError,
    IndexFactoryError,
    KeyRangeError,
    MissingDatastoreError,
    MissingIndexError,
    StaleDatastoreError,
    StaleIndexError,
    TruncatedDatastoreError,
)
from lightning_knnmt.retrieval.estimate import (
    IndexKind,
    SizeEstimate,
    available_memory,
    estimate_size,
    refuse_if_too_large,
)
from lightning_knnmt.retrieval.faiss_index import (
    FaissIndex,
)
from lightning_knnmt.retrieval.index import (
    FlatIndex,
    Index,
    Metric,
    check_k,
    check_metric,
)
from lightning_knnmt.retrieval.recall import (
    Truth,
    measure_recall,
    recall_at_k,
)
from lightning_knnmt.retrieval.record import (
    Record,
    Recorder,
    RecordError,
)
from lightning_knnmt.retrieval.retriever import (
    Neighbours,
    Retriever,
    keys_of,
)
from lightning_knnmt.retrieval.robust import (
    RobustCombiner,
    label_log_probs,
)
from lightning_knnmt.retrieval.writer import (
    DatastoreWriter,
    wait_for_build,
)

__all__ = [
    "DEFAULT_KEY_LAYER",
    "VARIANTS",
    "AdaptiveCombiner",
    "AutoChoice",
    "BaseDistribution",
    "Candidate",
    "Combiner",
    "CombinerError",
    "CombinerTrainer",
    "CombinerTraining",
    "DamagedDatastoreError",
    "DamagedIndexError",
    "Datastore",
    "DatastoreBusyError",
    "DatastoreError",
    "DatastoreTooLargeError",
    "DatastoreWriter",
    "FaissChoice",
    "FaissIndex",
    "FixedCombiner",
    "FlatChoice",
    "FlatIndex",
    "ForeignFilesError",
    "Index",
    "IndexChoice",
    "IndexFactoryError",
    "IndexKind",
    "IndexReport",
    "KNNBoxCombiner",
    "KNNDistribution",
    "KeyLayer",
    "KeyRangeError",
    "Manifest",
    "MeasuredIndex",
    "Metric",
    "MissingDatastoreError",
    "MissingIndexError",
    "Mixture",
    "ModelView",
    "Neighbours",
    "Record",
    "RecordError",
    "Recorder",
    "Retriever",
    "RobustCombiner",
    "SizeEstimate",
    "StaleDatastoreError",
    "StaleIndexError",
    "TrainableCombiner",
    "TrainedCombiner",
    "TruncatedDatastoreError",
    "Truth",
    "Weighting",
    "available_memory",
    "check_integer",
    "check_k",
    "check_metric",
    "check_number",
    "choose_index",
    "distance_offset",
    "estimate_size",
    "interpolate",
    "keys_of",
    "label_log_probs",
    "load_combiner",
    "measure_recall",
    "neighbour_probs",
    "recall_at_k",
    "refuse_foreign_datastore",
    "refuse_if_too_large",
    "save_combiner",
    "spread",
    "wait_for_build",
]
