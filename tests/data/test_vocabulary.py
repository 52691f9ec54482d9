import pytest

from lightning_knnmt.data import Vocabulary


def test_special_ids_carry_no_text() -> None:
    vocabulary = Vocabulary(size=10, pad_id=9, start_id=9, eos_id=0, unk_id=1)
    assert vocabulary.special_ids == {0, 9}
    multilingual = Vocabulary(10, 9, 9, 0, 1, target_prefix=(7,), source_size=30)
    assert multilingual.special_ids == {0, 7, 9}
    assert (vocabulary.largest_size, multilingual.largest_size) == (10, 30)


def test_never_emitted_are_unknown_padding_and_start_but_not_the_end() -> None:
    marian = Vocabulary(size=10, pad_id=9, start_id=9, eos_id=0, unk_id=1)
    trained_here = Vocabulary(size=10, pad_id=0, start_id=2, eos_id=3, unk_id=1)
    fairseq = Vocabulary(size=10, pad_id=1, start_id=2, eos_id=2, unk_id=3)
    assert marian.never_emitted == (1, 9)
    assert trained_here.never_emitted == (0, 1, 2)
    assert fairseq.never_emitted == (1, 3)


def test_an_id_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pad_id is 10\b"):
        Vocabulary(size=10, pad_id=10, start_id=2, eos_id=0, unk_id=1)
    with pytest.raises(ValueError, match=r"target_prefix .*\b10\b"):
        Vocabulary(10, 9, 2, 0, 1, target_prefix=(3, 10))
