"""The checks in their order, on a sample of the text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from lightning_knnmt.data import Batch, Corpus, Example, ParallelDataModule, Tokenizer, collate
from lightning_knnmt.data.tokenizer import Side
from lightning_knnmt.decoding import BeamSearch, SoftmaxDistribution, translate_batches
from lightning_knnmt.doctor import checks, retrieval_checks
from lightning_knnmt.doctor.checks import Finding
from lightning_knnmt.evaluation.scoring import Bleu
from lightning_knnmt.models import Transformer
from lightning_knnmt.retrieval import (
    Datastore,
    EntryRows,
    FlatIndex,
    LabelledStates,
    LocalSource,
    Precision,
    Recorder,
    Retriever,
    fingerprint,
    teacher_forced,
)

BATCH_SENTENCES = 32
TRAINING_SENTENCES = 2000  # for a small datastore if none is given, and to time building
CHECKED_SENTENCES = 8  # of the training text, whose keys are computed again
MAX_NEIGHBOURS = 8
SIDES: tuple[Side, Side] = ("source", "target")
SEARCHED_VALUES = 2**28  # of a given datastore's keys, at most: 1 GiB in float32


class Examination:
    """A model, its tokenizer, a text, and perhaps a datastore; `findings` checks them.

    Args:
        model: In evaluation mode, on the device to examine.
        tokenizer: The model's own.
        datamodule: The text; its training and validation parts are looked at.
        datastore: Of the training text; if None, a small one is made in memory.
        sentences: How many validation sentences to look at.
        temperature: A temperature to judge.
        directory: Where datastores would be kept.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        datamodule: ParallelDataModule,
        *,
        datastore: Datastore | None = None,
        sentences: int = 100,
        temperature: float | None = None,
        directory: Path,
    ) -> None:
        self.model, self.tokenizer, self.datamodule = model, tokenizer, datamodule
        self.datastore = datastore
        self.key_layer = "opl_input" if datastore is None else datastore.manifest.key_layer
        self.temperature = temperature
        self.directory = directory
        self.device = next(model.parameters()).device
        never = tokenizer.vocabulary.never_emitted
        self.distribution = SoftmaxDistribution(model.output_projection, never)
        self.rows = spread_rows(len(datamodule.valid_corpus), sentences)

    def findings(self) -> Iterator[Finding]:
        """All findings, the cheap ones first; a problem ends what depends on it."""
        yield checks.describe_versions()
        yield checks.describe_machine(self.device)
        basics = [
            checks.check_model(self.model),
            checks.check_vocabulary(self.model, self.tokenizer),
        ]
        yield from basics
        if any(finding.verdict == "problem" for finding in basics):
            return
        yield from self._about_text()
        yield from self._about_translation()
        yield from self._about_retrieval()

    def _about_text(self) -> Iterator[Finding]:
        data, vocabulary = self.datamodule, self.tokenizer.vocabulary
        corpus = data.valid_corpus
        sources, targets = data.source_lines("valid"), data.references("valid")
        sides = ((data.source_lang, sources), (data.target_lang, targets))
        for side, ((lang, lines), name) in enumerate(zip(sides, SIDES, strict=True)):
            ids = [corpus[i][side].tolist() for i in self.rows]
            chosen = [lines[i] for i in self.rows]
            unk_id = self.tokenizer.unk_ids[side]
            symbols = [s for line in chosen for s in self.tokenizer.unknown_symbols(line, name)]
            yield checks.check_unknown(ids, unk_id, symbols, lang)
            yield checks.check_pieces(chosen, ids, lang)
            if side == 1 or vocabulary.source_size is None:  # decoding knows the target's ids
                decoded = [self.tokenizer.decode(sentence) for sentence in ids]
                is_lossy = [unk_id in sentence for sentence in ids]
                yield checks.check_round_trip(chosen, decoded, is_lossy, lang)

    def _about_translation(self) -> Iterator[Finding]:
        data, vocabulary = self.datamodule, self.tokenizer.vocabulary
        corpus = data.valid_corpus
        some = batches(corpus, self.rows, self.tokenizer)
        started = time.perf_counter()
        found = translate_batches(
            self.model, vocabulary, some, BeamSearch(beam_size=1), self.distribution
        )
        translated = {row: hypotheses[0].tokens for row, hypotheses in found}
        seconds = time.perf_counter() - started
        hypotheses = [self.tokenizer.decode(translated[i]) for i in self.rows]
        lines = (data.references("valid"), data.source_lines("valid"))
        references, sources = ([side[i] for i in self.rows] for side in lines)
        bleu = Bleu.for_language(data.target_lang, data.bleu_tokenizer)
        yield checks.check_bleu(hypotheses, references, sources, bleu)
        yield checks.check_style(hypotheses, references)
        if vocabulary.source_size is None and not vocabulary.target_prefix:
            forward, backward = (
                self._gold_log_prob(batches(corpus, self.rows, self.tokenizer, swapped=swapped))
                for swapped in (False, True)
            )
            yield checks.check_direction(forward, backward, data.source_lang, data.target_lang)
        yield checks.describe_speed(sum(map(len, translated.values())), seconds)

    def _about_retrieval(self) -> Iterator[Finding]:
        corpus = self.datamodule.train_corpus
        key_dim = self.model.output_projection.in_features
        started = time.perf_counter()
        keys, values = self._entries(corpus, spread_rows(len(corpus), TRAINING_SENTENCES))
        seconds = (time.perf_counter() - started) / len(keys)
        num_entries = EntryRows.of(corpus, self.tokenizer).num_entries
        yield retrieval_checks.check_size(self.directory, num_entries, key_dim, seconds)
        if self.datastore is not None:
            ours = fingerprint(self.model, key_layer=self.key_layer)
            yield retrieval_checks.check_fingerprint(self.datastore, ours, self.tokenizer.digest)
            yield self._about_keys(self.datastore, corpus)
            if self.datastore.manifest.key_dim != key_dim:
                return
            searched = slice(SEARCHED_VALUES // key_dim)
            keys = torch.from_numpy(np.array(self.datastore.keys[searched]))
            values = torch.from_numpy(np.array(self.datastore.values[searched]))
        source = LocalSource(FlatIndex(keys, device=self.device), values)
        retriever = Retriever(source, min(MAX_NEIGHBOURS, len(keys)), self.key_layer)
        recorder = Recorder(retriever, self.distribution)
        for labelled in self._states(self.datamodule.valid_corpus, self.rows):
            recorder.write(*labelled)
        record = recorder.finish()
        setting = retrieval_checks.best_setting(record)
        yield retrieval_checks.check_nearest(record)
        yield retrieval_checks.check_gold(record, setting)
        yield retrieval_checks.check_temperature(record, setting, self.temperature)

    def _about_keys(self, datastore: Datastore, corpus: Corpus) -> Finding:
        if datastore.manifest.corpus_digest != corpus.digest:
            return Finding(
                "key layer",
                "warning",
                f"The datastore was built from {datastore.manifest.corpus_name}, not from "
                f"{corpus.name} as it is encoded here, so its keys cannot be compared.",
            )
        rows = spread_rows(len(corpus), CHECKED_SENTENCES)
        keys, _ = self._entries(corpus, rows)
        offsets = EntryRows.of(corpus, self.tokenizer).offsets
        stored = np.concatenate([datastore.keys[offsets[i] : offsets[i + 1]] for i in rows])
        return retrieval_checks.check_key_layer(torch.from_numpy(stored), keys, self.key_layer)

    @torch.inference_mode()
    def _gold_log_prob(self, some: Iterator[Batch]) -> float:
        """Mean log p of the targets' tokens, in nats."""
        parts = [
            self.distribution.top_with(states, 1, labels[:, None])[0][:, 1]
            for states, labels, _ in teacher_forced(self.model, some, Precision())
        ]
        return float(torch.cat(parts).mean())

    def _entries(self, corpus: Corpus, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [n, D] and values [n] of some sentences as a datastore has them, row by row."""
        never = self.tokenizer.vocabulary.never_emitted
        sentences, keys, values = [], [], []
        for states, labels, places in self._states(corpus, rows):
            stored = ~torch.isin(labels, labels.new_tensor(never))
            keys.append(states.of(self.key_layer)[stored].cpu())
            values.append(labels[stored].cpu())
            sentences.append(places[stored].cpu())
        order = torch.argsort(torch.cat(sentences), stable=True)
        return torch.cat(keys)[order], torch.cat(values)[order]

    def _states(self, corpus: Corpus, rows: Sequence[int]) -> Iterator[LabelledStates]:
        """The decoder's states before each token of some sentences."""
        return teacher_forced(self.model, batches(corpus, rows, self.tokenizer), Precision())


def spread_rows(total: int, count: int) -> list[int]:
    """Up to `count` of `total` rows, evenly spread, ascending."""
    rows = np.linspace(0, total - 1, min(count, total)).astype(int)
    return [int(row) for row in np.unique(rows)]


def batches(
    corpus: Corpus, rows: Sequence[int], tokenizer: Tokenizer, *, swapped: bool = False
) -> Iterator[Batch]:
    """Batches of the rows, with sentences of similar length together.

    Args:
        swapped: Whether source and target change places.
    """
    ordered = sorted(rows, key=lambda i: corpus.source_lengths[i])
    for start in range(0, len(ordered), BATCH_SENTENCES):
        some = ordered[start : start + BATCH_SENTENCES]
        pairs = [corpus[i][::-1] if swapped else corpus[i] for i in some]
        examples = [Example(i, *pair) for i, pair in zip(some, pairs, strict=True)]
        yield collate(examples, tokenizer.vocabulary)
