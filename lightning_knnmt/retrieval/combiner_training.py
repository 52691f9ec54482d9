"""Trains a combiner on a record: seconds on one core.

The recipe is that of Zheng et al., 2021 (arXiv:2105.13022): the model frozen, the validation set
to train on and to choose the best weights by. The authors run model and search in every update, and
so with dropout; here both were recorded once, without dropout, and an update is a few small
products. Their loss smooths labels by 0.001, a sum over the vocabulary that a record does not hold;
it is left out:

    loss = - mean log(λ p_kNN(gold) + (1 - λ) p_NMT(gold))
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from lightning_knnmt.retrieval.checks import check_integer, check_number
from lightning_knnmt.retrieval.combiner import Combiner, ModelView, Weighting, interpolate
from lightning_knnmt.retrieval.errors import CombinerError
from lightning_knnmt.retrieval.index import Metric
from lightning_knnmt.retrieval.record import Record
from lightning_knnmt.retrieval.retriever import Neighbours

ROWS_AT_ONCE = 4096  # bounds what validation needs: a few arrays of [rows, 2 K]

Progress = Callable[[int, float], None]


class TrainableCombiner(Combiner, Protocol):
    """A combiner that is an nn.Module, and does once what its weights have no part in."""

    def look(self, neighbours: Neighbours, view: ModelView | None = None) -> Any:
        """A NamedTuple of tensors, [..., anything]."""

    def weigh(self, seen: Any) -> Weighting: ...

    def parameters(self) -> Iterator[torch.nn.Parameter]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...


@runtime_checkable
class NoisyCombiner(TrainableCombiner, Protocol):
    """One whose updates see disturbed neighbours; validation sees them as they are."""

    def disturb(
        self,
        seen: Any,
        gold: Tensor,
        gold_log_probs: Tensor,
        update: int,
        generator: torch.Generator,
    ) -> Any:
        """`seen` in noise, with its tokens."""


class Validated(NamedTuple):
    """The loss over the whole record after so many updates."""

    update: int
    loss: float


@dataclass(frozen=True)
class CombinerTraining:
    """How a training went.

    Attributes:
        history: Losses over the whole record, the first one before any update.
        best_loss: The lowest of them, which the combiner's weights have now.
        updates: How many were made.
        seconds: What they and the validations took.
    """

    history: tuple[Validated, ...]
    best_loss: float
    updates: int
    seconds: float


class Lesson(NamedTuple):
    """What the loss needs of M tokens."""

    seen: Any  # what the combiner computed from neighbours and model, a NamedTuple
    is_gold: Tensor  # [M, K] which neighbours hold the gold token
    gold: Tensor  # [M]
    gold_log_probs: Tensor  # [M] log p_NMT of it

    def take(self, rows: Tensor | slice) -> Lesson:
        seen = type(self.seen)(*(column[rows] for column in self.seen))
        return Lesson(seen, self.is_gold[rows], self.gold[rows], self.gold_log_probs[rows])


@torch.no_grad()
def prepare_lesson(combiner: TrainableCombiner, record: Record) -> Lesson:
    """Looks at the K nearest of the recorded neighbours, once for the whole training."""
    k = combiner.num_neighbours
    if record.num_tokens == 0:
        raise CombinerError("The record is empty: at least 1 token is needed to train a combiner.")
    if k > record.max_neighbours:
        raise CombinerError(
            f"The combiner weighs {k} neighbours, but only {record.max_neighbours} were recorded. "
            "Record more, or train a smaller combiner."
        )
    tokens, gold = record.tokens[:, :k].long(), record.gold.long()
    neighbours = Neighbours(tokens, record.distances[:, :k], record.entries[:, :k])
    view = None
    if combiner.num_best:
        best = record.best_log_probs
        if best is None or best.shape[1] < combiner.num_best:
            raise CombinerError(
                f"The combiner asks for the model's best {combiner.num_best} log-probabilities, "
                "which were not recorded: record with keep_best."
            )
        view = ModelView(best[:, : combiner.num_best], record.neighbour_log_probs[:, :k])
    is_gold = (tokens == gold[:, None]).float()
    return Lesson(combiner.look(neighbours, view), is_gold, gold, record.gold_log_probs)


def mixed_log_probs(combiner: TrainableCombiner, lesson: Lesson) -> Tensor:
    """log p(gold) of each token under the combiner's mixture, [M]."""
    weighting = combiner.weigh(lesson.seen)
    knn_probs = (weighting.neighbour_probs * lesson.is_gold).sum(dim=-1, keepdim=True)  # of gold
    mixed = interpolate(lesson.gold_log_probs[:, None], knn_probs, weighting.knn_weight)
    return mixed.squeeze(-1)


def distance_offset(record: Record, metric: Metric) -> float:
    """What a network subtracts from its distances: 0 for L2, else the median nearest distance."""
    nearest = record.distances[:, 0]
    nearest = nearest[nearest.isfinite()]
    return float(nearest.median()) if metric == "ip" and len(nearest) else 0.0


@dataclass(frozen=True)
class CombinerTrainer:
    """A recipe: Adam, a learning rate that falls when the loss does not, an early stop.

    Attributes:
        learning_rate: At the start.
        min_learning_rate: Where it stops falling.
        betas: Adam's.
        plateau_factor: Factor for the learning rate after `plateau_patience` validations without
            improvement.
        plateau_patience: See `plateau_factor`.
        clip_norm: Gradients longer than this are shortened to it.
        batch_sentences: Sentences in an update.
        max_updates: The most updates.
        first_validation: The first update that is validated.
        validate_every: Updates from one validation to the next.
        stop_patience: Validations without a better loss after which training stops.
        seed: Decides the order of the sentences.
    """

    learning_rate: float = 3e-4
    min_learning_rate: float = 3e-5
    betas: tuple[float, float] = (0.9, 0.98)
    plateau_factor: float = 0.5
    plateau_patience: int = 5
    clip_norm: float = 1.0
    batch_sentences: int = 32
    max_updates: int = 5000
    first_validation: int = 1000
    validate_every: int = 100
    stop_patience: int = 30
    seed: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))  # Hydra gives a list of its own
        for name in ("learning_rate", "min_learning_rate"):
            self._check(name, "be 0 or greater", lambda x: x >= 0.0)
        self._check("clip_norm", "be a number greater than 0", lambda x: x > 0.0)
        self._check("plateau_factor", "lie between 0 and 1", lambda x: 0.0 < x < 1.0)
        if len(self.betas) != 2:
            raise ValueError(
                f"betas is {self.betas}, but it must be two numbers, Adam's β₁ and β₂."
            )
        for beta in self.betas:
            check_number("One of betas", beta, "be at least 0 and below 1", lambda x: 0 <= x < 1)
        for name in ("batch_sentences", "max_updates", "first_validation", "validate_every"):
            check_integer(name, getattr(self, name))
        for name in ("plateau_patience", "stop_patience", "seed"):
            check_integer(name, getattr(self, name), least=0)

    def _check(self, name: str, allowed: str, fits: Callable[[float], bool]) -> None:
        check_number(f"The combiner's {name}", getattr(self, name), allowed, fits)

    def train(
        self, combiner: TrainableCombiner, record: Record, progress: Progress | None = None
    ) -> CombinerTraining:
        """Trains a combiner in place and leaves it with the best weights that validation met.

        The global random state is not changed; equal seeds and weights give equal results.

        Args:
            combiner: Its K is at most the record's.
            record: Of the validation set; validated on as well.
            progress: Called with the number of updates and the loss at each validation.

        Raises:
            CombinerError: If the record is too small, or a loss is not finite.
        """
        started = time.perf_counter()
        # Lightning's evaluation, in which this may run, lets nothing be trained.
        with torch.inference_mode(False), torch.enable_grad():
            history = self._run(combiner, record, progress or (lambda update, loss: None))
        best_loss = min(each.loss for each in history)
        seconds = time.perf_counter() - started
        return CombinerTraining(tuple(history), best_loss, history[-1].update, seconds)

    def _run(
        self, combiner: TrainableCombiner, record: Record, progress: Progress
    ) -> list[Validated]:
        lesson = prepare_lesson(combiner, record)
        parameters = list(combiner.parameters())
        adam = torch.optim.Adam(parameters, self.learning_rate, self.betas, fused=True)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            adam,
            factor=self.plateau_factor,
            patience=self.plateau_patience,
            min_lr=self.min_learning_rate,
        )
        history = [Validated(0, _validate(combiner, lesson, 0))]
        best, weights = history[0], _copy(combiner)
        noise = torch.Generator().manual_seed(self.seed)
        for update, rows in enumerate(self._batches(record.sentences), start=1):
            part = lesson.take(rows)
            if isinstance(combiner, NoisyCombiner):
                gold = part.gold
                seen = combiner.disturb(part.seen, gold, part.gold_log_probs, update, noise)
                part = part._replace(seen=seen, is_gold=(seen.tokens == gold[:, None]).float())
            loss = -mixed_log_probs(combiner, part).mean()
            _require_finite(float(loss.detach()), update)
            adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, self.clip_norm)
            adam.step()
            if not self._is_validated(update):
                continue
            history.append(Validated(update, _validate(combiner, lesson, update)))
            progress(*history[-1])
            plateau.step(history[-1].loss)
            if history[-1].loss < best.loss:
                best, weights = history[-1], _copy(combiner)
            in_vain = sum(each.update > best.update for each in history)
            if update == self.max_updates or in_vain >= self.stop_patience:
                break
        combiner.load_state_dict(weights)
        return history

    def _is_validated(self, update: int) -> bool:
        past = update - self.first_validation
        return update == self.max_updates or (past >= 0 and past % self.validate_every == 0)

    def _batches(self, sentences: Tensor) -> Iterator[Tensor]:
        """Rows of some sentences, in a new order after each pass over all; without end."""
        starts = np.flatnonzero(np.diff(sentences.numpy(), prepend=-1))
        rows = np.split(np.arange(len(sentences)), starts[1:])
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            order = torch.randperm(len(rows), generator=generator)
            for start in range(0, len(rows), self.batch_sentences):
                chosen = order[start : start + self.batch_sentences].tolist()
                yield torch.from_numpy(np.concatenate([rows[i] for i in chosen]))


@torch.no_grad()
def _validate(combiner: TrainableCombiner, lesson: Lesson, update: int) -> float:
    num_tokens, total = len(lesson.is_gold), 0.0
    for start in range(0, num_tokens, ROWS_AT_ONCE):
        part = lesson.take(slice(start, start + ROWS_AT_ONCE))
        total -= float(mixed_log_probs(combiner, part).sum(dtype=torch.float64))
    _require_finite(total, update)
    return total / num_tokens


def _require_finite(loss: float, update: int) -> None:
    if not math.isfinite(loss):
        raise CombinerError(
            f"The combiner's loss is {loss} at update {update}, so its training stopped: finite "
            "numbers are needed. Look for such numbers in the record, or lower the learning rate."
        )


def _copy(combiner: TrainableCombiner) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in combiner.state_dict().items()}
