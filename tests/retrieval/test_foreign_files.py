"""What is not ours is never replaced, whoever asks for it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_knnmt.retrieval import Datastore
from lightning_knnmt.retrieval.datastore import DATA_NAMES, OUR_NAMES, reject_foreign_datastore
from lightning_knnmt.retrieval.errors import ForeignFilesError
from lightning_knnmt.retrieval.faiss_index import FaissIndex
from lightning_knnmt.retrieval.writer import DatastoreWriter

M, D = 12, 4


def build(directory: Path) -> Datastore:
    writer = DatastoreWriter.create(directory, M, D)
    writer.write(np.arange(M), np.ones((M, D)), np.zeros(M, dtype=np.int64))
    return commit(writer)


def commit(writer: DatastoreWriter) -> Datastore:
    return writer.commit(
        M, model_fingerprint="f", tokenizer_digest="t", corpus_name="toy", corpus_digest="c"
    )


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_absent_folder_an_empty_one_and_a_datastores_are_built_in(tmp_path: Path) -> None:
    build(tmp_path / "absent" / "store")
    (tmp_path / "empty").mkdir()
    store = build(tmp_path / "empty").directory
    for name in ("indexes", "tuning", "combiners", "label_log_probs"):
        (store / name).mkdir()
        (store / name / "made.json").touch()
    for name in ("verified.json", ".verified.json.1234.partial"):
        (store / name).touch()
    build(store)
    assert {each.name for each in store.iterdir()} == {"manifest.json", *DATA_NAMES}


def test_a_folder_of_other_files_stays(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "train.de").write_text("years of work")
    with pytest.raises(ForeignFilesError, match=r"corpus holds train\.de and no manifest\.json"):
        build(folder)
    assert everything(tmp_path) == {"corpus/train.de": b"years of work"}
    assert [each.name for each in tmp_path.iterdir()] == ["corpus"], "nothing was begun"


def test_another_programs_keys_stay(tmp_path: Path) -> None:
    np.save(tmp_path / "keys.npy", np.ones(3))
    with pytest.raises(ForeignFilesError, match=r"keys\.npy and no manifest\.json"):
        build(tmp_path)
    assert np.load(tmp_path / "keys.npy").tolist() == [1, 1, 1]


def test_a_datastore_with_notes_beside_it_stays(tmp_path: Path) -> None:
    store = build(tmp_path / "store").directory
    (store / "notes.txt").write_text("mine")
    before = everything(tmp_path)
    with pytest.raises(ForeignFilesError, match=r"store holds notes\.txt"):
        build(store)
    assert everything(tmp_path) == before
    reject_foreign_datastore(store)  # it is used, not replaced
    with pytest.raises(ForeignFilesError, match=r"holds notes\.txt"):
        reject_foreign_datastore(store, rebuild=True)


def test_what_came_during_the_build_stays(tmp_path: Path) -> None:
    writer = DatastoreWriter.create(tmp_path / "store", M, D)
    writer.write(np.arange(M), np.ones((M, D)), np.zeros(M, dtype=np.int64))
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.txt").write_text("mine")
    with pytest.raises(ForeignFilesError, match=r"holds thesis\.txt"):
        commit(writer)
    writer.abort()
    assert everything(tmp_path) == {"store/thesis.txt": b"mine"}


def test_a_file_in_the_folders_place_or_above_it_stays(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/store"):
        with pytest.raises(ForeignFilesError, match=r"/file\b"):
            build(tmp_path / place)
    assert everything(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays(tmp_path: Path, *, there: bool) -> None:
    target = tmp_path / "target"
    if there:
        build(target)
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(ForeignFilesError, match=r"\S+link\b"):
        build(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()


def test_an_indexs_folder_too(tmp_path: Path) -> None:
    index = FaissIndex.build(torch.randn(20, D).numpy(), "Flat")
    index.save(tmp_path / "index", keys_digest="d")
    index.save(tmp_path / "index", keys_digest="d")
    (tmp_path / "index" / "notes.txt").write_text("mine")
    with pytest.raises(ForeignFilesError, match=r"index holds notes\.txt"):
        index.save(tmp_path / "index", keys_digest="d")
    assert (tmp_path / "index" / "notes.txt").read_text() == "mine"


def test_all_that_a_datastores_folder_holds_is_known() -> None:
    assert "manifest.json" in OUR_NAMES
    assert "*" not in OUR_NAMES
