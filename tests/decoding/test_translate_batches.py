"""`translate_batches`: every sentence once, by its row, with the hypotheses of its own search."""

from lightning_knnmt.data import Batch, ParallelDataModule
from lightning_knnmt.decoding import BeamSearch, SoftmaxDistribution, translate_batches
from lightning_knnmt.models import Transformer


def test_each_sentence_gets_the_hypotheses_that_it_gets_alone(
    tiny_model: Transformer, toy_datamodule: ParallelDataModule
) -> None:
    vocabulary = toy_datamodule.tokenizer.vocabulary
    distribution = SoftmaxDistribution(tiny_model.output_projection)
    search = BeamSearch(beam_size=3)
    batches = list(toy_datamodule.test_dataloader())
    assert len(batches) > 1

    def alone(batch: Batch) -> list[Batch]:
        return [
            Batch(batch.source_ids[[i]], batch.target_ids[[i]], batch.index[[i]], batch.pad_id)
            for i in range(len(batch.index))
        ]

    together, apart = (
        dict(translate_batches(tiny_model, vocabulary, some, search, distribution))
        for some in (batches, [single for batch in batches for single in alone(batch)])
    )
    assert sorted(together) == list(range(len(toy_datamodule.test_corpus)))
    for row, hypotheses in together.items():
        assert len(hypotheses) == 3
        assert [h.tokens for h in hypotheses] == [h.tokens for h in apart[row]]
