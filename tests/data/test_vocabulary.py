import pytest

from lightning_knnmt.data import Vocabulary


def test_special_ids_carry_no_text() -> None:
    vocabulary = Vocabulary(size=10, pad_id=9, start_id=9, eos_id=0, unk_id=1)
    assert vocabulary.special_ids == {0, 9}
    multilingual = Vocabulary(10, 9, 9, 0, 1, target_prefix=(7,), source_size=30)
    assert multilingual.special_ids == {0, 7, 9}
    assert (vocabulary.largest_size, multilingual.largest_size) == (10, 30)


def test_an_id_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="pad_id is 10, outside the vocabulary's ids 0 to 9"):
        Vocabulary(size=10, pad_id=10, start_id=2, eos_id=0, unk_id=1)
    with pytest.raises(ValueError, match="target_prefix holds 10, outside the vocabulary's ids"):
        Vocabulary(10, 9, 2, 0, 1, target_prefix=(3, 10))
