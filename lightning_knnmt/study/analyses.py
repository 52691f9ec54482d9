"""The analyses of Gao et al., 2023 (arXiv:2305.13034), on one domain of a study.

`study_file` documents which methods they need; `domain` runs them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_knnmt.analysis.gradient_steps import (
    ExplicitStepDistribution,
    RelaxedAgreement,
    relaxed_against_softmax,
)
from lightning_knnmt.analysis.gradients import (
    GradientSimilarity,
    compare_gradients,
    step_products,
    token_products,
)
from lightning_knnmt.analysis.neighbour_ranks import BucketNeighbours, neighbours_by_bucket
from lightning_knnmt.analysis.predictions import PredictionReport
from lightning_knnmt.analysis.retrieved import tokens_with_neighbours
from lightning_knnmt.analysis.scaling import SHARES, ScalePoint, measure_scaling
from lightning_knnmt.analysis.word_recall import (
    BUCKETS,
    Frequencies,
    FrequencyBuckets,
    WordRecall,
    WordRecallDifference,
    buckets_of_counts,
    measure_word_recall,
    recall_difference,
)
from lightning_knnmt.evaluation.bootstrap import Resampled
from lightning_knnmt.retrieval import (
    FixedCombiner,
    KNNDistribution,
    LocalSource,
    Metric,
    Record,
    Retriever,
)
from lightning_knnmt.retrieval.tuning import temperatures_for
from lightning_knnmt.study.analysed_system import (
    AnalysedSystem,
    compare_predictions,
    first_sentences,
    greedy_bleu,
    record_text,
    relative_speed,
    select_tokens,
)
from lightning_knnmt.study.plan import StudyError

NUM_NEIGHBOURS = 64  # recorded for each token
GRADIENT_NEIGHBOURS = (1, 2, 4, 8, 16, 32)
GRADIENT_TOKENS = 1000
STEP_TOKENS = 2000
SENTENCES_A_STEP = 32
PREDICTION_TOKENS = 2000
FOUND_AT = (1, 2, 4, 8, 16, 32, 64)
SPEED_TOKENS = 2000
# The paper's code has 0.1, for another model.
EXPLICIT_LEARNING_RATES = (0.1, 0.01, 0.003, 0.001, 0.0003)
# Apart from the lengths of the keys, L2 at T is the inner product at T / 2.
METRICS: tuple[tuple[Metric, float], ...] = (("l2", 1.0), ("ip", 0.5))


@dataclass(frozen=True)
class Gradients:
    """kNN-MT's implicit gradient compared with the output projection's.

    Attributes:
        by_setting: For single tokens, by k, metric and T.
        pooled: For decoding steps, which add up the tokens at one position of 32 sentences, with
            decoding's k and T; one for each metric.
        tokens_a_step: Mean number of tokens in these steps.
        relaxed: The relaxed prediction compared with the mixture.
        decoding: Decoding's k, λ and T, which are among the settings.
    """

    by_setting: Mapping[tuple[int, str, float], GradientSimilarity]
    pooled: Sequence[GradientSimilarity]
    tokens_a_step: float
    relaxed: Sequence[RelaxedAgreement]
    decoding: FixedCombiner


def analyse_words(
    hypotheses: Mapping[str, Sequence[str]],
    references: Sequence[str],
    in_domain: Sequence[str],
    general: Sequence[str],
    baseline: str,
) -> tuple[dict[str, WordRecall], dict[str, WordRecallDifference]]:
    """Measures word recall by in-domain frequency, and differences to a baseline.

    Args:
        hypotheses: Translations of the test set, by system.
        references: Of the test set.
        in_domain: Target side of the domain's training text.
        general: Target side of text from other domains.
        baseline: One of the systems.
    """
    buckets = FrequencyBuckets.of(Frequencies.of(in_domain), Frequencies.of(general))
    recalls = {
        name: measure_word_recall(lines, references, buckets) for name, lines in hypotheses.items()
    }
    differences = {
        name: recall_difference(lines, hypotheses[baseline], references, buckets)
        for name, lines in hypotheses.items()
        if name != baseline
    }
    return recalls, differences


def analyse_gradients(system: AnalysedSystem, record: Record) -> Gradients:
    """Compares the gradients over k, T and the metric.

    Args:
        system: With retrieval on the base representation.
        record: Of its test text, with queries.
    """
    keys = system.retrieval.datastore.keys
    projection = system.translator.model.output_projection
    decoding = _setting(system)
    some = select_tokens(record, _spread(record.num_tokens, GRADIENT_TOKENS))
    sentences = some.sentences[tokens_with_neighbours(some)]
    temperatures = sorted({*temperatures_for(some), decoding.temperature})
    reached = [k for k in GRADIENT_NEIGHBOURS if k <= record.max_neighbours]
    numbers = sorted({*reached, decoding.num_neighbours})
    by_setting: dict[tuple[int, str, float], GradientSimilarity] = {}
    for k in numbers:
        products = token_products(some, keys, projection, k)
        for temperature in temperatures:
            for metric, factor in METRICS:
                by_setting[k, metric, temperature] = compare_gradients(
                    products, metric, factor * temperature, sentences
                )
    rows, steps = whole_steps(record, SENTENCES_A_STEP, STEP_TOKENS)
    of_steps = step_products(
        select_tokens(record, rows), keys, projection, decoding.num_neighbours, steps
    )
    pooled = [
        compare_gradients(
            of_steps, metric, factor * decoding.temperature, torch.arange(len(of_steps.aa))
        )
        for metric, factor in METRICS
    ]
    relaxed = [
        agreement
        for metric, factor in METRICS
        for agreement in relaxed_against_softmax(
            some,
            keys,
            projection,
            metric,
            num_neighbours=numbers,
            temperatures=[factor * each for each in temperatures],
            knn_weight=decoding.knn_weight,
        )
    ]
    tokens_a_step = float(of_steps.num_tokens.double().mean())
    return Gradients(by_setting, pooled, tokens_a_step, relaxed, decoding)


def whole_steps(record: Record, num_sentences: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Selects decoding steps of a text, spread over it, each with all its tokens.

    A step has the tokens at one position of `num_sentences` consecutive sentences.

    Args:
        record: Of M tokens.
        num_sentences: Decoded together.
        num_tokens: About how many tokens to select.

    Returns:
        The tokens' rows, ascending, and each one's step, [m] each.
    """
    first = torch.searchsorted(record.sentences, record.sentences)  # of each token's sentence
    positions = torch.arange(record.num_tokens) - first
    batches = record.sentences.long() // num_sentences
    longest = int(positions.max()) + 1 if record.num_tokens else 1
    _, steps = torch.unique(batches * longest + positions, return_inverse=True)
    rows = (steps % max(1, record.num_tokens // num_tokens) == 0).nonzero().flatten()
    return rows, steps[rows]


def analyse_predictions(
    systems: Mapping[str, AnalysedSystem], base: str, retrieval: str
) -> PredictionReport:
    """Compares p(gold) and agreement of all systems and of explicit steps on the neighbours."""
    system = systems[retrieval]
    k = _setting(system).num_neighbours
    found = system.retrieval
    retriever = Retriever(LocalSource(found.measured_index.index, found.datastore.values), k)
    projection, keys = system.translator.model.output_projection, found.datastore.keys
    batches = first_sentences(systems[base], "test")
    tokens = sum(int(batch.label_mask.sum()) for batch in batches)
    every = max(1, tokens // PREDICTION_TOKENS)
    more = {
        f"one OPL step, η {rate:g}": (
            retrieval,
            ExplicitStepDistribution(projection, retriever, keys, rate),
        )
        for rate in EXPLICIT_LEARNING_RATES
    }
    return compare_predictions(systems, more, batches[::every]).report()


def token_buckets(record: Record, values: Tensor, vocab_size: int) -> Tensor:
    """The frequency bucket of each gold token by its count among a datastore's values, [M].

    The buckets are those of words (`FrequencyBuckets`), applied to the vocabulary's units;
    the last one has tokens that the datastore lacks.
    """
    counts = torch.bincount(values, minlength=vocab_size)
    buckets = buckets_of_counts(counts[counts > 0].tolist())
    return torch.tensor([buckets[count] for count in counts[record.gold.long()].tolist()])


def analyse_neighbours(system: AnalysedSystem, record: Record) -> tuple[BucketNeighbours, ...]:
    """Finds gold tokens among the neighbours, by their frequency in the datastore."""
    values = torch.from_numpy(system.retrieval.datastore.values[:]).long()
    vocab_size = system.translator.tokenizer.vocabulary.size
    buckets = token_buckets(record, values, vocab_size)
    reached = [k for k in FOUND_AT if k <= record.max_neighbours]
    return neighbours_by_bucket(record, buckets, len(BUCKETS), reached)


def analyse_scaling(system: AnalysedSystem) -> tuple[ScalePoint, ...]:
    """Measures retrieval from parts of the datastore: BLEU on the test set with the validation
    set's best k, λ and T. Parts too small for 32 neighbours are left out.
    """
    nmt = system.translator.base

    def decode(retriever: Retriever, setting: FixedCombiner) -> Resampled:
        return greedy_bleu(system, "test", KNNDistribution(nmt, retriever, setting))

    datastore = system.retrieval.datastore
    return measure_scaling(
        datastore.keys,
        datastore.values,
        record_text(system, "valid", 1),
        shares=[share for share in SHARES if share * len(datastore) >= 64 or share == 1.0],
        num_neighbours=min(32, len(datastore)),
        decode=decode,
        sentence_end=system.translator.tokenizer.vocabulary.eos_id,
    )


def analyse_order(adapted: AnalysedSystem, adaptive: AnalysedSystem) -> tuple[Resampled, Resampled]:
    """Computes test BLEU of an adapted model with two combiners.

    Args:
        adapted: Its combiner was trained after the adapters, on its own retrievals.
        adaptive: The base model, whose combiner was trained before.

    Returns:
        With the combiner trained after, and with the one trained before.
    """
    others = replace(adapted.retrieval, fitted=adaptive.retrieval.fitted)
    mixed = others.distribution(adapted.translator.base)
    after = greedy_bleu(adapted, "test", adapted.translator.distribution)
    return after, greedy_bleu(adapted, "test", mixed)


def analyse_speed(base: AnalysedSystem, others: Iterable[AnalysedSystem]) -> dict[str, float]:
    """Measures greedy decoding speed relative to the base, in turns with it."""
    batches = first_sentences(base, "test")
    tokens = sum(int(batch.label_mask.sum()) for batch in batches)
    some = batches[:: max(1, tokens // SPEED_TOKENS)]
    return {other.name: relative_speed(base, other, some) for other in others}


def _setting(system: AnalysedSystem) -> FixedCombiner:
    """k, λ and T of a system."""
    combiner = system.retrieval.fitted.combiner
    if not isinstance(combiner, FixedCombiner):
        raise StudyError(
            f"{system.name} plays the part retrieval, which needs one k, λ and T for every token: "
            "give that part to a method with knn=fixed."
        )
    return combiner


def _spread(size: int, number: int) -> Tensor:
    """At most `number` of `size` rows, evenly spread."""
    return torch.arange(min(size, number)) * size // min(size, number)


def plain(value: Any) -> Any:
    """A result as JSON has it: six digits, None for infinite values, tuple keys as one string."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {
            " ".join(map(str, key)) if isinstance(key, tuple) else str(key): plain(each)
            for key, each in value.items()
        }
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value
