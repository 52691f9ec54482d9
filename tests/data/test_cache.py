import multiprocessing
import time
from pathlib import Path

import pytest

from lightning_knnmt.data.cache import locked, new_directory


def _fail_half_way(path: Path) -> None:
    with new_directory(path) as partial:
        (partial / "half").touch()
        raise KeyboardInterrupt


def test_interrupted_work_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        _fail_half_way(tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "made.partial").mkdir()
    (tmp_path / "made.partial" / "stale").touch()
    with new_directory(tmp_path / "made") as partial:
        (partial / "fresh").touch()
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["fresh"]


def _append_twice(path: Path) -> None:
    with locked(path):
        for word in ("begin", "end"):
            with path.open("a") as file:
                file.write(f"{word}\n")
            time.sleep(0.05)


def test_one_process_at_a_time_holds_a_lock(tmp_path: Path) -> None:
    path = tmp_path / "shared"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_append_twice, args=(path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert path.read_text().split() == ["begin", "end"] * 3
