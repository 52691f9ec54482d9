import threading
from typing import Any

import pytest

from lightning_knnmt.retrieval import ranks
from lightning_knnmt.retrieval.ranks import OtherRankError, all_or_none, gathered, rank_zero_first


def on_two_ranks(monkeypatch: pytest.MonkeyPatch, work: Any) -> list[Any]:
    """What `work(rank)` returns or raises on each of two threads that play the ranks."""
    barrier = threading.Barrier(2, timeout=10)
    values: dict[int, Any] = {}
    results: list[Any] = [None, None]

    def all_gather_object(everyone: list[Any], mine: Any) -> None:
        values[int(threading.current_thread().name)] = mine
        barrier.wait()
        everyone[:] = [values[0], values[1]]
        barrier.wait()

    def play(rank: int) -> None:
        try:
            results[rank] = work(rank)
        except Exception as error:
            results[rank] = error

    monkeypatch.setattr(ranks.torch.distributed, "all_gather_object", all_gather_object)
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(ranks, "rank", lambda: int(threading.current_thread().name))
    players = [threading.Thread(target=play, args=[rank], name=str(rank)) for rank in range(2)]
    for player in players:
        player.start()
    for player in players:
        player.join()
    return results


def test_one_rank_needs_no_other() -> None:
    assert gathered(3) == [3]
    assert rank_zero_first(lambda: 5, lambda: 6) == 5
    with pytest.raises(ZeroDivisionError):
        all_or_none(lambda: 1 / 0)


def test_values_come_in_the_order_of_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = on_two_ranks(monkeypatch, gathered)
    assert seen == [[0, 1], [0, 1]]


def test_rank_zero_is_done_before_the_other_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[int] = []

    def work(rank: int) -> int:
        return rank_zero_first(lambda: order.append(0) or 7, lambda: order.append(1) or 8)

    assert on_two_ranks(monkeypatch, work) == [7, 8]
    assert order == [0, 1]


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("together", [all_or_none, rank_zero_first])
def test_if_one_fails_so_does_the_other(
    monkeypatch: pytest.MonkeyPatch, failing: int, together: Any
) -> None:
    def make(rank: int) -> str:
        if rank == failing:
            raise ValueError("the disk is full")
        return "made"

    results = on_two_ranks(monkeypatch, lambda rank: together(lambda: make(rank)))
    assert isinstance(results[failing], ValueError)
    assert isinstance(results[1 - failing], OtherRankError)
