"""A study looks for its texts before it runs anything."""

from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_knnmt.study.__main__ import main
from lightning_knnmt.study.files import digest, require_files
from lightning_knnmt.study.plan import Study, StudyError

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
