"""Settings that cannot be are refused in one sentence, text and None among them."""

import sys
from typing import Any

import pytest

from lightning_knnmt.retrieval import (
    AutoChoice,
    CombinerTrainer,
    FaissChoice,
    FixedCombiner,
    FlatChoice,
    check_integer,
    faiss_index,
)
from lightning_knnmt.retrieval.checks import check_number
from lightning_knnmt.retrieval.errors import IndexFactoryError, MissingFaissError


@pytest.mark.parametrize("wrong", [1.5, "abc", None, True, 0, 9, float("nan")])
def test_no_integer_of_the_range(wrong: Any) -> None:
    with pytest.raises(ValueError, match=f"^k is {wrong}, but it must be an integer from 1 to 8.$"):
        check_integer("k", wrong, most=8)


@pytest.mark.parametrize("wrong", ["abc", None, False, -1, float("nan")])
def test_no_number_that_fits(wrong: Any) -> None:
    with pytest.raises(ValueError, match=f"^x is {wrong}, but it must be 0 or greater.$"):
        check_number("x", wrong, "be 0 or greater", lambda x: x >= 0)


def test_what_is_right() -> None:
    check_integer("k", 1, most=1)
    check_number("x", 3, "be a number")


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((1.5, 0.5, 1.0), r"neighbours k is 1\.5, but it must be an integer of at least 1"),
        (("abc", 0.5, 1.0), "neighbours k is abc, but it must be an integer"),
        ((4, "abc", 1.0), "weight λ is abc, but it must lie between 0"),
        ((4, 0.5, None), "temperature T is None, but it must be a number greater"),
    ],
)
def test_a_fixed_combiners(numbers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FixedCombiner(*numbers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": -1}, "combiner's learning_rate is -1, but it must be 0 or greater"),
        ({"learning_rate": "abc"}, "combiner's learning_rate is abc, but it must be 0 or greater"),
        ({"min_learning_rate": -0.1}, r"min_learning_rate is -0\.1, but it must be 0 or greater"),
        ({"plateau_factor": 1.0}, r"plateau_factor is 1\.0, but it must lie between 0 and 1"),
        ({"clip_norm": 0}, "clip_norm is 0, but it must be a number greater than 0"),
        ({"betas": (0.9,)}, r"betas is \(0\.9,\), but it must be two numbers"),
        ({"betas": (0.9, 1.0)}, r"One of betas is 1\.0, but it must be at least 0 and below 1"),
        ({"batch_sentences": 0}, "batch_sentences is 0, but it must be an integer of at least 1"),
        ({"max_updates": 1.5}, r"max_updates is 1\.5, but it must be an integer of at least 1"),
        ({"first_validation": 0}, "first_validation is 0, but it must be an integer"),
        ({"validate_every": 0}, "validate_every is 0, but it must be an integer"),
        ({"plateau_patience": -1}, "plateau_patience is -1, but it must be an integer of at lea"),
        ({"stop_patience": -1}, "stop_patience is -1, but it must be an integer of at least 0"),
        ({"seed": "abc"}, "seed is abc, but it must be an integer of at least 0"),
    ],
)
def test_a_combiners_recipe(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CombinerTrainer(**options)


def test_betas_of_the_command_line_are_the_same_recipe() -> None:
    assert CombinerTrainer(betas=[0.9, 0.98]) == CombinerTrainer()  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [2, 0, "abc", None])
def test_a_recall(wrong: Any) -> None:
    with pytest.raises(ValueError, match=f"recall is {wrong}, but it must lie above 0 and be at"):
        AutoChoice(wrong)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (FaissChoice("Foo"), "There is no index 'Foo' over keys of 16 dimensions"),
        (FaissChoice("PQ5x4fs"), "There is no index 'PQ5x4fs' over keys of 16 dimensions"),
        (FaissChoice("IVF8,Flat", "probes=2"), "cannot be searched with 'probes=2'"),
        (FaissChoice("IVF1024,Flat"), "IVF1024,Flat has 1,024 lists, more than .* entries, 900: s"),
    ],
)
def test_an_index_that_faiss_could_not_build(choice: FaissChoice, message: str) -> None:
    with pytest.raises(IndexFactoryError, match=message):
        choice.check(900, 16, "l2")


@pytest.mark.parametrize("options", [{"factory": 5}, {"factory": "Flat", "parameters": 16}])
def test_an_index_described_by_a_number(options: dict[str, Any]) -> None:
    with pytest.raises(IndexFactoryError, match=r"index\.\w+ is (5|16), but it must be text"):
        FaissChoice(**options)


def test_indexes_that_can_be() -> None:
    choices = (
        *(FlatChoice(), AutoChoice(1.0), FaissChoice("Flat")),
        FaissChoice("IVF32,PQ8x4fs,Refine(SQfp16)", "nprobe=20,k_factor_rf=4"),
        FaissChoice("OPQ8,IVF32,SQfp16", "nprobe=2"),
    )
    for choice in choices:
        choice.check(900, 16, "ip")
    # 65,536 lists, for which 256 entries are enough
    FaissChoice("IMI2x8,Flat", "nprobe=2").check(900, 16, "l2")


def test_without_faiss_only_exact_search_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(faiss_index, "faiss", faiss_index._FaissOnFirstUse())
    FlatChoice().check(100, 8, "l2")
    for choice in (AutoChoice(), FaissChoice("Flat")):
        with pytest.raises(MissingFaissError, match=r"faiss-cpu.*index=flat"):
            choice.check(100, 8, "l2")
