"""A study file becomes runs; whatever is wrong with it or its texts is told in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_knnmt.study.__main__ import main
from lightning_knnmt.study.plan import Study, StudyError, chosen, digest, new_run, require_files
from lightning_knnmt.study.study_file import read_study

ROOT = Path(__file__).parents[2]


def test_methods_and_domains_are_read(new_study: Callable[..., Study], tmp_path: Path) -> None:
    study = new_study()
    assert list(study.domains) == ["one", "two"]
    assert study.domains["one"] == (f"data.root={tmp_path}/data/one",)
    assert study.methods["Adapter 64"].trials() == [("lr=0.1",), ("lr=0.25",), ("lr=0.9",)]
    assert study.methods["NMT"].trials() == []


def test_all_combinations_are_tried(new_study: Callable[..., Study]) -> None:
    text = "domains: {d: []}\nmethods: {M: {choose: {a: [1, 2], b: [x, y]}}}"
    trials = new_study(text).methods["M"].trials()
    assert trials == [("a=1", "b=x"), ("a=1", "b=y"), ("a=2", "b=x"), ("a=2", "b=y")]


def test_every_command_has_its_own_folder(tmp_path: Path) -> None:
    runs = [
        new_run("it", "FT", ("lr=1",), tmp_path, {}),
        new_run("it", "FT", ("lr=2",), tmp_path, {}),
        new_run("it", "FT", ("lr=1",), tmp_path, {"news": "x"}),
        new_run("it", "FT", ("lr=1",), tmp_path, None, ("lr=1",)),
        new_run("it", "FT", ("lr=1",), tmp_path, {}, inputs="x"),
    ]
    assert len({run.directory for run in runs}) == len(runs)
    assert runs[0] == new_run("it", "FT", ("lr=1",), tmp_path, {})


def test_a_part_of_a_study(new_study: Callable[..., Study]) -> None:
    part = new_study().select(["two"], ["NMT"])
    assert (list(part.domains), list(part.methods)) == (["two"], ["NMT"])


@pytest.mark.parametrize(
    ("domains", "methods", "message"),
    [
        (["three"], None, "no domain 'three'; it has one, two"),
        (None, ["FT"], "no method 'FT'; it has NMT"),
        (None, ["Adapter 128"], "'Adapter 128' needs 'Adapter 64': select both"),
    ],
)
def test_what_is_not_there_cannot_be_selected(
    new_study: Callable[..., Study],
    domains: list[str] | None,
    methods: list[str] | None,
    message: str,
) -> None:
    with pytest.raises(StudyError, match=message):
        new_study().select(domains, methods)


def test_the_domain_that_values_are_chosen_on_is_needed(new_study: Callable[..., Study]) -> None:
    study = new_study("domains: {one: [], two: []}\nmethods: {M: {}}\nchoose_on: one")
    assert list(study.select(["one"], None).domains) == ["one"]
    with pytest.raises(StudyError, match="chooses values on the domain 'one': select it too"):
        study.select(["two"], None)
    assert list(chosen("domain", study.domains, ["two"])) == ["two"]  # what analyses ask for


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "must be a mapping with the keys"),
        ("a: [", "is not YAML"),
        ("domain: {}", "unknown key 'domain'; known are"),
        ("domains: {d: []}", "at least one domain and one method"),
        ("domains: {d: []}\nmethods: {M: {override: []}}", "'M' has the unknown key 'override'"),
        ("domains: {d: []}\nmethods: {M: 3}", "'M' must be a mapping with the keys .*, not 3"),
        ("domains: {d: []}\nmethods: [M]", r"methods must be a mapping, not \['M'\]"),
        ("domains: [d]\nmethods: {M: {}}", r"domains must be a mapping, not \['d'\]"),
        ("domains: {d: a=b}\nmethods: {M: {}}", "d must be a list of overrides, not 'a=b': put it"),
        (
            "domains: {d: []}\nmethods: {M: {overrides: fit=false}}",
            "overrides of 'M' must be a list of overrides, not 'fit=false'",
        ),
        (
            "domains: {d: []}\nmethods: {M: {}}\noverrides: {fit: false}",
            "overrides must be a list of overrides, not {'fit': False}",
        ),
        (
            "domains: {d: []}\nmethods: {M: {choose: {lr: 1e-3}}}",
            "lr must be a list of values, not '1e-3'",
        ),
        ("domains: {d: []}\nmethods: {M: {choose: {lr: []}}}", "no value of lr to choose"),
        ("domains: {d: []}\nmethods: {M: {choose: [lr]}}", "choose of 'M' must be a mapping"),
        (
            "domains: {d: []}\nmethods: {M: {choose: {lr: [1]}, overrides: [fit=false]}}",
            "'M' has fit=false, so that it trains nothing to choose by",
        ),
        (
            "domains: {d: []}\nmethods: {M: {overrides: [fit=false]}, N: {model_of: M}}",
            "model_of of 'N' is 'M', but that has fit=false and leaves no model",
        ),
        (
            "domains: {d: []}\nmethods: {M: {pilot_batches: many}}",
            "pilot_batches of 'M' is 'many', but it must be a whole number of at least 1",
        ),
        ("domains: {d: []}\nmethods: {M: {}}\ntests: {a b: c}", "the test set 'a b' needs a name"),
        (
            "domains: {d: []}\nmethods: {M: {model_of: N}, N: {}}",
            "model_of of 'M' is 'N', but it must be a method that stands above it: none does",
        ),
        (
            "domains: {d: []}\nmethods: {M: {}}\nchoose_on: e",
            "choose_on names 'e', which is no domain of the study",
        ),
        (
            "domains: {d: []}\nmethods: {M: {}}\ncomparisons: [[M, N]]",
            r"comparisons has \['M', 'N'\], but each must be two methods of the study",
        ),
        (
            "domains: {d: []}\nmethods: {M: {}}\ncomparisons: [M]",
            "comparisons has 'M', but each must be two methods of the study",
        ),
        (
            "domains: {d: []}\nmethods: {M: {}}\nanalysed_sentences: 0",
            "analysed_sentences is 0, but it must be a whole number of at least 1",
        ),
    ],
)
def test_mistakes_are_named(new_study: Callable[..., Study], text: str, message: str) -> None:
    with pytest.raises(StudyError, match=message):
        new_study(text)


def test_the_data_folder_must_be_named(tmp_path: Path) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text("domains: {d: ['data.root={data}/d']}\nmethods: {M: {}}")
    with pytest.raises(StudyError, match="say what that is with --data"):
        read_study(path, None)
    with pytest.raises(StudyError, match=r"There is no study .*nowhere"):
        read_study(tmp_path / "nowhere.yaml", None)
    with pytest.raises(StudyError, match="cannot be read: Is a directory"):
        read_study(tmp_path, None)


def test_what_is_left_empty_is_empty(new_study: Callable[..., Study]) -> None:
    study = new_study("domains: {d: }\nmethods: {M: }\ntests:\nanalyses:\noverrides:")
    assert (study.tests, study.overrides, study.domains["d"]) == ({}, (), ())


@pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_studies_in_conf_are_sound(path: Path) -> None:
    study = read_study(path, Path("/data"), Path("/model"))
    assert study.description
    assert study.methods["NMT"].overrides == ("fit=false",)


STUDY = """
overrides: [data=text, data.source_lang=de, data.target_lang=en]
tests: {news: "{data}/news"}
general_text: "{data}/much"
domains: {one: ["data.root={data}/one", data.test=short]}
methods: {NMT: {overrides: [fit=false]}}
"""
FILES = [
    *(f"one/{split}.{lang}" for split in ("train", "valid", "short") for lang in ("de", "en")),
    *("news.de", "news.en", "much.en"),
]


@pytest.fixture
def study(new_study: Callable[..., Study], tmp_path: Path) -> Study:
    study = new_study(STUDY)
    for name in FILES:
        path = tmp_path / "data" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{name}\n")
    return study


@pytest.mark.parametrize("name", FILES)
def test_every_text_is_looked_for(study: Study, tmp_path: Path, name: str) -> None:
    require_files(study)
    path = tmp_path / "data" / name
    path.unlink()
    with pytest.raises(StudyError, match=f"There is no {path}, .* nothing was run"):
        require_files(study)
    with pytest.raises(SystemExit, match=f"There is no {path}"):
        main([str(tmp_path / "toy.yaml"), "--data", str(tmp_path / "data")])


def test_folders_that_options_name_must_be_there(study: Study, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"There is no .*nowhere, which --data names"):
        main([str(tmp_path / "toy.yaml"), "--data", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match=r"There is no .*nowhere, which --model names"):
        main([str(tmp_path / "toy.yaml"), "--model", str(tmp_path / "nowhere")])


def test_a_text_that_changed_has_another_digest(study: Study, tmp_path: Path) -> None:
    before = digest(str(tmp_path / "data" / "much"), "en")
    assert before == digest(str(tmp_path / "data" / "much"), "en") != ""
    (tmp_path / "data" / "much.en").write_text("other\n")
    assert digest(str(tmp_path / "data" / "much"), "en") != before
    assert digest(str(tmp_path / "data" / "nowhere"), "en") == ""
