"""Datastores: what is written is read, and whatever is wrong with one is said."""

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lightning_knnmt.files import locked, replaced_path
from lightning_knnmt.retrieval import Datastore, DatastoreTooLargeError, StaleDatastoreError
from lightning_knnmt.retrieval import datastore as datastore_module
from lightning_knnmt.retrieval import storage as storage_module
from lightning_knnmt.retrieval.datastore import DATA_NAMES, FORMAT_VERSION
from lightning_knnmt.retrieval.errors import (
    DamagedDatastoreError,
    DatastoreBusyError,
    DatastoreError,
    KeyRangeError,
    MissingDatastoreError,
    TruncatedDatastoreError,
)
from lightning_knnmt.retrieval.writer import DatastoreWriter, wait_for_build

M, D = 40, 6
RNG = np.random.default_rng(1)
KEYS = RNG.normal(size=(M, D)).astype(np.float32)
VALUES = RNG.integers(0, 30, M)


def commit(writer: DatastoreWriter, rows_written: int, fingerprint: str = "f1") -> Datastore:
    return writer.commit(
        rows_written,
        model_fingerprint=fingerprint,
        tokenizer_digest="t1",
        corpus_name="toy",
        corpus_digest="c1",
    )


def build(directory: Path, fingerprint: str = "f1") -> Datastore:
    writer = DatastoreWriter.create(directory, M, D)
    for rows in np.array_split(np.arange(M), 7):
        writer.write(rows, KEYS[rows], VALUES[rows])
    return commit(writer, writer.rows_written, fingerprint)


SOURCES = ["uma casa", "", "dois\u2028sóis\x0b\x0c \x85 fim\r", "\ufeffчай  日本", " ", "x" * 5000]
TARGETS = ["ein Haus\u2029", "\t", "", "Tee\x1c\x1d\x1e", "😀 ñ", "zwei Sonnen\r"]
LENGTHS = [7, 1, 12, 0, 3, 17]  # a sentence whose tokens are all left out has no entry


def build_with_text(directory: Path) -> Datastore:
    writer = DatastoreWriter.create(directory, M, D)
    writer.write(np.arange(M), KEYS, VALUES)
    writer.write_text(np.cumsum([0, *LENGTHS]), iter(SOURCES), iter(TARGETS))
    commit(writer, M)
    return Datastore.open(directory)


class TestText:
    def test_a_pairs_text_comes_back_whatever_is_in_it(self, tmp_path: Path) -> None:
        store = build_with_text(tmp_path / "store")
        assert store.manifest.num_sentences == len(SOURCES)
        for sentence in (4, 0, 5, 2, 1, 3):
            assert store.pair(sentence) == (SOURCES[sentence], TARGETS[sentence])
        shutil.move(tmp_path / "store", tmp_path / "moved")
        assert Datastore.open(tmp_path / "moved").pair(2) == (SOURCES[2], TARGETS[2])

    def test_every_entry_knows_its_pair(self, tmp_path: Path) -> None:
        store = build_with_text(tmp_path / "store")
        expected = [i for i, length in enumerate(LENGTHS) for _ in range(length)]
        assert store.sentences_of(np.arange(M)).tolist() == expected
        some = np.random.default_rng(3).integers(0, M, (4, 5))
        assert store.sentences_of(some).tolist() == np.array(expected)[some].tolist()

    @pytest.mark.parametrize("name", ["sources.txt", "targets.txt"])
    def test_text_that_is_missing_damaged_or_cut(self, tmp_path: Path, name: str) -> None:
        path = build_with_text(tmp_path / "store").directory / name
        content = path.read_bytes()
        path.write_bytes(content.replace(b"a", b"e"))
        with pytest.raises(DamagedDatastoreError, match=name):
            Datastore.open(path.parent)
        path.write_bytes(content[: len(content) // 4])
        with pytest.raises(DamagedDatastoreError, match=name):
            Datastore.open(path.parent, verify=False).pair(0)
        path.unlink()
        with pytest.raises(DamagedDatastoreError, match=name):
            Datastore.open(path.parent, verify=False)

    def test_entries_without_text_are_of_one_empty_pair(self, directory: Path) -> None:
        store = Datastore.open(directory)
        assert store.pair(0) == ("", "")
        assert store.sentences_of(np.arange(M)).tolist() == [0] * M


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    build(tmp_path / "store")
    return tmp_path / "store"


def test_it_holds_what_was_written(directory: Path) -> None:
    store = Datastore.open(directory)
    np.testing.assert_array_equal(store.keys, KEYS.astype(np.float16))
    np.testing.assert_array_equal(store.values, VALUES)
    assert store.values.dtype == np.int32
    assert len(store) == M
    assert store.num_bytes == M * (2 * D + 4)
    assert store.manifest.corpus_name == "toy"
    assert {path.name for path in directory.iterdir()} == {"manifest.json", *DATA_NAMES}


def test_plain_numpy_opens_its_arrays(directory: Path) -> None:
    assert np.load(directory / "keys.npy", mmap_mode="r").shape == (M, D)
    assert np.load(directory / "values.npy", allow_pickle=False).shape == (M,)


def test_it_cannot_be_written_to(directory: Path) -> None:
    with pytest.raises(ValueError, match="read-only"):
        Datastore.open(directory).keys[0] = 0


def test_any_number_of_writers_makes_the_same_bytes(directory: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    first = DatastoreWriter.create(other, M, D)
    second = DatastoreWriter.attach(other, M, D)
    second.write(np.arange(M - 1, 15, -1), KEYS[:15:-1], VALUES[:15:-1])
    second.flush()
    first.write(np.arange(16), KEYS[:16], VALUES[:16])
    commit(first, first.rows_written + second.rows_written)
    for name in ("manifest.json", *DATA_NAMES):
        assert (other / name).read_bytes() == (directory / name).read_bytes()


def test_attaching_needs_a_build(tmp_path: Path) -> None:
    with pytest.raises(MissingDatastoreError, match=r"No build of .*store is under way"):
        DatastoreWriter.attach(tmp_path / "store", M, D)


def test_ranks_must_agree_on_the_shape(tmp_path: Path) -> None:
    DatastoreWriter.create(tmp_path / "store", M, D)
    with pytest.raises(DatastoreError, match=r"created as float16 \(40, 6\).*expects.*\(40, 7\)"):
        DatastoreWriter.attach(tmp_path / "store", M, D + 1)


def test_a_datastore_has_entries(tmp_path: Path) -> None:
    with pytest.raises(DatastoreError, match=r"at least one entry .* but 0 entries of 6"):
        DatastoreWriter.create(tmp_path / "store", 0, D)


class TestWriting:
    @pytest.fixture
    def writer(self, tmp_path: Path) -> DatastoreWriter:
        return DatastoreWriter.create(tmp_path / "store", M, D)

    def test_too_few_rows(self, writer: DatastoreWriter) -> None:
        writer.write(np.arange(3, M), KEYS[3:], VALUES[3:])
        with pytest.raises(
            DatastoreError,
            match="announced with 40 entries, but 37 were written and 3 rows are empty, the first "
            "of them row 0",
        ):
            commit(writer, writer.rows_written)
        assert not writer.directory.exists()

    def test_more_rows_than_announced(self, writer: DatastoreWriter) -> None:
        with pytest.raises(DatastoreError, match="more tokens than were announced"):
            writer.write(np.arange(M, M + 2), KEYS[:2], VALUES[:2])

    def test_negative_rows(self, writer: DatastoreWriter) -> None:
        with pytest.raises(DatastoreError, match="Rows -1 to 0 were given to a datastore of 40"):
            writer.write(np.array([0, -1]), KEYS[:2], VALUES[:2])

    def test_more_rows_in_sum(self, writer: DatastoreWriter) -> None:
        writer.write(np.arange(M), KEYS, VALUES)
        with pytest.raises(DatastoreError, match="but 41 were written"):
            commit(writer, M + 1)

    def test_a_row_twice_by_two_ranks(self, writer: DatastoreWriter) -> None:
        other = DatastoreWriter.attach(writer.directory, M, D)
        other.write(np.arange(3), KEYS[:3], VALUES[:3])
        with pytest.raises(DatastoreError, match=r"written twice \(row 2, in a batch of 3\)"):
            writer.write(np.arange(2, 5), KEYS[:3], VALUES[:3])

    def test_a_row_twice_at_once(self, writer: DatastoreWriter) -> None:
        with pytest.raises(DatastoreError, match=r"written twice \(row 7, in a batch of 2\)"):
            writer.write(np.array([7, 7]), KEYS[:2], VALUES[:2])

    def test_wrong_shape(self, writer: DatastoreWriter) -> None:
        with pytest.raises(DatastoreError, match=r"need keys of shape \(2, 6\).*have shape \(3, 6"):
            writer.write(np.arange(2), KEYS[:3], VALUES[:2])

    def test_nothing_at_all(self, writer: DatastoreWriter) -> None:
        writer.write(np.arange(0), KEYS[:0], VALUES[:0])
        assert writer.rows_written == 0

    @pytest.mark.parametrize("wrong", [7e4, np.inf, np.nan, -7e4])
    def test_keys_that_float16_cannot_hold(self, writer: DatastoreWriter, wrong: float) -> None:
        keys = KEYS[:3].copy()
        keys[1, 2] = wrong
        with pytest.raises(KeyRangeError, match=r"Key 1 of a batch of 3 .* at most 65504"):
            writer.write(np.arange(3), keys, VALUES[:3])
        assert writer.rows_written == 0

    def test_giving_up_leaves_nothing(self, writer: DatastoreWriter, tmp_path: Path) -> None:
        writer.abort()
        assert list(tmp_path.iterdir()) == []

    def test_two_builds_at_once(self, writer: DatastoreWriter) -> None:
        with pytest.raises(DatastoreBusyError, match=r"store\b"):
            DatastoreWriter.create(writer.directory, M, D)
        writer.write(np.arange(M), KEYS, VALUES)  # and the first one is none the worse
        assert len(commit(writer, M)) == M

    def test_a_build_elsewhere_is_waited_for(
        self, writer: DatastoreWriter, caplog: pytest.LogCaptureFixture
    ) -> None:
        opened: list[Datastore] = []

        def wait() -> None:
            wait_for_build(writer.directory)
            opened.append(Datastore.open(writer.directory))

        waiting = threading.Thread(target=wait)
        waiting.start()
        while "waiting for it" not in caplog.text:
            time.sleep(0.01)
        assert not opened
        writer.write(np.arange(M), KEYS, VALUES)
        commit(writer, M)
        waiting.join(timeout=60)
        assert len(opened[0]) == M

    def test_a_build_that_was_given_up_is_not_waited_for(self, writer: DatastoreWriter) -> None:
        writer.abort()
        wait_for_build(writer.directory)


class TestDamage:
    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(MissingDatastoreError, match=r"no finished datastore in .*nowhere"):
            Datastore.open(tmp_path / "nowhere")

    def test_no_manifest(self, directory: Path) -> None:
        (directory / "manifest.json").unlink()
        with pytest.raises(
            MissingDatastoreError, match=r"manifest.json is missing, and it is writ"
        ):
            Datastore.open(directory)

    def test_manifest_is_not_json(self, directory: Path) -> None:
        (directory / "manifest.json").write_text("{")
        with pytest.raises(DamagedDatastoreError, match="not valid JSON"):
            Datastore.open(directory)

    @pytest.mark.parametrize("content", ["[]", "{}", '{"num_entries": "40"}'])
    def test_manifest_lacks_entries(self, directory: Path, content: str) -> None:
        (directory / "manifest.json").write_text(content)
        with pytest.raises(DamagedDatastoreError, match=r"no valid entry for .*num_entries"):
            Datastore.open(directory)

    def test_manifest_of_another_version(self, directory: Path) -> None:
        self.change_manifest(directory, format_version=9)
        with pytest.raises(
            DamagedDatastoreError, match=rf" 9\b.*\b{FORMAT_VERSION}\b.*knn\.rebuild"
        ):
            Datastore.open(directory)

    def test_manifest_that_says_it_is_incomplete(self, directory: Path) -> None:
        self.change_manifest(directory, complete=False)
        with pytest.raises(DamagedDatastoreError, match="no valid entry for complete"):
            Datastore.open(directory)

    @pytest.mark.parametrize("name", ["keys.npy", "values.npy", "offsets.npy"])
    def test_truncated(self, directory: Path, name: str) -> None:
        with (directory / name).open("r+b") as file:
            file.truncate(150)
        with pytest.raises(TruncatedDatastoreError, match=f"{name} has 150 bytes"):
            Datastore.open(directory, verify=False)

    def test_a_file_is_missing(self, directory: Path) -> None:
        (directory / "values.npy").unlink()
        with pytest.raises(TruncatedDatastoreError, match=r"values.npy has 0 bytes"):
            Datastore.open(directory)

    @pytest.mark.parametrize("name", [name for name in DATA_NAMES if name.endswith(".npy")])
    def test_flipped_byte(self, directory: Path, name: str) -> None:
        self.flip(directory / name, -5)
        with pytest.raises(DamagedDatastoreError, match=f"{name} is damaged: its digest is"):
            Datastore.open(directory)
        assert len(Datastore.open(directory, verify=False)) == M  # as documented

    def test_flipped_byte_in_the_header(self, directory: Path) -> None:
        self.flip(directory / "keys.npy", 20)
        with pytest.raises(DamagedDatastoreError, match="its header is not that of a float16"):
            Datastore.open(directory, verify=False)

    def test_another_model(self, directory: Path) -> None:
        store = Datastore.open(directory)
        store.require(fingerprint="f1", tokenizer_digest="t1")
        with pytest.raises(StaleDatastoreError, match="fingerprint f1, but this model has f2"):
            store.require(fingerprint="f2", tokenizer_digest="t1")

    def test_another_tokenizer(self, directory: Path) -> None:
        with pytest.raises(StaleDatastoreError, match="tokenizer t1, but this tokenizer is t2"):
            Datastore.open(directory).require(fingerprint="f1", tokenizer_digest="t2")

    @staticmethod
    def flip(path: Path, position: int) -> None:
        content = bytearray(path.read_bytes())
        content[position] ^= 1
        path.write_bytes(content)

    @staticmethod
    def change_manifest(directory: Path, **changes: object) -> None:
        path = directory / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class TestVerifyingOnce:
    @pytest.fixture(autouse=True)
    def _settled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Files of a moment ago count as old ones."""
        monkeypatch.setattr(storage_module, "SETTLED_SECONDS", 0.0)

    def test_the_second_opening_reads_no_keys(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Datastore.open(directory)

        def refuse(path: Path) -> str:
            raise AssertionError(f"{path} was read again")

        monkeypatch.setattr(datastore_module, "file_digest", refuse)
        Datastore.open(directory)
        with pytest.raises(AssertionError, match="read again"):
            Datastore.open(directory).verify()

    @pytest.mark.parametrize("name", ["keys.npy", "values.npy"])
    def test_a_byte_flipped_later_is_found(self, directory: Path, name: str) -> None:
        Datastore.open(directory)
        path = directory / name
        before = path.stat()
        time.sleep(0.05)  # longer than the file system's clock ticks
        array = np.load(path, mmap_mode="r+")
        array.reshape(-1)[3] += 1
        array.flush()
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as if nothing had happened
        with pytest.raises(DamagedDatastoreError, match=f"{name} is damaged"):
            Datastore.open(directory)

    def test_a_copy_is_verified_anew(self, directory: Path, tmp_path: Path) -> None:
        Datastore.open(directory)
        shutil.copytree(directory, tmp_path / "copy")
        TestDamage.flip(tmp_path / "copy" / "keys.npy", -1)
        with pytest.raises(DamagedDatastoreError):
            Datastore.open(tmp_path / "copy")

    def test_fresh_files_are_not_trusted(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(storage_module, "SETTLED_SECONDS", 60.0)
        Datastore.open(directory)
        assert not (directory / "verified.json").exists()


class TestInterruption:
    KILLED = """
import os, signal, sys
import numpy as np
from lightning_knnmt.retrieval.writer import DatastoreWriter
writer = DatastoreWriter.create(sys.argv[1], 40, 6)
writer.write(np.arange(20), np.ones((20, 6)), np.ones(20, dtype=np.int64))
os.kill(os.getpid(), signal.SIGKILL)
"""

    def test_a_killed_build_leaves_no_datastore_and_does_not_block_the_next(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        directory = tmp_path / "store"
        killed = subprocess.run([sys.executable, "-c", self.KILLED, str(directory)], check=False)
        assert killed.returncode == -signal.SIGKILL
        assert not (tmp_path / "store").exists()
        with pytest.raises(MissingDatastoreError):
            Datastore.open(directory)
        with caplog.at_level(logging.WARNING):
            build(directory)
        assert "left behind" in caplog.text
        assert [path.name for path in tmp_path.iterdir()] == ["store"]
        np.testing.assert_array_equal(Datastore.open(directory).keys, KEYS.astype(np.float16))

    def test_the_old_one_serves_until_the_new_one_is_whole(self, directory: Path) -> None:
        old = Datastore.open(directory)
        writer = DatastoreWriter.create(directory, M, D)
        writer.write(np.arange(M), -KEYS, VALUES)
        assert Datastore.open(directory).manifest == old.manifest
        new = commit(writer, M, fingerprint="f2")
        assert new.manifest.model_fingerprint == "f2"
        assert Datastore.open(directory).manifest == new.manifest
        np.testing.assert_array_equal(old.keys, KEYS.astype(np.float16))  # still mapped
        assert [path.name for path in directory.parent.iterdir()] == ["store"]

    def test_stopped_between_the_two_renames(self, directory: Path) -> None:
        directory.rename(replaced_path(directory))
        assert Datastore.open(directory).manifest.model_fingerprint == "f1"
        directory.rename(replaced_path(directory))
        assert build(directory, fingerprint="f2").manifest.model_fingerprint == "f2"
        assert [path.name for path in directory.parent.iterdir()] == ["store"]

    def test_a_reader_does_not_disturb_a_replacement(self, directory: Path) -> None:
        """It opens the folder between the builder's two renames and waits for the second one."""
        opened: list[Datastore] = []
        reader = threading.Thread(target=lambda: opened.append(Datastore.open(directory)))
        with locked(directory):
            directory.rename(replaced_path(directory))
            reader.start()
            time.sleep(0.2)
            assert not opened
            replaced_path(directory).rename(directory)
        reader.join(timeout=60)
        assert len(opened[0]) == M


class TestFullDisk:
    @pytest.fixture
    def small_disk(self, tmp_path: Path) -> Iterator[Path]:
        """A disk of one MiB."""
        disk = tmp_path / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
        if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small disk needs root")
        yield disk
        subprocess.run(["umount", "-l", str(disk)], check=True)

    def test_the_error_has_the_numbers(self, small_disk: Path) -> None:
        needed = 128 + 10_000 * 64 * 2
        with pytest.raises(
            DatastoreTooLargeError, match=rf"keys.npy needs {needed:,} bytes, but only [\d,]+ bytes"
        ):
            DatastoreWriter.create(small_disk / "store", 10_000, 64)
        assert list(small_disk.iterdir()) == []

    def test_the_old_one_survives(self, small_disk: Path) -> None:
        build(small_disk / "store")
        with pytest.raises(DatastoreTooLargeError):
            DatastoreWriter.create(small_disk / "store", 10_000, 64)
        assert len(Datastore.open(small_disk / "store")) == M

    def test_without_a_small_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(descriptor: int, offset: int, length: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(DatastoreTooLargeError, match=r"The disk is full: .*keys.npy needs 608"):
            DatastoreWriter.create(tmp_path / "store", M, D)
        assert list(tmp_path.iterdir()) == []
