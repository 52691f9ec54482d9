"""Predictions of several systems for the same gold tokens, and how far the systems agree.

The probability of the gold label and its variance are measures of Gao et al., 2023
(arXiv:2305.13034); divergences are in nats. Only a few values per token are kept, whatever the
vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_knnmt.analysis.retrieved import AnalysisError
from lightning_knnmt.evaluation.bootstrap import NUM_SAMPLES, SACREBLEU_SEED, mean_interval

ROWS_AT_ONCE = 16  # arrays of [rows, V] that stay in the cache: 2 MB for a vocabulary of 32,000


@dataclass(frozen=True)
class Summary:
    """Count, mean, variance and quartiles.

    Attributes:
        variance: Of the values themselves: divided by their count.
        lower_quartile: The smallest value that is not below a quarter of the values.
        median: The same for a half.
        upper_quartile: The same for three quarters.
    """

    count: int
    mean: float
    variance: float
    lower_quartile: float
    median: float
    upper_quartile: float


def summarise(numbers: Tensor) -> Summary | None:
    """Summarises values in float64; None if there are none.

    Args:
        numbers: Finite values, of any shape.
    """
    values = numbers.detach().cpu().double().flatten().numpy()
    if len(values) == 0:
        return None
    # Quartiles are values that occur: this method never averages two of them.
    quartiles = np.quantile(values, [0.25, 0.5, 0.75], method="inverted_cdf")
    lower, median, upper = (float(quartile) for quartile in quartiles)
    return Summary(len(values), float(values.mean()), float(values.var()), lower, median, upper)


@dataclass(frozen=True)
class GoldProbability:
    """p(gold) of one system, from 0 to 1.

    Attributes:
        probabilities: Over all tokens.
        low: Lower bound of the 95 % interval of their mean, by bootstrap over sentences.
        high: Its upper bound.
        mean_log: Mean log p(gold) in nats, which overconfidence does not improve; -inf if a system
            excludes a gold token.
    """

    probabilities: Summary
    low: float
    high: float
    mean_log: float


@dataclass(frozen=True)
class Agreement:
    """How alike two systems' distributions p and q are, over the same tokens.

    Attributes:
        first: Name of the system of p.
        second: Name of the system of q.
        top_agreement: Share of the tokens for which both have the same most probable token.
        gold_gain: Mean of p(gold) - q(gold).
        gold_gain_interval: Its 95 % interval, by bootstrap over sentences.
        mean_kl: Of KL(p || q), in nats; inf where q excludes what p allows.
        median_kl: Its median.
        mean_reverse_kl: Of KL(q || p).
        median_reverse_kl: Its median.
        mean_js: Of the Jensen-Shannon divergence, from 0 to ln 2.
        median_js: Its median.
    """

    first: str
    second: str
    top_agreement: float
    gold_gain: float
    gold_gain_interval: tuple[float, float]
    mean_kl: float
    median_kl: float
    mean_reverse_kl: float
    median_reverse_kl: float
    mean_js: float
    median_js: float


@dataclass(frozen=True)
class PredictionReport:
    """The result of `PredictionComparison`.

    Attributes:
        num_tokens: M.
        num_sentences: Sentences with these tokens.
        gold: p(gold) by system.
        agreements: Every pair of systems, in the order of the systems.
    """

    num_tokens: int
    num_sentences: int
    gold: dict[str, GoldProbability]
    agreements: tuple[Agreement, ...]


class PredictionComparison:
    """Takes the distributions of all systems in chunks, then reports."""

    def __init__(self) -> None:
        self._sentences: list[Tensor] = []
        self._gold: dict[str, list[Tensor]] = {}  # log p(gold), [m] each
        self._pairs: dict[tuple[str, str], list[Tensor]] = {}  # [4, m] each, see `_divergences`

    @torch.no_grad()
    def add(self, log_probs: Mapping[str, Tensor], gold: Tensor, sentences: Tensor) -> None:
        """Adds some tokens.

        Args:
            log_probs: Each system's log-probabilities of the same tokens, [m, V]; the systems are
                the same in every call.
            gold: The tokens of the text, [m].
            sentences: The sentence each belongs to, [m].
        """
        self._check(log_probs, gold, sentences)
        self._sentences.append(sentences.cpu().long())
        for start in range(0, len(gold), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            labels = gold[rows, None].long()
            some = {name: _prediction(part[rows].float()) for name, part in log_probs.items()}
            for name, prediction in some.items():
                self._gold[name].append(prediction.log_probs.gather(1, labels).squeeze(1).cpu())
            for (first, second), numbers in self._pairs.items():
                numbers.append(_divergences(some[first], some[second]).cpu())

    def gold_probs(self) -> dict[str, Tensor]:
        """Every system's p(gold) of every token so far, [M], in the order of adding."""
        return {name: torch.cat(parts).exp() for name, parts in self._gold.items()}

    def report(
        self, num_samples: int = NUM_SAMPLES, seed: int = SACREBLEU_SEED
    ) -> PredictionReport:
        """Summarises all tokens.

        Args:
            num_samples: How many sets of sentences are drawn for the intervals.
            seed: Fixes the draws, which are the same for all systems.
        """
        if not any(len(part) for part in self._sentences):
            raise AnalysisError("There is nothing to report: no tokens were added.")
        sentences = torch.cat(self._sentences).numpy()
        known = {name: probs.double() for name, probs in self.gold_probs().items()}
        gold = {}
        for name, probs in known.items():
            low, high = mean_interval(probs.numpy(), sentences, num_samples, seed)
            summary = summarise(probs)
            assert summary is not None  # there are tokens
            mean_log = _mean(torch.cat(self._gold[name]).double())
            gold[name] = GoldProbability(summary, low, high, mean_log)
        agreements = []
        for (first, second), parts in self._pairs.items():
            gains = known[first] - known[second]
            interval = mean_interval(gains.numpy(), sentences, num_samples, seed)
            numbers = torch.cat(parts, dim=1)
            agreements.append(_agreement(first, second, numbers, _mean(gains), interval))
        return PredictionReport(len(sentences), len(np.unique(sentences)), gold, tuple(agreements))

    def _check(self, log_probs: Mapping[str, Tensor], gold: Tensor, sentences: Tensor) -> None:
        if not self._gold:
            self._gold = {name: [] for name in log_probs}
            self._pairs = {pair: [] for pair in combinations(log_probs, 2)}
        if not log_probs or log_probs.keys() != self._gold.keys():
            raise AnalysisError(
                f"The systems are {', '.join(log_probs) or 'none'}, but were "
                f"{', '.join(self._gold) or 'none'} before: every call needs the same ones, at "
                "least 1."
            )
        shapes = {tuple(part.shape) for part in log_probs.values()}
        sizes = {shape[0] for shape in shapes} | {len(gold), len(sentences)}
        if len(shapes) > 1 or len(sizes) > 1 or len(min(shapes)) != 2:
            raise AnalysisError(
                f"Log-probabilities {sorted(shapes)}, gold {tuple(gold.shape)} and sentences "
                f"{tuple(sentences.shape)} do not fit together: [m, V] for all systems, [m] and "
                "[m] are allowed. Give every system the same tokens and the same vocabulary."
            )


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats: [..., V], [..., V] -> [...]; inf where q excludes what p allows."""
    return _kl(log_p.exp(), log_p, log_q)


class _Prediction(NamedTuple):
    """One system's prediction, with what every pair of systems needs."""

    log_probs: Tensor  # [m, V]
    probs: Tensor  # [m, V]
    best: Tensor  # [m]


def _prediction(log_probs: Tensor) -> _Prediction:
    return _Prediction(log_probs, log_probs.exp(), log_probs.argmax(dim=-1))


def _kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    terms = p * (log_p - log_q)
    return terms.masked_fill_(p == 0.0, 0.0).sum(dim=-1).clamp(min=0.0)


def _js(p: _Prediction, q: _Prediction) -> Tensor:
    log_middle = torch.log(p.probs + q.probs) - math.log(2.0)  # halving could underflow
    left, right = (_kl(part.probs, part.log_probs, log_middle) for part in (p, q))
    return (left + right) / 2


def _divergences(p: _Prediction, q: _Prediction) -> Tensor:
    """Whether the most probable tokens are the same, both KLs and JS, [4, m]."""
    kl = _kl(p.probs, p.log_probs, q.log_probs)
    reverse_kl = _kl(q.probs, q.log_probs, p.log_probs)
    return torch.stack([(p.best == q.best).float(), kl, reverse_kl, _js(p, q)])


def _agreement(
    first: str, second: str, numbers: Tensor, gain: float, interval: tuple[float, float]
) -> Agreement:
    same, *divergences = numbers.double()
    means_and_medians = [f(d) for d in divergences for f in (_mean, _median)]
    return Agreement(first, second, _mean(same), gain, interval, *means_and_medians)


def _mean(numbers: Tensor) -> float:
    return float(numbers.mean())


def _median(numbers: Tensor) -> float:
    return float(numbers.median())  # a value that occurs: the lower of the two in the middle
