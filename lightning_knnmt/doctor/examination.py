"""The checks in their order, on a sample of the text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from lightning_knnmt.data import Batch, Corpus, Example, ParallelDataModule, Tokenizer, collate
from lightning_knnmt.decoding import BeamSearch, SoftmaxDistribution
from lightning_knnmt.doctor.checks import (
    Finding,
    best_setting,
    check_bleu,
    check_direction,
    check_fingerprint,
    check_gold,
    check_key_layer,
    check_model,
    check_nearest,
    check_pieces,
    check_round_trip,
    check_size,
    check_style,
    check_temperature,
    check_unknown,
    check_vocabulary,
    describe_machine,
    describe_speed,
    describe_versions,
)
from lightning_knnmt.evaluation.scoring import Bleu
from lightning_knnmt.models import DecoderStates, KeyLayer, Transformer
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
TRAINING_SENTENCES = 2000  # make a small datastore where none is given, and time its building
CHECKED_SENTENCES = 8  # of the training text, whose keys are made again
MAX_NEIGHBOURS = 8
SEARCHED_NUMBERS = 2**28  # of a given datastore's keys at most: 1 GiB in float32


class Examination:
    """A model, its tokenizer, a text, and perhaps a datastore; `findings` says whether they fit.

    Args:
        model: In evaluation mode, on the device to examine.
        tokenizer: Its own.
        datamodule: The text; training and validation are looked at.
        datastore: Of the training text; without one, a small one is made in memory.
        sentences: How many validation sentences are looked at.
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
        self.key_layer: KeyLayer = (
            "opl_input" if datastore is None else datastore.manifest.key_layer
        )
        self.temperature = temperature
        self.directory = directory
        self.device = next(model.parameters()).device
        self.distribution = SoftmaxDistribution(
            model.output_projection, tokenizer.vocabulary.never_emitted
        )
        self.rows = spread_rows(len(datamodule.valid_corpus), sentences)

    def findings(self) -> Iterator[Finding]:
        """All findings, the cheap ones first; what cannot be looked at after a problem is not."""
        yield describe_versions()
        yield describe_machine(self.device)
        basics = [check_model(self.model), check_vocabulary(self.model, self.tokenizer)]
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
        for side, (lang, lines) in enumerate(sides):
            ids = [corpus[i][side].tolist() for i in self.rows]
            chosen = [lines[i] for i in self.rows]
            yield check_unknown(ids, vocabulary.unk_id, lang)
            yield check_pieces(chosen, ids, lang)
            if side == 1 or vocabulary.source_size is None:  # decoding knows the target's ids
                decoded = [self.tokenizer.decode(sentence) for sentence in ids]
                yield check_round_trip(chosen, decoded, lang)

    def _about_translation(self) -> Iterator[Finding]:
        data, vocabulary = self.datamodule, self.tokenizer.vocabulary
        corpus = data.valid_corpus
        started = time.perf_counter()
        translated = self._translate(batches(corpus, self.rows, self.tokenizer))
        seconds = time.perf_counter() - started
        hypotheses = [self.tokenizer.decode(translated[i]) for i in self.rows]
        lines = (data.references("valid"), data.source_lines("valid"))
        references, sources = ([side[i] for i in self.rows] for side in lines)
        bleu = Bleu.for_language(data.target_lang, data.bleu_tokenizer)
        yield check_bleu(hypotheses, references, sources, bleu)
        yield check_style(hypotheses, references)
        if vocabulary.source_size is None and not vocabulary.target_prefix:
            forward, backward = (
                self._gold_log_prob(batches(corpus, self.rows, self.tokenizer, exchanged=exchanged))
                for exchanged in (False, True)
            )
            yield check_direction(forward, backward, data.source_lang, data.target_lang)
        yield describe_speed(sum(map(len, translated.values())), seconds)

    def _about_retrieval(self) -> Iterator[Finding]:
        corpus = self.datamodule.train_corpus
        key_dim = self.model.output_projection.in_features
        started = time.perf_counter()
        states, values, _ = self._states(corpus, spread_rows(len(corpus), TRAINING_SENTENCES))
        keys = states.of(self.key_layer)
        seconds = (time.perf_counter() - started) / len(keys)
        yield check_size(self.directory, int(corpus.target_offsets[-1]), key_dim, seconds)
        if self.datastore is not None:
            ours = fingerprint(self.model, key_layer=self.key_layer)
            yield check_fingerprint(self.datastore, ours, self.tokenizer.digest)
            layer = self._about_keys(self.datastore, corpus)
            yield layer
            if self.datastore.manifest.key_dim != key_dim:
                return
            searched = slice(SEARCHED_NUMBERS // key_dim)
            keys = torch.from_numpy(np.array(self.datastore.keys[searched]))
            values = torch.from_numpy(np.array(self.datastore.values[searched]))
        k = min(MAX_NEIGHBOURS, len(keys))
        index = FlatIndex(keys, device=self.device)
        recorder = Recorder(
            Retriever(LocalSource(index, values), k, self.key_layer), self.distribution
        )
        recorder.write(*self._states(self.datamodule.valid_corpus, self.rows))
        record = recorder.finish()
        setting = best_setting(record)
        yield check_nearest(record)
        yield check_gold(record, setting)
        yield check_temperature(record, setting, self.temperature)

    def _about_keys(self, datastore: Datastore, corpus: Corpus) -> Finding:
        if datastore.manifest.corpus_digest != corpus.digest:
            return Finding(
                "key layer",
                "warning",
                f"The datastore was built from {datastore.manifest.corpus_name}, encoded otherwise "
                f"or another text than {corpus.name}, so its keys cannot be made again to compare.",
            )
        rows = spread_rows(len(corpus), CHECKED_SENTENCES)
        states, labels, sentences = self._states(corpus, rows)
        known = EntryRows.of(corpus, self.tokenizer)
        kept, entries = known.rows(sentences.cpu().numpy(), labels.cpu().numpy())
        keys = states.of(self.key_layer).cpu()[torch.from_numpy(kept)]
        stored = torch.from_numpy(np.array(datastore.keys[entries]))
        return check_key_layer(stored, keys, self.key_layer)

    @torch.inference_mode()
    def _translate(self, some: Iterator[Batch]) -> dict[int, list[int]]:
        """The greedy translation of each row."""
        vocabulary, greedy = self.tokenizer.vocabulary, BeamSearch(beam_size=1)
        translated: dict[int, list[int]] = {}
        for batch in some:
            batch = batch.to(self.device)
            hypotheses = greedy(
                self.model,
                batch.source_ids,
                batch.source_mask,
                self.distribution,
                start_id=vocabulary.start_id,
                eos_id=vocabulary.eos_id,
                max_positions=self.model.max_positions,
                prefix=vocabulary.target_prefix,
            )
            best = [candidates[0].tokens for candidates in hypotheses]
            translated.update(zip(batch.index.tolist(), best, strict=True))
        return translated

    @torch.inference_mode()
    def _gold_log_prob(self, some: Iterator[Batch]) -> float:
        """Mean log p of the targets' tokens, in nats."""
        parts = [
            self.distribution.top_with(states, 1, labels[:, None])[0][:, 1]
            for states, labels, _ in teacher_forced(self.model, some, Precision())
        ]
        return float(torch.cat(parts).mean())

    def _states(self, corpus: Corpus, rows: Sequence[int]) -> LabelledStates:
        """What the decoder says before each token of some sentences."""
        some = batches(corpus, rows, self.tokenizer)
        parts = list(teacher_forced(self.model, some, Precision()))
        hidden, ffn_input, labels, sentences = (
            torch.cat(column)
            for column in zip(
                *((s.hidden, s.of("ffn_input"), *rest) for s, *rest in parts), strict=True
            )
        )
        return LabelledStates(DecoderStates(hidden, ffn_input), labels, sentences)


def spread_rows(total: int, count: int) -> list[int]:
    """Up to `count` of `total` rows, evenly spread."""
    rows = np.linspace(0, total - 1, min(count, total)).astype(int)
    return [int(row) for row in np.unique(rows)]


def batches(
    corpus: Corpus, rows: Sequence[int], tokenizer: Tokenizer, *, exchanged: bool = False
) -> Iterator[Batch]:
    """The rows, sentences of like length together; source and target change places if exchanged."""
    ordered = sorted(rows, key=lambda i: corpus.source_lengths[i])
    for start in range(0, len(ordered), BATCH_SENTENCES):
        some = ordered[start : start + BATCH_SENTENCES]
        pairs = [corpus[i][::-1] if exchanged else corpus[i] for i in some]
        examples = [Example(i, *pair) for i, pair in zip(some, pairs, strict=True)]
        yield collate(examples, tokenizer.vocabulary)
