"""What the validation set is for besides validation: held-out queries, and choosing k, λ and T."""

import hashlib
import json
from dataclasses import asdict
from functools import cached_property

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_knnmt.callbacks.teacher_forcing import evaluating, teacher_forced
from lightning_knnmt.data import ParallelDataModule
from lightning_knnmt.decoding import BeamSearch, SoftmaxDistribution
from lightning_knnmt.modules import NMTModule
from lightning_knnmt.retrieval import (
    Datastore,
    FixedCombiner,
    Index,
    KNNDistribution,
    MeasuredIndex,
    Recorder,
    Retriever,
)
from lightning_knnmt.scoring import bleu
from lightning_knnmt.tuning import Setting, tune


def with_retrieval(
    nmt: SoftmaxDistribution, datastore: Datastore, index: Index, setting: Setting
) -> KNNDistribution:
    """The model's distribution mixed with what a datastore says."""
    k = setting.num_neighbours
    return KNNDistribution(
        nmt,
        Retriever(datastore.values, index, k),
        FixedCombiner(k, setting.knn_weight, setting.temperature),
    )


class ValidationPass:
    """One teacher-forced pass over the whole validation set, made when it is first needed."""

    def __init__(
        self, module: NMTModule, datamodule: ParallelDataModule, trainer: pl.Trainer
    ) -> None:
        self.module = module
        self.datamodule = datamodule
        self.trainer = trainer

    @cached_property
    def _tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [M, D], labels [M] and sentences [M], on the CPU."""
        batches = self.datamodule.whole_dataloader("valid")
        precision = self.trainer.precision_plugin.forward_context()
        parts = [
            (hidden.cpu(), labels.cpu(), sentences.cpu())
            for hidden, labels, sentences, _ in teacher_forced(
                self.module.model, batches, precision
            )
        ]
        hidden, labels, sentences = (torch.cat(column) for column in zip(*parts, strict=True))
        return hidden, labels, sentences

    def queries(self) -> Tensor:
        """Hidden states that no datastore entry was made from, [M, D]."""
        return self._tokens[0]

    def record_into(self, recorder: Recorder) -> None:
        """Records every token of the validation set."""
        hidden, labels, sentences = self._tokens
        recorder.write(hidden, labels, sentences)

    def tuned(
        self,
        datastore: Datastore,
        measured: MeasuredIndex,
        k: int,
        num_candidates: int,
        output_digest: str,
    ) -> Setting:
        """The best k, λ and T on the validation set, remembered beside the datastore.

        Args:
            datastore: Of the module's present weights.
            measured: An index over it.
            k: The most neighbours to try.
            num_candidates: Settings that are decoded with.
            output_digest: Of the output projection: another one shares the datastore, but p_NMT and
                with it the best setting are others.
        """
        corpus = self.datamodule.valid_corpus
        index = measured.index.description
        question = [corpus.digest, index, k, num_candidates, output_digest]
        name = hashlib.sha256(json.dumps(question).encode()).hexdigest()[:12]
        path = datastore.directory / "tuning" / f"{name}.json"
        if path.exists():
            return Setting(**json.loads(path.read_text())["setting"])

        recorder = Recorder(
            Retriever(datastore.values, measured.index, k), self.module.nmt_distribution
        )
        self.record_into(recorder)
        tuning = tune(
            recorder.finish(),
            lambda setting: self._bleu(setting, datastore, measured),
            num_candidates=num_candidates,
        )
        path.parent.mkdir(exist_ok=True)
        report = {
            "setting": asdict(tuning.setting),
            "candidates": [asdict(candidate) for candidate in tuning.candidates],
        }
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(report, indent=2) + "\n")
        partial.rename(path)
        return tuning.setting

    def _bleu(self, setting: Setting, datastore: Datastore, measured: MeasuredIndex) -> float:
        """BLEU of greedy translations of the validation set with a setting."""
        distribution = with_retrieval(
            self.module.nmt_distribution, datastore, measured.index, setting
        )
        texts: dict[int, str] = {}
        greedy = BeamSearch(beam_size=1)
        with evaluating(self.module), self.trainer.precision_plugin.forward_context():
            for batch in self.datamodule.whole_dataloader("valid"):
                on_device = batch.to(self.module.device)
                best = self.module.translate(on_device, greedy, distribution)
                decoded = [self.module.tokenizer.decode(each.tokens) for each in best]
                texts.update(zip(batch.index.tolist(), decoded, strict=True))
        references = self.datamodule.references("valid")
        return bleu([texts[i] for i in range(len(references))], references).value
