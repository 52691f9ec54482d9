"""Files and folders are whole or absent, and one process at a time changes them."""

import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lightning_knnmt.files import (
    BLOCK_BYTES,
    default_cache,
    file_digest,
    is_locked,
    locked,
    new_directory,
    recover,
    replaced_path,
    replacing,
    sha256_of,
    write_atomically,
)


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def _half_of_it(path: Path) -> None:
    path.touch()
    raise KeyboardInterrupt


class TestFile:
    def test_text_and_bytes_are_written_into_a_new_folder(self, tmp_path: Path) -> None:
        write_atomically(tmp_path / "new" / "a", "λ\n")
        write_atomically(tmp_path / "new" / "b", b"\xff")
        assert (tmp_path / "new" / "a").read_text(encoding="utf-8") == "λ\n"
        assert (tmp_path / "new" / "b").read_bytes() == b"\xff"
        assert names(tmp_path / "new") == ["a", "b"]

    def test_an_interrupted_write_leaves_the_old_file(self, tmp_path: Path) -> None:
        path = tmp_path / "kept"
        path.write_text("old")
        with pytest.raises(KeyboardInterrupt), replacing(path) as partial:
            _half_of_it(partial)
        assert path.read_text() == "old"
        assert names(tmp_path) == ["kept"]

    def test_an_error_without_a_path_gets_one(self, tmp_path: Path) -> None:
        with pytest.raises(OSError, match="file") as raised, replacing(tmp_path / "file"):
            raise OSError(28, "No space left on device")
        assert raised.value.filename == str(tmp_path / "file")


class TestDirectory:
    def test_it_replaces_what_is_there(self, tmp_path: Path) -> None:
        for content in ("old", "new"):
            with locked(tmp_path / "made"), new_directory(tmp_path / "made") as partial:
                (partial / content).touch()
        assert names(tmp_path / "made") == ["new"]
        assert names(tmp_path) == ["made"]

    def test_interrupted_work_leaves_what_was_there(self, tmp_path: Path) -> None:
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / "old").touch()
        with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "made") as partial:
            _half_of_it(partial / "half")
        assert names(tmp_path) == ["made"]
        assert names(tmp_path / "made") == ["old"]

    def test_what_a_killed_process_left_is_removed(self, tmp_path: Path) -> None:
        killed = """
import os, signal, sys
from pathlib import Path
from lightning_knnmt.files import locked, new_directory
with locked(Path(sys.argv[1])), new_directory(Path(sys.argv[1])) as partial:
    (partial / "stale").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""
        path = tmp_path / "made"
        process = subprocess.run([sys.executable, "-c", killed, str(path)], check=False)
        assert process.returncode == -signal.SIGKILL
        assert names(tmp_path) != []
        with locked(path, wait=False), new_directory(path) as partial:
            (partial / "fresh").touch()
        assert names(tmp_path) == ["made"]
        assert names(path) == ["fresh"]

    def test_the_old_one_is_put_back_if_the_new_one_never_came(self, tmp_path: Path) -> None:
        path = tmp_path / "made"
        path.mkdir()
        (path / "old").touch()
        path.rename(replaced_path(path))
        recover(path)
        recover(path)
        assert names(tmp_path) == ["made"]
        assert names(path) == ["old"]


def _append_twice(path: Path) -> None:
    with locked(path):
        for word in ("begin", "end"):
            with path.open("a") as file:
                file.write(f"{word}\n")
            time.sleep(0.05)


class TestLock:
    def test_one_process_at_a_time_holds_it(self, tmp_path: Path) -> None:
        path = tmp_path / "shared"
        context = multiprocessing.get_context("fork")
        processes = [context.Process(target=_append_twice, args=(path,)) for _ in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert path.read_text().split() == ["begin", "end"] * 3
        assert names(tmp_path) == ["shared"]

    def test_who_does_not_wait_gets_an_error(self, tmp_path: Path) -> None:
        path = tmp_path / "shared"
        with locked(path):
            assert is_locked(path)
            with pytest.raises(BlockingIOError) as raised, locked(path, wait=False):
                pass
            assert raised.value.filename == str(path)
        assert not is_locked(path)
        with locked(path, wait=False):
            pass

    def test_a_child_that_inherits_it_holds_it_after_a_kill(self, tmp_path: Path) -> None:
        script = """
import os, signal, subprocess, sys
from pathlib import Path
from lightning_knnmt.files import locked
with locked(Path(sys.argv[1])) as descriptor:
    child = subprocess.Popen(["sleep", "100"], pass_fds=[descriptor], stdout=subprocess.DEVNULL)
    print(child.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
        path = tmp_path / "shared"
        parent = subprocess.run(
            [sys.executable, "-c", script, str(path)], check=False, stdout=subprocess.PIPE
        )
        waited: list[bool] = []
        with pytest.raises(BlockingIOError), locked(path, wait=False):
            pass

        def end_the_child() -> None:
            waited.append(True)
            os.kill(int(parent.stdout), signal.SIGKILL)

        with locked(path, waiting=end_the_child):
            assert waited == [True]


def test_digests(tmp_path: Path) -> None:
    """The one is what sha256sum prints, the other the digest of the blocks' digests."""
    content = bytes(range(256)) * (BLOCK_BYTES // 256) + b"tail"
    path = tmp_path / "file"
    path.write_bytes(content)
    blocks = [content[:BLOCK_BYTES], b"tail"]
    assert sha256_of(path) == hashlib.sha256(content).hexdigest()
    expected = hashlib.sha256(b"".join(hashlib.sha256(each).digest() for each in blocks))
    assert file_digest(path) == expected.hexdigest()


@pytest.mark.parametrize("own", [None, "/own"])
@pytest.mark.parametrize("xdg", [None, "/xdg"])
def test_the_default_cache_is_that_of_the_configuration(
    monkeypatch: pytest.MonkeyPatch, own: str | None, xdg: str | None
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in (("LIGHTNING_KNNMT_CACHE", own), ("XDG_CACHE_HOME", xdg)):
        if value:
            monkeypatch.setenv(name, value)
        else:
            monkeypatch.delenv(name, raising=False)
    expected = own or f"{xdg or '/home/me/.cache'}/lightning_knnmt"
    assert default_cache() == Path(expected)
    paths = Path(__file__).parents[1] / "conf" / "paths" / "default.yaml"
    assert OmegaConf.load(paths).cache == expected
