import logging
import warnings

import pytest
from lightning_fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_only
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue

from lightning_knnmt.terminal import explanation, quieten_libraries
from lightning_knnmt.training import OtherRankError


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
    assert explanation(raised.value).splitlines()[0] == (
        "error: Missing mandatory value: data.root"
    )


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
