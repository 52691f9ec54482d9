"""Says in plain words whether a model, a text and a datastore fit together.

Most mistakes of kNN-MT raise no error: text tokenised otherwise, languages exchanged, keys of
another layer or other weights, a temperature of another datastore. They only lower the score. Each
check here looks for one of them and returns a `Finding`; ``python -m lightning_knnmt.doctor``
prints them.
"""

from lightning_knnmt.doctor.checks import Finding, Verdict
from lightning_knnmt.doctor.examination import Examination

__all__ = ["Examination", "Finding", "Verdict"]
