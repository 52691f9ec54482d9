"""Builds that are killed, and disks that are full."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_knnmt.retrieval import Datastore

Run = Callable[..., Path]

# Builds the first batch of a datastore, says so by a file, and waits to be killed.
STOPS_HALF_WAY = """
import runpy, sys, time
from pathlib import Path
from lightning_knnmt.retrieval import building

write = building.DatastoreWriter.write
def write_once(self, *entries):
    write(self, *entries)
    Path({mark!r}).touch()
    time.sleep(600)
building.DatastoreWriter.write = write_once
sys.argv = {argv!r}
runpy.run_path({script!r}, run_name="__main__")
"""


def best(folder: Path) -> str:
    return f"model.path={folder}/checkpoints/best.ckpt"


def kill_half_way(mark: Path, arguments: list[str], environment: dict[str, str]) -> None:
    """Starts evaluate.py and kills it when a part of the datastore is written."""
    script = str(Path(__file__).parents[2] / "evaluate.py")
    code = STOPS_HALF_WAY.format(mark=str(mark), argv=[script, *arguments], script=script)
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, text=True)
    try:
        deadline = time.monotonic() + 120
        while not mark.exists():
            assert process.poll() is None, "the build ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL


def names(folder: Path) -> set[str]:
    """What is in a folder, except the lock file of a process that was killed."""
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


@pytest.mark.slow
def test_a_killed_build_leaves_the_old_datastore_and_the_next_one_succeeds(
    trained: Path, evaluate: Run, tmp_path: Path, given: tuple[str, ...], read: Any,
    command: Callable[..., list[str]], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    stores = tmp_path / "stores"
    overrides = (best(trained), *given, f"knn.directory={stores}/mine")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    arguments = command("evaluate", tmp_path / "run", *overrides)
    kill_half_way(tmp_path / "first", arguments, environment)
    assert names(stores) == {".mine.building"}
    with caplog.at_level(logging.INFO, "lightning_knnmt"):
        evaluate(tmp_path / "run", *overrides)
    assert f"Removed {stores}/.mine.building, left behind by a build that was stopped." in (
        caplog.messages
    )
    whole = read.datastore(stores / "mine")
    assert whole == read.datastore(trained / "datastore")
    assert names(stores) == {"mine"}

    kill_half_way(tmp_path / "second", [*arguments, "knn.rebuild=true"], environment)
    assert names(stores) == {"mine", ".mine.building"}
    assert read.datastore(stores / "mine") == whole
    Datastore.open(stores / "mine").verify()
    evaluate(tmp_path / "again", *overrides)
    assert read.translations(tmp_path / "again") == read.translations(trained)
    evaluate(tmp_path / "again", *overrides, "knn.rebuild=true")
    assert names(stores) == {"mine"}
    assert read.datastore(stores / "mine") == whole


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A file system of so many KiB, where mounting one is permitted."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(kib: int) -> Path:
        arguments = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
        try:
            mounted = subprocess.run(arguments, capture_output=True, check=False).returncode == 0
        except FileNotFoundError:
            mounted = False
        if not mounted:
            pytest.skip("mounting a tmpfs is not permitted here")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_is_too_small_is_found_out_before_building(
    trained: Path, mistake: Callable[..., str], small_disk: Callable[[int], Path],
    given: tuple[str, ...],
) -> None:  # fmt: skip
    disk = small_disk(100)
    store = f"knn.directory={disk}/mine"
    said = mistake(best(trained), *given, store, config="evaluate")
    assert all(fact in said for fact in ("3,214 entries", "102,400 bytes", str(disk)))
    assert names(disk) == set()


@pytest.mark.parametrize("kib", [60, 210, 220], ids=["keys", "values", "marks"])
def test_a_disk_that_fills_up_while_building(
    trained: Path, mistake: Callable[..., str], small_disk: Callable[[int], Path],
    given: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, kib: int,
) -> None:  # fmt: skip
    monkeypatch.setattr("lightning_knnmt.retrieval.building.reject_if_too_large", lambda *_: None)
    disk = small_disk(kib)
    said = mistake(best(trained), *given, f"knn.directory={disk}/mine", config="evaluate")
    assert f"{disk}/.mine.building/" in said
    assert "disk is full" in said
    assert names(disk) == set()


def test_a_full_disk_under_the_cache(
    mistake: Callable[..., str], small_disk: Callable[[int], Path]
) -> None:
    disk = small_disk(16)
    said = mistake(f"paths.cache={disk}/cache")
    assert f"{disk}/cache/tokenizers/" in said
    assert not list(disk.rglob("*.partial"))
