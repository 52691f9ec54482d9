"""Studies: every method on every domain, from one command to the report."""

from lightning_knnmt.study.plan import Method, Run, Study, StudyError
from lightning_knnmt.study.process import RunFailedError, Usage, is_finished, read_usage
from lightning_knnmt.study.runner import Runner
from lightning_knnmt.study.study_file import read_study

__all__ = [
    "Method",
    "Run",
    "RunFailedError",
    "Runner",
    "Study",
    "StudyError",
    "Usage",
    "is_finished",
    "read_study",
    "read_usage",
]
