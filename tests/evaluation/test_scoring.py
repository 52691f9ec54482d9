"""BLEU, chrF and the paired bootstrap, with sacreBLEU itself as the witness."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.significance import PairedTest

from lightning_knnmt.evaluation import bootstrap, scoring
from lightning_knnmt.evaluation.bootstrap import paired_bootstrap
from lightning_knnmt.evaluation.scoring import ScoringError

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
FROM_COUNTS = {"bleu": scoring.bleu_from_counts, "chrf": scoring.chrf_from_counts}


def counts(name: str, lines: list[str], references: list[str] = REFERENCES) -> np.ndarray:
    metric = WITNESSES[name](references=[references])
    return np.array(metric._extract_corpus_statistics(lines, None), dtype=np.float64)


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_score_and_signature_are_sacrebleus(name: str) -> None:
    score = getattr(scoring, name)(SYSTEM, REFERENCES)
    witness = WITNESSES[name]()
    assert score.value == witness.corpus_score(SYSTEM, [REFERENCES]).score
    assert score.signature == str(witness.get_signature())
    assert score.signature.startswith("nrefs:1|case:mixed")


def test_sentence_scores_are_sacrebleus() -> None:
    bleu, chrf = BLEU(effective_order=True), CHRF()
    pairs = list(zip(SYSTEM, REFERENCES, strict=True))
    expected = [bleu.sentence_score(ours, [gold]).score for ours, gold in pairs]
    np.testing.assert_array_equal(scoring.sentence_bleu(SYSTEM, REFERENCES), expected)
    expected = [chrf.sentence_score(ours, [gold]).score for ours, gold in pairs]
    np.testing.assert_array_equal(scoring.sentence_chrf(SYSTEM, REFERENCES), expected)


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_resamples_equal_corpus_scores_of_the_drawn_sentences(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = bootstrap.draw_weights(np.random.default_rng(7), 5, len(REFERENCES))
    assert (weights.sum(axis=1) == len(REFERENCES)).all()
    monkeypatch.setattr(bootstrap, "DRAWS_AT_ONCE", 2 * len(REFERENCES))  # pieces of 2, 2 and 1
    found = bootstrap.resampled_scores(FROM_COUNTS[name], counts(name, SYSTEM), 5, seed=7)
    witness = WITNESSES[name]()
    for drawn, score in zip(weights, found, strict=True):
        rows = np.repeat(np.arange(len(REFERENCES)), drawn.astype(int))
        ours, gold = ([lines[i] for i in rows] for lines in (SYSTEM, REFERENCES))
        assert score == pytest.approx(witness.corpus_score(ours, [gold]).score, abs=1e-9)


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
    found = paired_bootstrap(SYSTEM, close, REFERENCES, name, num_samples=300)  # type: ignore[arg-type]
    assert found.value == pytest.approx(ours.score - base.score)
    assert 0.004 < found.p_value < 0.9  # neither end of the scale, so that equality says something
    assert found.p_value == ours.p_value

    drawn, drawn_close = (
        bootstrap.resample(lines, REFERENCES, name, num_samples=300).samples  # type: ignore[arg-type]
        for lines in (SYSTEM, close)
    )
    draws = drawn - drawn_close
    assert draws.mean() == pytest.approx(ours.mean - base.mean, abs=1e-3)  # theirs is in float32
    assert found.low == pytest.approx(np.sort(draws)[7], abs=0.5)
    assert found.low < draws.mean() < found.high


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
    for name, from_counts in FROM_COUNTS.items():
        total = counts(name, hypotheses, references).sum(axis=0)
        expected = WITNESSES[name]().corpus_score(hypotheses, [references]).score
        assert float(from_counts(total)) == pytest.approx(expected, abs=1e-9)


def test_a_clear_difference_excludes_zero_and_a_system_does_not_differ_from_itself() -> None:
    good = paired_bootstrap(SYSTEM, worsened(REFERENCES, 0.6, seed=5), REFERENCES)
    assert good.excludes_zero
    assert good.low < good.value < good.high
    assert good.p_value < 0.01
    reverse = paired_bootstrap(worsened(REFERENCES, 0.6, seed=5), SYSTEM, REFERENCES)
    assert reverse.excludes_zero
    assert (reverse.low, reverse.high) == pytest.approx((-good.high, -good.low))
    same = paired_bootstrap(SYSTEM, SYSTEM, REFERENCES, num_samples=50)
    assert (same.value, same.low, same.high, same.p_value) == (0, 0, 0, 1)
    assert not same.excludes_zero


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_the_line_that_a_difference_hangs_on_is_found(name: str) -> None:
    dots = " ".join(["."] * 300)
    ours, theirs = [*SYSTEM[:40], dots, *SYSTEM[40:]], [*BASELINE[:40], "off", *BASELINE[40:]]
    references = [*REFERENCES[:40], dots, *REFERENCES[40:]]
    found = paired_bootstrap(ours, theirs, references, name, num_samples=50)  # type: ignore[arg-type]
    assert found.line == 41
    witness = WITNESSES[name]()
    expected, base = (witness.corpus_score(x, [REFERENCES]).score for x in (SYSTEM, BASELINE))
    assert found.without == pytest.approx(expected - base, abs=1e-9)
    assert found.hangs_on_one_line
    assert not paired_bootstrap(SYSTEM, BASELINE, REFERENCES, name).hangs_on_one_line  # type: ignore[arg-type]
    alone = paired_bootstrap(["a b c d"], ["a b c x"], ["a b c d"], name, num_samples=5)  # type: ignore[arg-type]
    assert (alone.line, alone.without) == (1, 0)


def test_the_seed_fixes_the_interval() -> None:
    first, again, other = (
        paired_bootstrap(SYSTEM, BASELINE, REFERENCES, num_samples=50, seed=seed)
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_errors_name_the_numbers() -> None:
    with pytest.raises(ScoringError, match="1 hypotheses but 2 references: every reference needs"):
        scoring.bleu(["a"], ["a", "b"])
    with pytest.raises(ScoringError, match="0 hypotheses and 0 references: at least 1"):
        scoring.chrf([], [])
    with pytest.raises(ScoringError, match="2 hypotheses but 1 references"):
        scoring.sentence_chrf(["a", "b"], ["a"])
    with pytest.raises(ScoringError, match="1 hypotheses but 2 references"):
        paired_bootstrap(["a", "b"], ["a"], ["a", "b"])
    with pytest.raises(ScoringError, match="Unknown metric 'ter': allowed are 'bleu' and 'chrf'"):
        paired_bootstrap(["a"], ["a"], ["a"], "ter")  # type: ignore[arg-type]
    with pytest.raises(ScoringError, match="0 bootstrap samples were asked for"):
        paired_bootstrap(["a"], ["a"], ["a"], num_samples=0)
