"""What the validation set is for besides validation: held-out queries, and choosing a combiner."""

from functools import cached_property

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_knnmt.data import ParallelDataModule
from lightning_knnmt.decoding import BeamSearch, SoftmaxDistribution
from lightning_knnmt.evaluation.scoring import bleu
from lightning_knnmt.models import digest
from lightning_knnmt.retrieval import (
    Combiner,
    Datastore,
    Index,
    KNNDistribution,
    Record,
    Recorder,
    Retriever,
    keys_of,
)
from lightning_knnmt.training.nmt import NMTModule
from lightning_knnmt.training.teacher_forcing import evaluating, teacher_forced


def with_retrieval(
    nmt: SoftmaxDistribution, datastore: Datastore, index: Index, combiner: Combiner
) -> KNNDistribution:
    """The model's distribution mixed with what a datastore says."""
    retriever = Retriever(
        datastore.values, index, combiner.num_neighbours, datastore.manifest.key_layer
    )
    return KNNDistribution(nmt, retriever, combiner)


def require_queries(datamodule: ParallelDataModule) -> None:
    """Raises, with the way out, if there is no validation set to measure an index on.

    Only where nothing else needs that set, so that exact search would do without it.
    """
    try:
        _ = datamodule.valid_corpus
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{error} Or set index=flat, which needs no validation set: index=auto and "
            "index=faiss are measured on one, even with knn.tune=false."
        ) from error


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
        """Hidden states [M, D] (or [M, 2 D]), labels [M] and sentences [M], on the CPU."""
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

    @cached_property
    def output_digest(self) -> str:
        """Of the output projection, which p_NMT depends on and a fingerprint leaves out."""
        return digest([], self.module.model.output_projection.state_dict())

    def queries(self) -> Tensor:
        """Keys that no datastore entry was made from, [M, D]."""
        require_queries(self.datamodule)
        return keys_of(self._tokens[0], self.module.model.key_layer)

    def record_into(self, recorder: Recorder) -> None:
        """Records every token of the validation set."""
        hidden, labels, sentences = self._tokens
        recorder.write(hidden, labels, sentences)

    def record(self, datastore: Datastore, index: Index, k: int, keep_best: int = 0) -> Record:
        """What model and datastore say about every token of the validation set.

        Args:
            datastore: Of the module's present weights.
            index: Over it.
            k: Neighbours of each token.
            keep_best: How many of the model's best log-probabilities of each.
        """
        retriever = Retriever(datastore.values, index, k, datastore.manifest.key_layer)
        recorder = Recorder(retriever, self.module.nmt_distribution, keep_best=keep_best)
        self.record_into(recorder)
        return recorder.finish()

    def bleu(self, datastore: Datastore, index: Index, combiner: Combiner) -> float:
        """BLEU of greedy translations of the validation set with a combiner."""
        distribution = with_retrieval(self.module.nmt_distribution, datastore, index, combiner)
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
