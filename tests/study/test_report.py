"""The report repeats what the runs' files say, with intervals, costs and commands."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_knnmt.evaluation.bootstrap import paired_bootstrap
from lightning_knnmt.evaluation.scoring import Bleu, ChrF
from lightning_knnmt.study.outcomes import collect_cells, collect_costs
from lightning_knnmt.study.plan import Study, StudyError
from lightning_knnmt.study.report import write_report
from lightning_knnmt.study.runner import Runner

STUDY = """
description: A toy.
overrides: [data.target_lang=en]
tests: {news: "{data}/news", one: "{data}/few"}  # the latter for other domains only
domains: {one: ["data.root={data}/one"]}
methods:
  NMT: {overrides: [fit=false]}
  FT: {}
  Adapter 64: {overrides: [module=adapter], choose: {lr: [0.1, 0.25]}}
  AK-MT + Adapter 64: {model_of: Adapter 64, overrides: [fit=false]}
baselines: [NMT, FT]
analyses: {base: NMT}
comparisons: [[Adapter 64, NMT], [FT, Adapter 64]]
"""
REFERENCES = ["the house is red .", "the house is blue .", "a house", "no ."]


@pytest.fixture
def runner(
    new_study: Callable[..., Study], new_runner: Callable[..., Runner], tmp_path: Path
) -> Runner:
    for name in ("news", "one/test"):
        path = tmp_path / "data" / f"{name}.en"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("".join(line + "\n" for line in REFERENCES))
    runner = new_runner(new_study(STUDY))
    runner.run()
    assert not runner.failures
    return runner


def test_differences_are_of_the_translations(runner: Runner) -> None:
    run = runner.runs["one", "Adapter 64"]
    better = [line + "\n" for line in REFERENCES]
    (run.directory / "hypotheses.own-test.NMT.txt").write_text("".join(better))
    cells = {(c.method, c.test_set): c for c in collect_cells(runner.study, runner.runs)}
    assert len(cells) == 4 * 2
    base = ["the house is red ."] * 3 + ["no ."]
    found = cells["Adapter 64", "one"].differences
    assert found["bleu", "NMT"] == paired_bootstrap(REFERENCES, base, REFERENCES, Bleu("13a"))
    assert found["chrf", "FT"] == paired_bootstrap(REFERENCES, base, REFERENCES, ChrF())
    assert cells["NMT", "one"].differences.keys() == {("bleu", "FT"), ("chrf", "FT")}
    pair = cells["FT", "one"].differences["bleu", "Adapter 64"]
    assert pair == paired_bootstrap(base, REFERENCES, REFERENCES, Bleu("13a"))
    assert cells["NMT", "one"].is_in_domain
    assert not cells["NMT", "news"].is_in_domain


def test_a_line_that_decides_is_named_and_left_out(runner: Runner, tmp_path: Path) -> None:
    dots = " ".join(["."] * 300)
    references = [*REFERENCES * 10, dots]
    for method in ("NMT", "FT", "Adapter 64", "AK-MT + Adapter 64"):
        ours = ["the house is red .", "the home is blue .", "a house", "no ."] * 10 + [dots]
        if method == "FT":
            ours = [*REFERENCES * 10, "no"]
        directory = runner.runs["one", method].directory
        (directory / "hypotheses.own-test.NMT.txt").write_text("".join(h + "\n" for h in ours))
    (tmp_path / "data" / "one" / "test.en").write_text("".join(r + "\n" for r in references))
    cells = collect_cells(runner.study, runner.runs)
    found = {(cell.method, cell.test_set): cell.without for cell in cells}
    assert {test_set for (_, test_set), without in found.items() if without} == {"one"}
    tuned = found["FT", "one"]
    assert tuned is not None
    assert (tuned.line, tuned.bleu) == (41, pytest.approx(100))
    base = ["the house is red .", "the home is blue .", "a house", "no ."] * 10
    expected = paired_bootstrap(REFERENCES * 10, base, REFERENCES * 10, Bleu("13a"))
    assert tuned.differences["NMT"] == expected

    path = write_report(
        tmp_path / "report",
        runner.study,
        cells,
        collect_costs(runner.study, runner.runs, runner.chosen),
        command="python -m study",
        machine="a machine",
    )
    assert "Line 41 of one's test set" in path.read_text()
    assert "| FT | 100.00 | +" in path.read_text()
    facts = json.loads(path.with_suffix(".json").read_text())["systems"]
    assert {fact["without"]["line"] for fact in facts if fact["on"] == "one"} == {41}


def test_every_number_is_in_the_report(runner: Runner, tmp_path: Path) -> None:
    study = runner.study
    path = write_report(
        tmp_path / "report",
        study,
        collect_cells(study, runner.runs),
        collect_costs(study, runner.runs, runner.chosen),
        command="python -m study",
        machine="a machine",
        failures=["two · FT failed."],
        hide={str(tmp_path): "HERE"},
        sections=["## More"],
        analyses={"one": {"speed": {"FT": 0.875}}},
    )
    text = path.read_text()
    assert str(tmp_path) not in text
    for expected in (
        *("# toy", "A toy.", "python -m study", "- two · FT failed.", "## More", "`b`", "`c`"),
        "| method | BLEU | against NMT | against FT | chrF | against NMT | against FT |",
        "| method | BLEU on news | chrF on news |",
        "| pair | on one | on news |",
        "| Adapter 64 against NMT | +0.00 [+0.00, +0.00] | +0.00 [+0.00, +0.00] |",
        "| AK-MT + Adapter 64 against FT | +0.00 [+0.00, +0.00] |",
        "| FT | 64 | 80 s | 0.88 |",
        "decoding speed / NMT",
        "| Adapter 64 | 17.00 |",  # as the stand-in says: 10 and the letters of "adapter"
        "| AK-MT + Adapter 64 | 64 |",  # what was trained is its adapters
        "| lr=0.25 |",
        "data.root=HERE/data/one",
    ):
        assert expected in text
    figure = tmp_path / "report" / "toy" / "one-domain-scores.png"
    assert "](toy/one-domain-scores.png)" in text
    assert figure.read_bytes().startswith(b"\x89PNG")
    content = json.loads(path.with_suffix(".json").read_text())
    assert content["analyses"] == {"one": {"speed": {"FT": 0.875}}}
    facts = content["systems"]
    assert len(facts) == 8
    assert facts[0]["system"] == "NMT"
    assert facts[4]["training"]["trained_parameters"] == 64
    assert "bleu against FT" in facts[4]


def test_a_text_that_changed_since_is_named(runner: Runner, tmp_path: Path) -> None:
    with (tmp_path / "data" / "news.en").open("a") as file:
        file.write("one more\n")
    with pytest.raises(StudyError, match=r"news.* 5 .*one · NMT.* 4.*[Dd]elete"):
        collect_cells(runner.study, runner.runs)


def test_missing_references_are_named(runner: Runner, tmp_path: Path) -> None:
    (tmp_path / "data" / "news.en").unlink()
    with pytest.raises(StudyError, match=r"news\.en"):
        collect_cells(runner.study, runner.runs)


def test_a_missing_baseline_is_named(runner: Runner, tmp_path: Path) -> None:
    study = runner.study.select(None, ["NMT", "Adapter 64"])
    path = write_report(
        tmp_path,
        study,
        collect_cells(study, runner.runs),
        collect_costs(study, runner.runs, runner.chosen),
        command="python -m study",
        machine="a machine",
    )
    text = path.read_text()
    assert "No differences to FT" in text
    assert "| method | BLEU | against NMT | chrF | against NMT |" in text
