"""Domain adaptation of neural machine translation by retrieval (kNN-MT), fine-tuning, or both.

The public names are imported on first use: `import lightning_knnmt` alone loads no library.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_knnmt.adapt import build_datastore, prepare_retrieval
    from lightning_knnmt.data import ParallelDataModule
    from lightning_knnmt.decoding import BeamSearch
    from lightning_knnmt.pretrained import load_pretrained
    from lightning_knnmt.retrieval import Datastore
    from lightning_knnmt.system import System
    from lightning_knnmt.training import KNNCallback, NMTModule
    from lightning_knnmt.translator import Translation, Translator

__version__ = "0.2.0"

# Where each public name is defined.
_MODULES = {
    "BeamSearch": "lightning_knnmt.decoding",
    "Datastore": "lightning_knnmt.retrieval",
    "KNNCallback": "lightning_knnmt.training",
    "NMTModule": "lightning_knnmt.training",
    "ParallelDataModule": "lightning_knnmt.data",
    "System": "lightning_knnmt.system",
    "Translation": "lightning_knnmt.translator",
    "Translator": "lightning_knnmt.translator",
    "build_datastore": "lightning_knnmt.adapt",
    "load_pretrained": "lightning_knnmt.pretrained",
    "prepare_retrieval": "lightning_knnmt.adapt",
}

__all__ = [
    "BeamSearch",
    "Datastore",
    "KNNCallback",
    "NMTModule",
    "ParallelDataModule",
    "System",
    "Translation",
    "Translator",
    "__version__",
    "build_datastore",
    "load_pretrained",
    "prepare_retrieval",
]


def __getattr__(name: str) -> object:
    """Import a public name on first use (PEP 562).

    Raises:
        AttributeError: If the package has no such name.
    """
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value  # the next access finds it without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
