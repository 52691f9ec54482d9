"""Keys, values, neighbours, mixtures: what kNN-MT adds to a translation model.

A `Datastore` holds hidden states and the tokens that followed them; an `Index` finds the nearest of
them; a `Retriever` turns queries into `Neighbours`; a `Combiner` weighs those; `KNNDistribution`
mixes the result with the model's own distribution. `Retrieval.prepare` makes all of that ready for
a model. Nothing here knows Lightning.
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
from lightning_knnmt.retrieval.building import (
    DatastorePlan,
    EntryRows,
    OtherText,
    check_buildable,
    ensure_datastore,
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
    DistanceCombiner,
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
    Manifest,
    reject_foreign_datastore,
)
from lightning_knnmt.retrieval.distribution import (
    BaseDistribution,
    Evidence,
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
    reject_if_too_large,
)
from lightning_knnmt.retrieval.faiss_index import (
    FaissIndex,
)
from lightning_knnmt.retrieval.fitting import (
    CombinerChoice,
    FittedCombiner,
    TuningText,
    output_digest,
)
from lightning_knnmt.retrieval.index import (
    FlatIndex,
    Index,
    Metric,
    check_k,
    check_metric,
)
from lightning_knnmt.retrieval.learned import LearnedCombiner
from lightning_knnmt.retrieval.prepare import Retrieval, RetrievalPlan
from lightning_knnmt.retrieval.ranks import OtherRankError, gathered, rank_zero_first
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
    LocalSource,
    Neighbours,
    Retriever,
    Source,
)
from lightning_knnmt.retrieval.robust import (
    RobustCombiner,
    label_log_probs,
)
from lightning_knnmt.retrieval.saved import (
    SavedSystemError,
    Settings,
    open_retrieval,
    packed_parts,
    settings_of,
)
from lightning_knnmt.retrieval.teacher_forcing import (
    LabelledStates,
    Precision,
    batches_of,
    evaluating,
    fingerprint,
    teacher_forced,
)
from lightning_knnmt.retrieval.tuned import TunedCombiner
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
    "CombinerChoice",
    "CombinerError",
    "CombinerTrainer",
    "CombinerTraining",
    "DamagedDatastoreError",
    "DamagedIndexError",
    "Datastore",
    "DatastoreBusyError",
    "DatastoreError",
    "DatastorePlan",
    "DatastoreTooLargeError",
    "DatastoreWriter",
    "DistanceCombiner",
    "EntryRows",
    "Evidence",
    "FaissChoice",
    "FaissIndex",
    "FittedCombiner",
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
    "KeyRangeError",
    "LabelledStates",
    "LearnedCombiner",
    "LocalSource",
    "Manifest",
    "MeasuredIndex",
    "Metric",
    "MissingDatastoreError",
    "MissingIndexError",
    "Mixture",
    "ModelView",
    "Neighbours",
    "OtherRankError",
    "OtherText",
    "Precision",
    "Record",
    "RecordError",
    "Recorder",
    "Retrieval",
    "RetrievalPlan",
    "Retriever",
    "RobustCombiner",
    "SavedSystemError",
    "Settings",
    "SizeEstimate",
    "Source",
    "StaleDatastoreError",
    "StaleIndexError",
    "TrainableCombiner",
    "TrainedCombiner",
    "TruncatedDatastoreError",
    "Truth",
    "TunedCombiner",
    "TuningText",
    "Weighting",
    "available_memory",
    "batches_of",
    "check_buildable",
    "check_integer",
    "check_k",
    "check_metric",
    "check_number",
    "choose_index",
    "distance_offset",
    "ensure_datastore",
    "estimate_size",
    "evaluating",
    "fingerprint",
    "gathered",
    "interpolate",
    "label_log_probs",
    "load_combiner",
    "measure_recall",
    "neighbour_probs",
    "open_retrieval",
    "output_digest",
    "packed_parts",
    "rank_zero_first",
    "recall_at_k",
    "reject_foreign_datastore",
    "reject_if_too_large",
    "save_combiner",
    "settings_of",
    "spread",
    "teacher_forced",
    "wait_for_build",
]
