"""Results on disk and on the console."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from lightning_knnmt.evaluation import results
from lightning_knnmt.evaluation.bootstrap import Difference, paired_bootstrap
from lightning_knnmt.evaluation.comparison import (
    choose_examples,
    describe_difference,
    describe_retrieval,
    print_comparison,
    side_by_side,
)
from lightning_knnmt.evaluation.results import ResultRow, ResultsError, read_results, write_results

NMT = ResultRow(
    method="NMT",
    test_set="smarthome",
    bleu=44.04,
    bleu_signature="nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0",
    chrf=63.21,
    chrf_signature="nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:2.6.0",
    sentences=2,
    target_tokens=30,
    seconds=0.5,
)
KNN = dataclasses.replace(
    NMT,
    method="kNN-MT",
    bleu=48.26,
    chrf=66.0,
    k=32,
    knn_weight=0.5,
    temperature=100.0,
    metric="l2",
    index="exact (l2, cpu)",
    recall_at_k=1.0,
    datastore_entries=207_912,
    datastore_bytes=107_282_848,
)
LINES = {"NMT": ["Ligue [a luz] é", ""], "kNN-MT": ["Turn on the light", "Señal"]}
ISSUE_KEYS = (
    "method test_set bleu bleu_signature chrf chrf_signature sentences target_tokens seconds"
)
ISSUE_KNN_KEYS = (
    "k knn_weight temperature metric index recall_at_k datastore_entries datastore_bytes"
)


def screen(width: int = 160) -> Console:
    return Console(file=io.StringIO(), width=width)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_results_json_is_a_list_of_rows_with_the_promised_keys(tmp_path: Path) -> None:
    write_results(tmp_path / "outputs" / "demo", [NMT, KNN], LINES)
    text = (tmp_path / "outputs" / "demo" / "results.json").read_text(encoding="utf-8")
    plain, knn = json.loads(text)
    assert list(plain) == ISSUE_KEYS.split()
    assert list(knn) == ISSUE_KEYS.split() + ISSUE_KNN_KEYS.split()
    assert plain["bleu"] == 44.04
    assert knn["datastore_entries"] == 207_912
    assert read_results(tmp_path / "outputs" / "demo") == [NMT, KNN]


def test_hypotheses_are_one_file_a_method_and_other_letters_stay(tmp_path: Path) -> None:
    rows = [dataclasses.replace(row, test_set="../maçã/x") for row in (NMT, KNN)]
    write_results(tmp_path, rows, LINES)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "hypotheses...-maçã-x.NMT.txt",
        "hypotheses...-maçã-x.kNN-MT.txt",
        "results.json",
    ]
    text = results.hypotheses_path(tmp_path, rows[0]).read_text(encoding="utf-8")
    assert text == "Ligue [a luz] é\n\n"
    assert "maçã" in (tmp_path / "results.json").read_text(encoding="utf-8")


def test_a_later_run_replaces_its_own_rows_and_keeps_the_others(tmp_path: Path) -> None:
    write_results(tmp_path, [NMT, KNN], LINES)
    other = dataclasses.replace(NMT, test_set="office-help")
    write_results(tmp_path, [other], {"NMT": ["a", "b"]})
    again = dataclasses.replace(NMT, bleu=45.0)
    write_results(tmp_path, [again], {"NMT": ["c", "d"]})
    assert read_results(tmp_path) == [again, KNN, other]
    assert results.hypotheses_path(tmp_path, NMT).read_text() == "c\nd\n"
    assert results.hypotheses_path(tmp_path, other).read_text() == "a\nb\n"


def test_a_run_that_stops_while_writing_leaves_the_old_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_results(tmp_path, [NMT], {"NMT": LINES["NMT"]})

    def stop(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("lightning_knnmt.evaluation.results.os.replace", stop)
        with pytest.raises(KeyboardInterrupt):
            write_results(tmp_path, [KNN], {"kNN-MT": LINES["kNN-MT"]})
    assert read_results(tmp_path) == [NMT]


def test_writing_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="not of different methods on one test set"):
        write_results(tmp_path, [NMT, dataclasses.replace(KNN, test_set="x")], LINES)
    with pytest.raises(ResultsError, match=r"rows of \['NMT'\] but translations of \['kNN-MT'\]"):
        write_results(tmp_path, [NMT], {"kNN-MT": ["a", "b"]})
    with pytest.raises(ResultsError, match="NMT has 2 sentences but 1 translations: give one"):
        write_results(tmp_path, [NMT], {"NMT": ["a"]})
    with pytest.raises(ResultsError, match="Translation 2 of NMT has a line break"):
        write_results(tmp_path, [NMT], {"NMT": ["a", "b\nc"]})
    assert list(tmp_path.iterdir()) == []


def test_reading_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match=r"results\.json does not exist"):
        read_results(tmp_path)
    path = tmp_path / "results.json"
    path.write_text('[{"method": "NMT", "blue": 3}]', encoding="utf-8")
    with pytest.raises(
        ResultsError, match=r"not a list of rows .*'blue'.*with these keys: method, "
    ):
        read_results(tmp_path)
    path.write_text("[", encoding="utf-8")
    with pytest.raises(ResultsError, match="not a list of rows"):
        write_results(tmp_path, [NMT], {"NMT": LINES["NMT"]})


def test_speeds_follow_from_the_row() -> None:
    assert NMT.sentences_per_second == 4
    assert NMT.tokens_per_second == 60


def test_differences_and_retrieval_in_words() -> None:
    assert describe_difference(Difference("bleu", 4.22, 3.51, 4.9, 0.000999, 1000, 3, 4.1)) == (
        "BLEU +4.2, 95 % interval [+3.5, +4.9] by paired bootstrap: clear of zero"
    )
    assert describe_difference(Difference("chrf", -0.2, -0.9, 0.4, 0.3, 10, 118, 0.51)) == (
        "chrF -0.2, 95 % interval [-0.9, +0.4] by paired bootstrap: may be chance; "
        "it hangs on line 118: +0.5 without it"
    )
    assert describe_retrieval(KNN) == (
        "k = 32; λ = 0.5; T = 100; index exact (l2, cpu); recall@32 1.000; "
        "datastore 207,912 entries; 102.3 MiB"
    )


LONG = " ".join(f"word{number}" for number in range(40))
SOURCES = [f"fonte {number}" for number in range(8)]
REFERENCES = [
    "Turn on the light in the kitchen",
    "Turn on the light in the bathroom",
    "Select the device that you want to add",
    "Yes",
    "The battery of this sensor is low",
    LONG,
    "Choose a [bold]name[/bold] for your new zone",
    "Your password must be changed before tomorrow",
]
BASE = [
    "Connect the light of the cooking",
    "Connect the light of the bath",
    "Select the device which you wish to add",
    "No",
    "The battery of this sensor is low",
    "nothing",
    "Pick a [bold]title[/bold] for the zone",
    "Your password must be changed before tomorrow",
]
SYSTEM = [
    "Turn on the light in the kitchen",
    "Turn on the light in the bathroom",
    "Select the device that you want to add",
    "Yes",
    "The battery of this sensor is low",
    LONG,
    "Choose a [bold]name[/bold] for your zone",
    "Your key has changed",
]


def test_examples_are_of_medium_length_distinct_and_the_largest_first() -> None:
    better, worse = choose_examples(SOURCES, REFERENCES, BASE, SYSTEM)
    assert sorted(example.line for example in better) == [1, 3, 7]  # 2 says nearly what 1 says
    assert [x.gain for x in better] == sorted((x.gain for x in better), reverse=True)
    assert [example.line for example in worse] == [8]
    assert worse[0].gain < 0
    assert worse[0].source == "fonte 7"
    assert worse[0].base == BASE[7]
    assert worse[0].system == SYSTEM[7]


def test_others_are_examples_only_when_medium_ones_run_out() -> None:
    better, worse = choose_examples(SOURCES, REFERENCES, BASE, SYSTEM, better=9, worse=9)
    assert [example.line for example in better[3:]] == [4, 6]  # still without 2
    assert [example.line for example in worse] == [8]
    assert choose_examples(SOURCES, REFERENCES, BASE, BASE) == ([], [])


def test_side_by_side_shows_texts_as_they_are() -> None:
    console = screen()
    side_by_side(console, SOURCES, REFERENCES, BASE, SYSTEM, better=3, worse=1)
    text = shown(console)
    assert "Choose a [bold]name[/bold] for your new zone" in text
    assert "Choose a [bold]name[/bold] for your zone" in text
    assert text.index("for the better") < text.index("fonte 6") < text.index("for the worse")
    assert text.index("for the worse") < text.index("Your key has changed")
    assert "Chosen by sentence chrF" in text

    console = screen()
    side_by_side(console, SOURCES, REFERENCES, BASE, BASE)
    assert shown(console).count("no sentence") == 2


def test_examples_need_the_same_lines() -> None:
    with pytest.raises(ResultsError, match="8 sources, 8 references and 7 and 8 translations"):
        choose_examples(SOURCES, REFERENCES, BASE[1:], SYSTEM)


def test_the_comparison_says_everything_the_demo_promises() -> None:
    console = screen()
    rows = [dataclasses.replace(row, sentences=8) for row in (NMT, KNN)]
    hypotheses = {"NMT": BASE, "kNN-MT": SYSTEM}
    print_comparison(console, rows, hypotheses, SOURCES, REFERENCES)
    lines = shown(console).splitlines()
    assert lines[0].strip() == "smarthome: 8 sentences"
    nmt, knn = (next(line for line in lines if f"│ {name} " in line) for name in ("NMT", "kNN-MT"))
    assert [cell.strip() for cell in nmt.split("│")[1:-1]] == ["NMT", "44.0", "63.2", "16.0", "60"]
    assert [cell.strip() for cell in knn.split("│")[1:4]] == ["kNN-MT", "48.3", "66.0"]
    for metric in ("bleu", "chrf"):
        found = describe_difference(paired_bootstrap(SYSTEM, BASE, REFERENCES, metric))  # type: ignore[arg-type]
        assert f"kNN-MT - NMT: {found}" in lines
    assert f"kNN-MT: {describe_retrieval(KNN)}" in lines
    assert f"BLEU|{NMT.bleu_signature}" in lines
    assert f"chrF2|{NMT.chrf_signature}" in lines
    assert "Where retrieval changed the translation for the worse" in lines


def test_one_method_alone_is_compared_with_nothing() -> None:
    console = screen()
    print_comparison(console, [NMT], {"NMT": BASE}, SOURCES, REFERENCES)
    assert "│ NMT " in shown(console)
    assert "interval" not in shown(console)
    assert "retrieval" not in shown(console)
