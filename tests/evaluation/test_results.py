"""Results on disk and on the console."""

from __future__ import annotations

import dataclasses
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from lightning_knnmt.evaluation.bootstrap import Difference, paired_bootstrap
from lightning_knnmt.evaluation.comparison import (
    choose_examples,
    describe_difference,
    describe_loss,
    describe_retrieval,
    print_comparison,
    side_by_side,
)
from lightning_knnmt.evaluation.results import (
    ResultRow,
    ResultsError,
    check_results,
    hypotheses_path,
    read_results,
    text_digest,
    write_results,
    write_translations,
)
from lightning_knnmt.evaluation.scoring import Bleu, ChrF

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
    text_digest="7e87",
    model_digest="30de",
    decoding="beam_size=4; precision=32-true",
)
KNN = replace(
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
    datastore_digest="da7a",
)
LINES = {"NMT": ["Ligue [a luz] é", ""], "kNN-MT": ["Turn on the light", "Señal"]}
KEYS = "method test_set bleu bleu_signature chrf chrf_signature sentences target_tokens seconds"
KNN_KEYS = "k knn_weight temperature metric index recall_at_k datastore_entries datastore_bytes"


def screen(width: int = 160) -> Console:
    return Console(file=io.StringIO(), width=width)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def write(folder: Path, *rows: ResultRow, lines: list[str] | None = None) -> None:
    """Adds the rows, as an evaluation does."""
    for row in rows:
        write_translations(folder, *row.key, lines or LINES.get(row.method, ["a", "b"]))
    write_results(folder, rows)


def written(folder: Path, row: ResultRow) -> str:
    return hypotheses_path(folder, *row.key).read_text(encoding="utf-8")


def test_results_json_is_a_list_of_rows_with_the_promised_keys(tmp_path: Path) -> None:
    write(tmp_path / "outputs" / "demo", NMT, KNN)
    text = (tmp_path / "outputs" / "demo" / "results.json").read_text(encoding="utf-8")
    plain, knn = json.loads(text)
    assert [key for key in plain if key in KEYS.split()] == KEYS.split()
    assert [key for key in knn if key in KNN_KEYS.split()] == KNN_KEYS.split()
    assert not plain.keys() & {*KNN_KEYS.split(), "combiner_seconds"}
    assert plain["bleu"] == 44.04
    assert knn["datastore_entries"] == 207_912
    assert read_results(tmp_path / "outputs" / "demo") == [NMT, KNN]


def test_rows_of_earlier_versions_are_read(tmp_path: Path) -> None:
    old = {key: value for key, value in dataclasses.asdict(NMT).items() if key in KEYS.split()}
    (tmp_path / "results.json").write_text(json.dumps([old]))
    (row,) = read_results(tmp_path)
    assert (row.bleu, row.model_digest, row.bleu_tokenizer) == (44.04, None, "13a")
    write(tmp_path, KNN)  # nobody knows whether they can be compared
    assert read_results(tmp_path) == [KNN]


def test_translations_are_one_file_a_method_and_other_letters_stay(tmp_path: Path) -> None:
    rows = [replace(row, test_set="../maçã/x") for row in (NMT, KNN)]
    write(tmp_path, *rows)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "hypotheses...-maçã-x.NMT.txt",
        "hypotheses...-maçã-x.kNN-MT.txt",
        "results.json",
    ]
    assert written(tmp_path, rows[0]) == "Ligue [a luz] é\n\n"
    assert "maçã" in (tmp_path / "results.json").read_text(encoding="utf-8")


def test_a_later_run_replaces_its_own_rows_and_keeps_those_of_the_same_weights_and_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, NMT, KNN)
    other = replace(NMT, test_set="office-help", text_digest="0ff1")
    write(tmp_path, other, lines=["a", "b"])
    again = replace(NMT, bleu=45.0)
    write(tmp_path, again, lines=["c", "d"])
    assert read_results(tmp_path) == [again, KNN, other]
    assert written(tmp_path, NMT) == "c\nd\n"
    assert written(tmp_path, other) == "a\nb\n"
    assert caplog.text == ""


@pytest.mark.parametrize(
    "change",
    [
        {"model_digest": "5eed"},
        {"text_digest": "7e88"},
        {"decoding": "beam_size=1; precision=32-true"},
        {"bleu_signature": "tok:zh"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_rows_that_cannot_be_compared_with_new_ones_go_with_their_translations(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: dict[str, str]
) -> None:
    write(tmp_path, NMT, KNN)
    changed = replace(NMT, **change)  # as of a training that went on, tested without retrieval
    write(tmp_path, changed, lines=["c", "d"])
    assert read_results(tmp_path) == [changed]
    assert not hypotheses_path(tmp_path, *KNN.key).exists()
    assert written(tmp_path, changed) == "c\nd\n"
    assert "kNN-MT on smarthome" in caplog.text


def test_the_rows_of_one_run_may_have_different_weights(tmp_path: Path) -> None:
    tuned = replace(NMT, method="adapters", model_digest="ada9")
    write(tmp_path, NMT, tuned)
    with_retrieval = replace(KNN, method="adapters + kNN-MT", model_digest="ada9")
    write(tmp_path, NMT, tuned, with_retrieval)
    assert read_results(tmp_path) == [NMT, tuned, with_retrieval]
    write(tmp_path, with_retrieval)  # alone: the base is not known to be the same
    assert read_results(tmp_path) == [tuned, with_retrieval]


def test_translations_that_were_never_scored_have_no_row(tmp_path: Path) -> None:
    write(tmp_path, NMT, KNN)
    write_translations(tmp_path, *NMT.key, ["new", "lines"])  # and then the power fails
    assert read_results(tmp_path) == [KNN]
    assert written(tmp_path, NMT) == "new\nlines\n"


def test_a_run_that_stops_while_writing_leaves_the_old_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, NMT)
    write_translations(tmp_path, *KNN.key, LINES["kNN-MT"])

    def stop(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            write_results(tmp_path, [KNN])
    assert read_results(tmp_path) == [NMT]


def test_writing_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="Translation 2 of NMT"):
        write_translations(tmp_path, *NMT.key, ["a", "b\nc"])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ResultsError, match=r"0 translations.*NMT has 2"):
        write_results(tmp_path, [NMT])
    write_translations(tmp_path, *NMT.key, ["a"])
    with pytest.raises(ResultsError, match=r"1 translations.*NMT has 2"):
        write_results(tmp_path, [NMT])
    write_translations(tmp_path, *NMT.key, ["a", "b"])
    with pytest.raises(ResultsError, match=r"smart/home.*smart-home"):
        write_results(
            tmp_path, [replace(NMT, test_set=name) for name in ("smart/home", "smart-home")]
        )


def test_reading_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match=r"results\.json"):
        read_results(tmp_path)
    check_results(tmp_path)  # a new folder is no mistake
    path = tmp_path / "results.json"
    path.write_text('[{"method": "NMT", "blue": 3}]', encoding="utf-8")
    with pytest.raises(ResultsError, match=r"results\.json.*'blue'.*method, test_set.*name="):
        read_results(tmp_path)
    path.write_text("[", encoding="utf-8")
    with pytest.raises(ResultsError, match=r"results\.json"):
        check_results(tmp_path)


def test_a_digest_of_text_tells_its_sides_apart() -> None:
    digests = {
        text_digest(sources, references)
        for sources, references in (
            (["a", "b"], ["c", "d"]),
            (["c", "d"], ["a", "b"]),
            (["a"], ["b", "c", "d"]),
            (["a b"], ["c", "d"]),
            (["a", "b"], ["c", "e"]),
        )
    }
    assert len(digests) == 5


def test_speeds_follow_from_the_row() -> None:
    assert NMT.sentences_per_second == 4
    assert NMT.tokens_per_second == 60


def test_differences_and_retrieval_in_words() -> None:
    better = describe_difference(Difference("bleu", 4.22, 3.51, 4.9, 0.000999, 1000, 3, 4.1))
    assert "BLEU +4.2, 95 % interval [+3.5, +4.9]" in better
    assert better.endswith("better")
    worse = describe_difference(Difference("chrf", -2.2, -2.9, -1.4, 0.3, 10, 118, -2.0))
    assert worse.endswith("worse")
    chance = describe_difference(Difference("chrf", -0.2, -0.9, 0.4, 0.3, 10, 118, 0.51))
    assert "chance" in chance
    assert "line 118: +0.5" in chance
    loss = describe_loss("OPL", "NMT", Difference("bleu", -17.64, -18.9, -16.2, 0.1, 10, 3, -17))
    for part in ("OPL", "NMT", "17.6 BLEU", "16.2 to 18.9"):
        assert part in loss
    said = describe_retrieval(KNN)
    for part in ("k = 32", "λ = 0.5", "T = 100", "exact (l2, cpu)", "recall@32 1.000", "207,912"):
        assert part in said
    assert "102.3 MiB" in said


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
    side_by_side(console, SOURCES, REFERENCES, BASE, SYSTEM, ("NMT", "kNN-MT"), better=3, worse=1)
    text = shown(console)
    assert "Choose a [bold]name[/bold] for your new zone" in text
    assert "Choose a [bold]name[/bold] for your zone" in text
    better, worse = (text.index(f"kNN-MT is {verdict} than NMT") for verdict in ("better", "worse"))
    assert better < text.index("fonte 6") < worse < text.index("Your key has changed")
    assert "sentence chrF" in text

    console = screen()
    side_by_side(console, SOURCES, REFERENCES, BASE, BASE, ("NMT", "kNN-MT"))
    assert shown(console).count("no sentence") == 2


def test_examples_need_the_same_lines() -> None:
    with pytest.raises(ResultsError, match="8 sources, 8 references and 7 and 8 translations"):
        choose_examples(SOURCES, REFERENCES, BASE[1:], SYSTEM)


def table_of(lines: list[str]) -> dict[str, list[str]]:
    """The table's cells, by method."""
    cells = ([cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line)
    return {first: rest for first, *rest in cells}


def test_the_comparison_says_everything_the_demo_promises() -> None:
    console = screen()
    rows = [replace(row, sentences=8) for row in (NMT, KNN)]
    print_comparison(console, rows, {"NMT": BASE, "kNN-MT": SYSTEM}, SOURCES, REFERENCES)
    lines = shown(console).splitlines()
    assert lines[0].strip() == "smarthome: 8 sentences"
    table = table_of(lines)
    assert table["NMT"] == ["44.0", "63.2", "16.0", "60"]
    assert table["kNN-MT"][:2] == ["48.3", "66.0"]
    for metric in (Bleu("13a"), ChrF()):
        found = describe_difference(paired_bootstrap(SYSTEM, BASE, REFERENCES, metric))
        assert f"kNN-MT - NMT: {found}" in lines
    assert f"kNN-MT: {describe_retrieval(KNN)}" in lines
    assert f"BLEU|{NMT.bleu_signature}" in lines
    assert f"chrF2|{NMT.chrf_signature}" in lines
    assert "Where kNN-MT is worse than NMT" in lines
    assert "Warning" not in shown(console)


def test_a_tuned_model_is_compared_with_its_base_and_retrieval_with_both() -> None:
    console = screen()
    tuned = replace(NMT, method="adapters", bleu=1.0)
    names = ("NMT", "adapters", "adapters + kNN-MT")
    rows = [NMT, tuned, replace(KNN, method=names[2])]
    ruined = ["the the the"] * len(REFERENCES)
    texts = dict(zip(names, (SYSTEM, ruined, BASE), strict=True))
    print_comparison(console, rows, texts, SOURCES, REFERENCES)
    lines = shown(console).splitlines()
    assert list(table_of(lines)) == [*names]
    for ours, theirs in ((1, 0), (2, 0), (2, 1)):
        assert sum(x.startswith(f"{names[ours]} - {names[theirs]}: BLEU") for x in lines) == 1
    (warning, *_) = (line for line in lines if line.startswith("Warning"))
    assert "adapters is worse than NMT" in warning
    assert "Where adapters + kNN-MT is better than NMT" in lines


def test_chinese_rows_are_resampled_over_chinese_units() -> None:
    console = screen()
    gold, ours = ["打开客厅的灯和电视。"] * 4, ["打开客厅的灯。"] * 4
    rows = [replace(row, bleu_tokenizer="zh", sentences=4) for row in (NMT, KNN)]
    print_comparison(console, rows, {"NMT": ours, "kNN-MT": gold}, gold, gold)
    expected = paired_bootstrap(gold, ours, gold, Bleu("zh"))
    assert expected.value < 90  # by words separated by spaces it would be 100
    assert f"kNN-MT - NMT: {describe_difference(expected)}" in shown(console)


def test_one_method_alone_is_compared_with_nothing() -> None:
    console = screen()
    print_comparison(console, [NMT], {"NMT": BASE}, SOURCES, REFERENCES)
    assert "│ NMT " in shown(console)
    assert "interval" not in shown(console)
    assert "better" not in shown(console)
