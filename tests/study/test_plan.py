"""A study file becomes runs; mistakes in it, and missing texts, are named before anything runs."""

from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_knnmt.study.__main__ import main
from lightning_knnmt.study.plan import (
    Study,
    StudyError,
    chosen,
    new_run,
    require_files,
    text_digest,
)
from lightning_knnmt.study.study_file import PARTS, STUDY_KEYS, read_study
from lightning_knnmt.study.study_file import __doc__ as STUDY_DOC

ROOT = Path(__file__).parents[2]
MINIMAL = "domains: {d: []}\nmethods: {M: {}}\n"
TEXTS = """
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


def test_methods_and_domains_are_read(new_study: Callable[..., Study], tmp_path: Path) -> None:
    study = new_study()
    assert list(study.domains) == ["one", "two"]
    assert study.domains["one"] == (f"data.root={tmp_path}/data/one",)
    assert study.methods["Adapter 64"].trials() == [("lr=0.1",), ("lr=0.25",), ("lr=0.9",)]
    assert study.methods["NMT"].trials() == []


def test_the_documented_study_can_be_read(new_study: Callable[..., Study]) -> None:
    example = STUDY_DOC.split("file:\n")[1].split("\nOnly domains")[0]
    study = new_study(example.replace("overrides: [...]", "overrides: []"))
    assert all(f"    {key}:" in example for key in STUDY_KEYS)
    assert study.baselines == ("NMT", "FT")
    assert study.comparisons == (("AK-MT + Adapter 64", "Adapter 64"),)
    assert all(f"{part} " in STUDY_DOC for part in PARTS)


def test_baselines_are_named_or_the_first_method(new_study: Callable[..., Study]) -> None:
    methods = "domains: {d: []}\nmethods: {small: {}, large: {}, tuned: {}}\n"
    assert new_study(methods).baselines == ("small",)
    assert new_study(methods + "baselines: [large, small]").baselines == ("large", "small")


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
    ("domains", "methods", "words"),
    [
        (["three"], None, ("'three'", "one, two")),
        (None, ["FT"], ("'FT'", "NMT")),
        (None, ["Adapter 128"], ("'Adapter 128'", "'Adapter 64'", "select")),
    ],
)
def test_what_is_not_there_cannot_be_selected(
    new_study: Callable[..., Study],
    domains: list[str] | None,
    methods: list[str] | None,
    words: tuple[str, ...],
) -> None:
    with pytest.raises(StudyError) as raised:
        new_study().select(domains, methods)
    assert all(word in str(raised.value) for word in words)


def test_the_domain_that_values_are_chosen_on_is_needed(new_study: Callable[..., Study]) -> None:
    study = new_study("domains: {one: [], two: []}\nmethods: {M: {}}\nchoose_on: one")
    assert list(study.select(["one"], None).domains) == ["one"]
    with pytest.raises(StudyError, match=r"'one'.*select"):
        study.select(["two"], None)
    assert list(chosen("domain", study.domains, ["two"])) == ["two"]  # what analyses ask for


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a", ("mapping", "domains", "methods")),
        ("a: [", ("YAML",)),
        ("domain: {}", ("'domain'", "domains")),
        ("domains: {d: []}", ("domain", "method")),
        ("domains: {d: []}\nmethods: {M: {override: []}}", ("'M'", "'override'", "overrides")),
        ("domains: {d: []}\nmethods: {M: 3}", ("'M'", "3", "overrides")),
        ("domains: {d: []}\nmethods: [M]", ("methods", "['M']")),
        ("domains: [d]\nmethods: {M: {}}", ("domains", "['d']")),
        ("domains: {d: a=b}\nmethods: {M: {}}", ("d ", "'a=b'", "[ ]")),
        ("domains: {d: []}\nmethods: {M: {overrides: fit=false}}", ("'M'", "'fit=false'", "[ ]")),
        (f"{MINIMAL}overrides: {{fit: false}}", ("overrides", "'fit'", "[ ]")),
        ("domains: {d: []}\nmethods: {M: {choose: {lr: 1e-3}}}", ("lr", "'1e-3'", "[ ]")),
        ("domains: {d: []}\nmethods: {M: {choose: {lr: []}}}", ("'M'", "lr")),
        ("domains: {d: []}\nmethods: {M: {choose: [lr]}}", ("choose", "'M'", "['lr']")),
        (
            "domains: {d: []}\nmethods: {M: {choose: {lr: [1]}, overrides: [fit=false]}}",
            ("'M'", "fit=false"),
        ),
        (
            "domains: {d: []}\nmethods: {M: {overrides: [fit=false]}, N: {model_of: M}}",
            ("'N'", "'M'", "fit=false", "model_of"),
        ),
        (
            "domains: {d: []}\nmethods: {M: {pilot_batches: many}}",
            ("pilot_batches", "'M'", "'many'"),
        ),
        (f"{MINIMAL}tests: {{a b: c}}", ("'a b'",)),
        ("domains: {d: []}\nmethods: {M: {model_of: N}, N: {}}", ("model_of", "'M'", "'N'")),
        (f"{MINIMAL}choose_on: e", ("choose_on", "'e'")),
        (f"{MINIMAL}baselines: [NMT]", ("baselines", "'NMT'", "M")),
        (f"{MINIMAL}baselines: M", ("baselines", "'M'", "[ ]")),
        (f"{MINIMAL}analyses: {{base: NMT}}", ("analyses", "'NMT'", "M")),
        (f"{MINIMAL}analyses: {{general_text: M}}", ("analyses", "'general_text'", "base")),
        (f"{MINIMAL}comparisons: [[M, N]]", ("comparisons", "['M', 'N']")),
        (f"{MINIMAL}comparisons: [M]", ("comparisons", "'M'")),
        (f"{MINIMAL}analysed_sentences: 0", ("analysed_sentences", "0", "1")),
    ],
)
def test_mistakes_are_named(
    new_study: Callable[..., Study], text: str, words: tuple[str, ...]
) -> None:
    with pytest.raises(StudyError) as raised:
        new_study(text)
    said = str(raised.value)
    assert "toy.yaml" in said
    assert all(word in said for word in words), said


def test_what_braces_stand_for_must_be_given(tmp_path: Path) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text("domains: {d: ['data.root={data}/d']}\nmethods: {M: {}}")
    with pytest.raises(StudyError, match=r"\{data\}.*--data"):
        read_study(path, None)
    path.write_text("domains: {d: ['model.path={model}']}\nmethods: {M: {}}")
    with pytest.raises(StudyError, match=r"\{model\}.*--model"):
        read_study(path, None)


def test_a_study_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"nowhere\.yaml.*studies/"):
        read_study(tmp_path / "nowhere.yaml", None)
    with pytest.raises(StudyError, match=str(tmp_path)):
        read_study(tmp_path, None)


def test_what_is_left_empty_is_empty(new_study: Callable[..., Study]) -> None:
    study = new_study("domains: {d: }\nmethods: {M: }\ntests:\nanalyses:\noverrides:")
    assert (study.tests, study.overrides, study.domains["d"]) == ({}, (), ())


@pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_studies_that_come_along_are_sound(path: Path) -> None:
    study = read_study(path, Path("/data"), Path("/model"))
    assert study.description
    assert study.methods[study.baselines[0]].overrides == ("fit=false",)
    head = path.read_text().split("description:")[0]
    assert f"studies/{path.name}" in head
    assert ("not public" in head) != ("lightning-knnmt data" in head)  # where its text is from


@pytest.fixture
def study(new_study: Callable[..., Study], tmp_path: Path) -> Study:
    study = new_study(TEXTS)
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
    with pytest.raises(StudyError, match=str(path)):
        require_files(study)
    with pytest.raises(SystemExit, match=str(path)):
        main([str(tmp_path / "toy.yaml"), "--data", str(tmp_path / "data")])


@pytest.mark.parametrize("option", ["--data", "--model"])
def test_folders_that_options_name_must_be_there(study: Study, tmp_path: Path, option: str) -> None:
    with pytest.raises(SystemExit, match=f"nowhere.*{option}"):
        main([str(tmp_path / "toy.yaml"), option, str(tmp_path / "nowhere")])


def test_a_text_that_changed_has_another_digest(study: Study, tmp_path: Path) -> None:
    before = text_digest(str(tmp_path / "data" / "much"), "en")
    assert before == text_digest(str(tmp_path / "data" / "much"), "en") != ""
    (tmp_path / "data" / "much.en").write_text("other\n")
    assert text_digest(str(tmp_path / "data" / "much"), "en") != before
    assert text_digest(str(tmp_path / "data" / "nowhere"), "en") == ""
