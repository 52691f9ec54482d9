"""Systems on disk: what was adapted is what translates, also elsewhere; what is missing is said."""

import hashlib
import json
import os
import shutil
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_knnmt.data import ParallelDataModule
from lightning_knnmt.decoding import BeamSearch
from lightning_knnmt.models import Transformer
from lightning_knnmt.pretrained import (
    UnknownFormatError,
    load_pretrained,
    save_adapters,
    save_checkpoint,
)
from lightning_knnmt.retrieval import FaissChoice, Retrieval, RobustCombiner, SavedSystemError
from lightning_knnmt.retrieval.adaptive import AdaptiveCombiner
from lightning_knnmt.retrieval.combiner_file import save_combiner
from lightning_knnmt.retrieval.errors import DatastoreError
from lightning_knnmt.retrieval.fitting import FittedCombiner
from lightning_knnmt.system import System, find_system
from lightning_knnmt.translator import Translator

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def lines(toy_datamodule: ParallelDataModule) -> list[str]:
    return toy_datamodule.test_corpus.source_lines()[:10]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIGHTNING_KNNMT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def translated(translator: Translator, lines: list[str]) -> list[tuple[str, float]]:
    return [(each.text, each.score) for each in translator.translate(lines)]


def edit(run: Path, change: Edit) -> None:
    """Changes a run's system.yaml."""
    file = run / "system" / "system.yaml"
    content = yaml.safe_load(file.read_text())
    change(content)
    file.write_text(yaml.safe_dump(content))


def test_a_system_translates_as_what_it_was_made_of(
    toy_system: Path,
    tiny_model: Transformer,
    toy_datamodule: ParallelDataModule,
    toy_retrieval: Retrieval,
    lines: list[str],
) -> None:
    tokenizer, search = toy_datamodule.tokenizer, BeamSearch(beam_size=2)
    expected = translated(Translator(tiny_model, tokenizer, toy_retrieval, search=search), lines)
    assert translated(Translator.load(toy_system), lines) == expected
    assert translated(System.load(toy_system / "system").translator(), lines) == expected


def test_the_file_is_readable_and_its_paths_are_relative(toy_system: Path) -> None:
    text = (toy_system / "system" / "system.yaml").read_text()
    assert text.startswith("#")
    content = yaml.safe_load(text)
    assert content["model"]["path"] == "../../model.ckpt"
    assert content["retrieval"]["combiner"] == {
        "kind": "fixed",
        "num_neighbours": 4,
        "knn_weight": 0.6,
        "temperature": 5.0,
    }
    assert content["search"]["beam_size"] == 2
    assert str(toy_system.parent) not in text


def test_a_tree_that_moves_as_a_whole_still_translates(
    toy_system: Path, lines: list[str], tmp_path: Path
) -> None:
    expected = translated(Translator.load(toy_system), lines)
    shutil.copytree(tmp_path, tmp_path.with_name("moved"))
    shutil.rmtree(toy_system.parent)
    assert translated(Translator.load(tmp_path.with_name("moved") / "run"), lines) == expected


def test_a_packed_system_needs_nothing_else(
    toy_system: Path, lines: list[str], tmp_path: Path, cache: Path
) -> None:
    expected = translated(Translator.load(toy_system), lines)
    packed = tmp_path / "elsewhere" / "toy.knnmt"
    packed.parent.mkdir()
    System.load(toy_system).pack(packed)
    for path in (toy_system, tmp_path / "model.ckpt", tmp_path / "datastores"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    translator = Translator.load(packed)
    assert translated(translator, lines) == expected
    (explained,) = translator.translate(lines[:1], explain=True)
    assert explained.explanation is not None
    assert explained.explanation.pairs  # the training text travels too
    # Unpacked once: a second load works although the file is gone.
    folders = list((cache / "systems").glob("*/system.yaml"))
    assert len(folders) == 1
    packed.unlink()
    assert translated(Translator.load(folders[0].parent), lines) == expected


def test_packing_twice_gives_the_same_file(toy_system: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    System.load(toy_system).pack(first)
    System.load(first).pack(second)
    with zipfile.ZipFile(first) as one, zipfile.ZipFile(second) as other:
        crcs = [{info.filename: info.CRC for info in each.infolist()} for each in (one, other)]
        names = set(crcs[0]) - {"system.yaml"}
    assert {name: crcs[0][name] for name in names} == {name: crcs[1][name] for name in names}
    assert "datastore/keys.npy" in names


def test_adapters_stay_a_file_of_their_own(
    tiny_model: Transformer,
    toy_datamodule: ParallelDataModule,
    plain_model: Path,
    lines: list[str],
    tmp_path: Path,
) -> None:
    tiny_model.insert_adapters(8)
    with torch.no_grad():
        for name, parameter in tiny_model.named_parameters():
            if ".adapter." in name:
                parameter.normal_()
    save_adapters(tiny_model, tmp_path / "adapters.safetensors")
    source = {"path": plain_model, "adapters": tmp_path / "adapters.safetensors"}
    tokenizer, search = toy_datamodule.tokenizer, BeamSearch(beam_size=1)
    System.of(source, tiny_model, tokenizer, search).save(tmp_path / "system")
    expected = translated(Translator(tiny_model, tokenizer), lines)
    assert translated(Translator.load(tmp_path / "system"), lines) == expected
    System.load(tmp_path / "system").pack(tmp_path / "packed")
    assert translated(Translator.load(tmp_path / "packed"), lines) == expected


@pytest.mark.parametrize("kind", ["adaptive", "robust"])
def test_a_trained_combiner_and_a_faiss_index_come_back(
    tiny_model: Transformer,
    toy_datamodule: ParallelDataModule,
    toy_retrieval: Retrieval,
    plain_model: Path,
    lines: list[str],
    tmp_path: Path,
    kind: str,
) -> None:
    combiner = {"adaptive": AdaptiveCombiner, "robust": RobustCombiner}[kind](4, 5.0)
    save_combiner(combiner, tmp_path / "combiner.safetensors", {})
    datastore = toy_retrieval.datastore
    measured = FaissChoice("IVF4,Flat", "nprobe=2").ensure(
        datastore, "l2", 4, lambda: torch.from_numpy(datastore.keys[:50].astype("float32"))
    )
    retrieval = Retrieval(
        toy_retrieval.model_fingerprint,
        toy_retrieval.output_digest,
        datastore,
        measured,
        FittedCombiner(combiner, path=tmp_path / "combiner.safetensors"),
        "AK-MT",
    )
    tokenizer, search = toy_datamodule.tokenizer, BeamSearch(beam_size=1)
    System.of({"path": plain_model}, tiny_model, tokenizer, search, retrieval).save(
        tmp_path / "system"
    )
    loaded = System.load(tmp_path / "system").translator()
    System.load(tmp_path / "system").pack(tmp_path / "packed")
    shutil.rmtree(datastore.directory)
    packed = Translator.load(tmp_path / "packed")
    assert translated(packed, lines) == translated(loaded, lines)
    plain = translated(Translator(tiny_model, tokenizer), lines)
    assert translated(packed, lines) != plain


def test_a_model_alone_translates_without_retrieval(
    plain_model: Path,
    tiny_model: Transformer,
    toy_datamodule: ParallelDataModule,
    lines: list[str],
) -> None:
    assert find_system(plain_model) is None  # although it is a zip file
    expected = translated(Translator(tiny_model, toy_datamodule.tokenizer), lines)
    assert translated(Translator.load(plain_model), lines) == expected


def test_options_of_a_plain_model_reach_it_and_a_system_takes_none(
    tiny_model: Transformer,
    toy_datamodule: ParallelDataModule,
    plain_model: Path,
    toy_system: Path,
    lines: list[str],
    tmp_path: Path,
) -> None:
    tiny_model.insert_lora(2, 4.0)
    with torch.no_grad():
        for name, parameter in tiny_model.named_parameters():
            if ".adapter." in name:
                parameter.normal_()
    options = {"adapters": tmp_path / "adapters.safetensors"}
    save_adapters(tiny_model, options["adapters"])
    expected = translated(Translator(tiny_model, toy_datamodule.tokenizer), lines)
    assert translated(Translator.load(plain_model, model_options=options), lines) == expected
    with pytest.raises(ValueError, match="adapters"):
        Translator.load(toy_system, model_options=options)


def test_averaged_checkpoints_are_several_paths(
    tiny_model: Transformer,
    toy_datamodule: ParallelDataModule,
    plain_model: Path,
    lines: list[str],
    tmp_path: Path,
) -> None:
    tokenizer, search = toy_datamodule.tokenizer, BeamSearch(beam_size=1)
    with torch.no_grad():
        tiny_model.output_projection.weight.mul_(0.5)
    save_checkpoint(tiny_model, tokenizer, tmp_path / "other.ckpt")
    paths = [plain_model, tmp_path / "other.ckpt"]
    averaged, _ = load_pretrained(paths)
    System.of({"path": paths}, averaged, tokenizer, search).save(tmp_path / "system")
    expected = translated(Translator(averaged, tokenizer), lines)
    assert translated(Translator.load(tmp_path / "system"), lines) == expected


# --------------------------------------------------------------- what is missing or changed


@pytest.mark.parametrize(("part", "named"), [("model.ckpt", "model.path"), ("datastores", "path")])
def test_a_missing_part_is_named_with_its_place(
    toy_system: Path, tmp_path: Path, part: str, named: str
) -> None:
    (tmp_path / part).rename(tmp_path / "gone")
    with pytest.raises(SavedSystemError, match=named) as raised:
        Translator.load(toy_system)
    assert str(tmp_path / part) in str(raised.value)
    assert "pack" in str(raised.value)


def test_other_weights_under_the_same_name_are_noticed(
    toy_system: Path,
    tiny_model: Transformer,
    toy_datamodule: ParallelDataModule,
    plain_model: Path,
    tmp_path: Path,
) -> None:
    with torch.no_grad():
        tiny_model.output_projection.weight += 1.0
    save_checkpoint(tiny_model, toy_datamodule.tokenizer, plain_model)
    for use in (Translator.load, lambda run: System.load(run).pack(tmp_path / "packed")):
        with pytest.raises(SavedSystemError, match="weights") as raised:
            use(toy_system)  # type: ignore[operator]
        assert str(plain_model) in str(raised.value)
    assert not (tmp_path / "packed").exists()


def test_a_rebuilt_datastore_is_noticed(toy_system: Path) -> None:
    edit(toy_system, lambda content: content["retrieval"]["datastore"].update(keys="0" * 64))
    with pytest.raises(SavedSystemError, match=r"retrieval\.datastore\.keys"):
        Translator.load(toy_system)


def test_a_damaged_datastore_is_noticed(toy_system: Path, toy_retrieval: Retrieval) -> None:
    path = toy_retrieval.datastore.directory / "values.npy"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DatastoreError, match=r"values\.npy"):
        Translator.load(toy_system)


MISTAKES: dict[str, tuple[Edit, str]] = {
    "another format": (lambda c: c.update(format=2), "format 2"),
    "no model": (lambda c: c.pop("model"), "model"),
    "a number as a path": (lambda c: c["model"].update(path=5), r"model\.path is 5"),
    "an unknown search": (lambda c: c["search"].update(depth=3), "depth"),
    "an impossible search": (lambda c: c["search"].update(beam_size=0), "beam_size"),
    "an unknown combiner": (lambda c: c["retrieval"]["combiner"].update(kind="x"), "combiner.kind"),
    "an impossible combiner": (
        lambda c: c["retrieval"]["combiner"].update(knn_weight=2.0),
        "combiner",
    ),
    "an unknown metric": (lambda c: c["retrieval"]["index"].update(metric="cosine"), "cosine"),
    "an unknown precision": (lambda c: c.update(precision="8-true"), "8-true"),
    "retrieval that is text": (lambda c: c.update(retrieval="yes"), "retrieval"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_value_is_named(toy_system: Path, mistake: str) -> None:
    change, named = MISTAKES[mistake]
    edit(toy_system, change)
    with pytest.raises(SavedSystemError, match=named):
        Translator.load(toy_system)


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe", b"5", b"!!python/object:os.system {}"])
def test_a_damaged_file_is_named(toy_system: Path, content: bytes) -> None:
    file = toy_system / "system" / "system.yaml"
    file.write_bytes(content)
    with pytest.raises(SavedSystemError, match=r"system\.yaml"):
        System.load(toy_system)


def test_a_run_without_a_system_names_its_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "best.ckpt").write_bytes(b"")
    with pytest.raises(SavedSystemError, match=r"checkpoints/best\.ckpt"):
        Translator.load(tmp_path / "run")


def test_nothing_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(SavedSystemError, match="nowhere"):
        System.load(tmp_path / "nowhere")
    with pytest.raises(UnknownFormatError, match="nowhere"):
        Translator.load(tmp_path / "nowhere")


# ------------------------------------------------------------------------- packed files


@pytest.fixture
def packed(toy_system: Path, tmp_path: Path) -> Path:
    System.load(toy_system).pack(tmp_path / "packed")
    return tmp_path / "packed"


def rewrite(path: Path, change: Callable[[dict[str, bytes]], object]) -> None:
    """Changes the members of a packed system."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def listed(members: dict[str, bytes], name: str, content: bytes) -> None:
    """Adds a member that system.yaml lists."""
    settings = yaml.safe_load(members["system.yaml"])
    settings["files"][name] = {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    members[name] = content
    members["system.yaml"] = yaml.safe_dump(settings).encode()


DAMAGES: dict[str, tuple[Callable[[dict[str, bytes]], object], str]] = {
    "a changed part": (
        lambda m: m.update({"datastore/values.npy": bytes(len(m["datastore/values.npy"]))}),
        "values.npy",
    ),
    "a longer part": (
        lambda m: m.update({"datastore/values.npy": m["datastore/values.npy"] + b"0"}),
        "values.npy",
    ),
    "a missing part": (lambda m: m.pop("model.ckpt"), "model.ckpt"),
    "an additional part": (lambda m: m.update({"more": b""}), "more"),
    "a path upwards": (lambda m: listed(m, "../evil", b"x"), r"\.\./evil"),
    "an absolute path": (lambda m: listed(m, "/tmp/evil", b"x"), "/tmp/evil"),
    "a drive": (lambda m: listed(m, "c:evil", b"x"), "c:evil"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_packed_file_that_is_not_as_it_was_is_rejected(
    packed: Path, cache: Path, tmp_path: Path, damage: str
) -> None:
    change, named = DAMAGES[damage]
    rewrite(packed, change)
    with pytest.raises(SavedSystemError, match=named):
        Translator.load(packed)
    assert not list((cache / "systems").iterdir())
    assert not list(tmp_path.rglob("evil"))


def test_a_link_in_a_packed_file_is_rejected(packed: Path, cache: Path) -> None:
    rewrite(packed, lambda members: listed(members, "link", b"/etc/passwd"))
    with zipfile.ZipFile(packed) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = ((stat.S_IFLNK if name == "link" else stat.S_IFREG) | 0o644) << 16
            archive.writestr(info, content)
    with pytest.raises(SavedSystemError, match="link"):
        Translator.load(packed)
    assert not list((cache / "systems").iterdir())


@pytest.mark.parametrize("place", [0.1, 0.4, 0.6])
def test_damaged_bytes_are_noticed(packed: Path, cache: Path, place: float) -> None:
    content = bytearray(packed.read_bytes())
    start = int(place * len(content))
    content[start : start + 64] = bytes(64)
    packed.write_bytes(content)
    with pytest.raises(SavedSystemError, match="damaged"):
        Translator.load(packed)
    assert not list((cache / "systems").iterdir())


def test_a_truncated_packed_file_is_no_system(packed: Path) -> None:
    packed.write_bytes(packed.read_bytes()[:-100])
    with pytest.raises(UnknownFormatError, match="packed"):
        Translator.load(packed)


def test_packing_is_whole_or_not_at_all(
    toy_system: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"old")

    def fail(self: Path, other: Path) -> Path:
        raise OSError("no")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no"):
        System.load(toy_system).pack(target)
    assert target.read_bytes() == b"old"
    assert not list(tmp_path.glob(".target*"))


def test_unpacking_needs_room(packed: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(packed)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(SavedSystemError, match="LIGHTNING_KNNMT_CACHE"):
        Translator.load(packed)
    assert not list((cache / "systems").iterdir())


def test_a_packed_system_holds_no_path_of_this_machine(packed: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(packed) as archive:
        for name in archive.namelist():
            assert os.fsencode(tmp_path) not in archive.read(name), name
        assert json.loads(archive.read("datastore/manifest.json"))["complete"]
