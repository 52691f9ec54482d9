"""What will not fit is refused beforehand, with numbers."""

import re
from pathlib import Path

import pytest

from lightning_knnmt.retrieval import DatastoreTooLargeError, estimate_size, reject_if_too_large
from lightning_knnmt.retrieval import estimate as estimate_module


def test_the_numbers() -> None:
    flat = estimate_size(1000, 64, "flat")
    assert flat.disk_bytes == 1000 * (64 * 2 + 4 + 1)
    assert flat.memory_bytes == 1000 * (64 * 4 + 4)
    assert estimate_size(1000, 64, "faiss").memory_bytes < flat.memory_bytes
    assert estimate_size(1000, 64, "auto").memory_bytes > flat.memory_bytes


def test_the_table_of_domains_is_what_the_function_computes() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    rows = re.findall(r"^\| (\w+) \| ([\d,]{6,}) \| (.*) GB \|$", page, re.MULTILINE)
    assert [row[0] for row in rows] == ["koran", "it", "medical", "law"]
    for _, entries, sizes in rows:
        auto, faiss, flat = (
            estimate_size(int(entries.replace(",", "")), 1024, kind)
            for kind in ("auto", "faiss", "flat")
        )
        assert auto.disk_bytes == faiss.disk_bytes
        told = [auto.disk_bytes, auto.memory_bytes, faiss.memory_bytes]
        told += [flat.disk_bytes, flat.memory_bytes]
        assert sizes.split(" GB | ") == [f"{number / 1e9:.1f}" for number in told]


def test_what_fits_passes(tmp_path: Path) -> None:
    assert reject_if_too_large(tmp_path / "new" / "store", 1000, 64) == estimate_size(1000, 64)


def test_too_large_for_the_disk(tmp_path: Path) -> None:
    with pytest.raises(
        DatastoreTooLargeError,
        match=r"takes [\d,]+ bytes on the disk, but only [\d,]+ bytes are free in ",
    ):
        reject_if_too_large(tmp_path, 10**13, 1024)


def test_too_large_for_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate_module, "available_memory", lambda: 100_000)
    with pytest.raises(
        DatastoreTooLargeError,
        match=r"takes 260,000 bytes of memory \(index: flat\), but only 100,000 bytes",
    ):
        reject_if_too_large(tmp_path, 1000, 64, "flat")


def test_a_container_has_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    monkeypatch.setattr(estimate_module, "CGROUP", tmp_path)
    assert estimate_module.available_memory() == 3000


def test_a_container_without_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("2000\n")
    monkeypatch.setattr(estimate_module, "CGROUP", tmp_path)
    assert estimate_module.available_memory() > 3000
