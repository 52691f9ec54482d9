"""Errors in one sentence, near matches of settings, quiet libraries, kept memory."""

import logging
import subprocess
import sys
import warnings

import pytest
from lightning_fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_only
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue

from lightning_knnmt.retrieval.ranks import OtherRankError
from lightning_knnmt.terminal import explanation, near_matches, quieten_libraries


@pytest.mark.parametrize(
    "error",
    [ValueError("k is 0"), FileNotFoundError("k is 0"), MisconfigurationException("k is 0\n")],
    ids=lambda error: type(error).__name__,
)
def test_a_mistake_is_told_in_one_sentence(error: Exception) -> None:
    assert explanation(error) == ("error: k is 0\n(HYDRA_FULL_ERROR=1 shows where it came from)")


def test_of_a_missing_setting_only_the_name_is_told() -> None:
    with pytest.raises(MissingMandatoryValue) as raised:
        _ = OmegaConf.create({"data": {"root": "???"}}).data.root
    sentence, *hint = explanation(raised.value).splitlines()
    assert sentence.endswith("data.root")
    assert len(hint) == 1


KNOWN = (
    *("knn", "knn.num_neighbours", "knn.knn_weight", "knn.temperature", "knn.index.recall"),
    *("module.optimizer.lr", "module.warmup_steps", "data.max_tokens", "data.seed", "seed"),
    *("trainer.max_epochs", "trainer.max_steps", "decoding.beam_size"),
)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("knn.k", ["knn.num_neighbours"]),
        ("knn.lambda", ["knn.knn_weight"]),
        ("knn.temprature", ["knn.temperature"]),
        ("knn.recall", ["knn.index.recall"]),
        ("lr", ["module.optimizer.lr"]),
        ("module.lr", ["module.optimizer.lr"]),
        ("trainer.batch_size", ["data.max_tokens"]),
        ("max_epochs", ["trainer.max_epochs"]),
        ("beam", ["decoding.beam_size"]),
        ("trainer.sed", ["data.seed", "seed"]),
        ("xyz.abc", []),
    ],
)
def test_a_wrong_name_has_near_matches(wrong: str, meant: list[str]) -> None:
    assert near_matches(wrong, KNOWN) == meant


def test_what_another_rank_tells_is_not_told_twice() -> None:
    assert explanation(OtherRankError("rank 1 stops")) == ""


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(KeyError):
        explanation(KeyError("x"))


def test_a_mistake_has_its_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="k is 0"):
        explanation(ValueError("k is 0"))


def test_libraries_warn_but_do_not_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = logging.getLogger("lightning_knnmt")
    before = ours.level
    quieten_libraries()
    assert ours.level == before
    assert not logging.getLogger("pytorch_lightning.trainer").isEnabledFor(logging.INFO)
    assert logging.getLogger("pytorch_lightning.trainer").isEnabledFor(logging.WARNING)
    with warnings.catch_warnings(record=True) as told:
        warnings.warn("The 'val_dataloader' does not have many workers.", stacklevel=1)
        assert told == []
        with pytest.raises(UserWarning, match="something else"):  # an error in all our tests
            warnings.warn("something else", stacklevel=1)
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    try:
        quieten_libraries()
        assert ours.level == logging.ERROR
    finally:
        ours.setLevel(before)


COUNT_PAGE_FAULTS = """
import resource
import sys
import numpy as np
from lightning_knnmt.terminal import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for step in range(4):
    if step == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2 << 20)  # 16 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode: str) -> int:
    """Of three arrays of 16 MiB, each freed before the next is made."""
    command = [sys.executable, "-c", COUNT_PAGE_FAULTS, mode]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is what keeps memory")
def test_freed_memory_is_used_again_without_asking_the_system() -> None:
    assert 20 * page_faults("keep") < page_faults("default")
