"""Keys, values, neighbours, mixtures: what kNN-MT adds to a translation model.

A `Datastore` holds hidden states and the tokens that followed them; an `Index` finds the nearest of
them; a `Retriever` turns queries into `Neighbours`; a `Combiner` weighs those; `KNNDistribution`
mixes the result with the model's own distribution. `Retrieval.prepare` makes all of that ready for
a model. Nothing here knows Lightning.
"""

from lightning_knnmt.retrieval.auto import choose_index
from lightning_knnmt.retrieval.building import DatastorePlan, EntryRows, OtherText, ensure_datastore
from lightning_knnmt.retrieval.checks import check_integer
from lightning_knnmt.retrieval.choice import AutoChoice, FaissChoice, FlatChoice, IndexChoice
from lightning_knnmt.retrieval.combiner import Combiner, FixedCombiner
from lightning_knnmt.retrieval.combiner_file import VARIANTS
from lightning_knnmt.retrieval.combiner_training import CombinerTrainer, distance_offset
from lightning_knnmt.retrieval.datastore import Datastore
from lightning_knnmt.retrieval.distribution import KNNDistribution
from lightning_knnmt.retrieval.errors import DatastoreTooLargeError, StaleDatastoreError
from lightning_knnmt.retrieval.estimate import available_memory, estimate_size, reject_if_too_large
from lightning_knnmt.retrieval.fitting import CombinerChoice, TuningText
from lightning_knnmt.retrieval.index import FlatIndex, Index, Metric
from lightning_knnmt.retrieval.learned import LearnedCombiner
from lightning_knnmt.retrieval.prepare import Retrieval, RetrievalPlan
from lightning_knnmt.retrieval.ranks import gathered, rank_zero_first
from lightning_knnmt.retrieval.record import Record, Recorder
from lightning_knnmt.retrieval.retriever import LocalSource, Neighbours, Retriever
from lightning_knnmt.retrieval.robust import RobustCombiner, label_log_probs
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
    fingerprint,
    teacher_forced,
)
from lightning_knnmt.retrieval.tuned import TunedCombiner

__all__ = [
    "VARIANTS",
    "AutoChoice",
    "Combiner",
    "CombinerChoice",
    "CombinerTrainer",
    "Datastore",
    "DatastorePlan",
    "DatastoreTooLargeError",
    "EntryRows",
    "FaissChoice",
    "FixedCombiner",
    "FlatChoice",
    "FlatIndex",
    "Index",
    "IndexChoice",
    "KNNDistribution",
    "LabelledStates",
    "LearnedCombiner",
    "LocalSource",
    "Metric",
    "Neighbours",
    "OtherText",
    "Precision",
    "Record",
    "Recorder",
    "Retrieval",
    "RetrievalPlan",
    "Retriever",
    "RobustCombiner",
    "SavedSystemError",
    "Settings",
    "StaleDatastoreError",
    "TunedCombiner",
    "TuningText",
    "available_memory",
    "batches_of",
    "check_integer",
    "choose_index",
    "distance_offset",
    "ensure_datastore",
    "estimate_size",
    "fingerprint",
    "gathered",
    "label_log_probs",
    "open_retrieval",
    "packed_parts",
    "rank_zero_first",
    "reject_if_too_large",
    "settings_of",
    "teacher_forced",
]
