"""Keys of the last feed-forward network, from KNNCallback down."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_knnmt.data import ParallelDataModule
from lightning_knnmt.decoding import BeamSearch
from lightning_knnmt.retrieval import (
    CombinerTrainer,
    FlatChoice,
    FlatIndex,
    LocalSource,
    Precision,
    Retriever,
    StaleDatastoreError,
    TuningText,
    teacher_forced,
)
from lightning_knnmt.training import (
    KNNCallback,
    NMTModule,
    OPLFineTuner,
    TrainOnDatastore,
    knn_callback,
    precision_of,
)

NewTrainer = Callable[..., pl.Trainer]
NewCallback = Callable[..., KNNCallback]


def read_by_the_ffn(module: NMTModule, source_ids: Tensor, decoder_input: Tensor) -> Tensor:
    """What a hook on the last feed-forward network sees, [B, T, D]."""
    inputs: list[Tensor] = []
    last: Any = module.model.decoder_layers[-1]
    handle = last.ffn.up.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    with torch.no_grad():
        module.model.eval()(source_ids, decoder_input)
    handle.remove()
    return inputs[0]


@pytest.fixture
def tested(
    module: NMTModule, toy_datamodule: ParallelDataModule,
    new_trainer: NewTrainer, new_callback: NewCallback,
) -> KNNCallback:  # fmt: skip
    """A callback after a test with such keys."""
    knn = new_callback(key_layer="ffn_input")
    new_trainer(knn).test(module, datamodule=toy_datamodule, verbose=False)
    return knn


def test_the_datastore_holds_and_finds_what_the_feed_forward_network_reads(
    tested: KNNCallback, module: NMTModule, toy_datamodule: ParallelDataModule
) -> None:
    assert tested.retrieval is not None
    store, corpus = tested.retrieval.datastore, toy_datamodule.train_corpus
    assert store.manifest.key_layer == "ffn_input"
    assert store.keys.shape == (int(corpus.target_lengths.sum()), 24)
    for sentence in (0, 17, 299):
        source_ids, target_ids = (torch.tensor(side.astype("int64")) for side in corpus[sentence])
        decoder_input = torch.cat([torch.tensor([module.model.start_id]), target_ids[:-1]])
        keys = read_by_the_ffn(module, source_ids[None], decoder_input[None])[0]
        rows = slice(*corpus.target_offsets[sentence : sentence + 2])
        assert store.values[rows].tolist() == target_ids.tolist()
        torch.testing.assert_close(
            torch.from_numpy(store.keys[rows].astype("float32")), keys, atol=2e-3, rtol=1e-3
        )

    # a training token's own entry is at distance zero
    source = LocalSource(FlatIndex(store.keys), store.values)
    retriever = Retriever(source, 1, store.manifest.key_layer)
    loader = toy_datamodule.datastore_dataloader()
    states, _, sentences = next(teacher_forced(module.model, loader, Precision()))
    neighbours = retriever(states)
    rows = [np.arange(*corpus.target_offsets[i : i + 2]) for i in dict.fromkeys(sentences.tolist())]
    own = np.concatenate(rows)
    assert neighbours.distances.eq(0).all()
    # another entry may have the very same key
    assert (store.keys[neighbours.entries[:, 0].numpy()] == store.keys[own]).all()
    assert (neighbours.entries[:, 0].numpy() == own).mean() > 0.9


def test_with_weight_zero_it_is_the_model_alone_bit_for_bit(
    module: NMTModule, toy_datamodule: ParallelDataModule,
    new_trainer: NewTrainer, new_callback: NewCallback, translated: Callable[..., Any],
) -> None:  # fmt: skip
    compared = []

    class Compare(pl.Callback):
        def on_test_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
            model, mixed = pl_module.model, pl_module.distribution
            states = model(batch.source_ids, batch.decoder_input)
            assert torch.equal(mixed(states), pl_module.nmt_distribution(states))
            first = states.select((slice(None), 0))
            best, alone = mixed.top(first, 3), pl_module.nmt_distribution.top(first, 3)
            assert torch.equal(best[0], alone[0])
            compared.append(states.hidden.shape)

    alone = translated(new_trainer(), module)
    knn = new_callback(key_layer="ffn_input", knn_weight=0.0)
    new_trainer(knn, Compare()).test(module, datamodule=toy_datamodule, verbose=False)
    assert compared
    assert translated(new_trainer(knn), module) == alone


def test_each_layer_has_a_datastore_of_its_own_and_refuses_the_others(
    tested: KNNCallback, module: NMTModule, toy_datamodule: ParallelDataModule,
    new_trainer: NewTrainer, new_callback: NewCallback, tmp_path: Path,
) -> None:  # fmt: skip
    assert tested.retrieval is not None
    folder = tested.retrieval.datastore.directory
    test: dict[str, Any] = {"datamodule": toy_datamodule, "verbose": False}
    with pytest.raises(StaleDatastoreError, match=r"ffn_input.*opl_input"):
        new_trainer(new_callback(directory=folder)).test(module, **test)
    new_trainer(new_callback()).test(module, **test)
    (other,) = {*(tmp_path / "datastores").iterdir()} - {folder}
    with pytest.raises(StaleDatastoreError, match=r"opl_input.*ffn_input"):
        new_trainer(new_callback(directory=other, key_layer="ffn_input")).test(module, **test)


def test_the_output_projection_never_trains_on_other_keys(
    tested: KNNCallback, module: NMTModule, toy_datamodule: ParallelDataModule,
    new_trainer: NewTrainer, tmp_path: Path,
) -> None:  # fmt: skip
    assert tested.retrieval is not None
    tuner = OPLFineTuner(
        module.model, module.tokenizer, BeamSearch(beam_size=1),
        optimizer=functools.partial(torch.optim.Adam, lr=3e-3), warmup_steps=0, bleu_every=0,
    )  # fmt: skip
    source = TrainOnDatastore(tmp_path, directory=tested.retrieval.datastore.directory)
    with pytest.raises(StaleDatastoreError, match="opl_input"):
        new_trainer(source, max_steps=1).fit(tuner, datamodule=toy_datamodule)


def test_numbers_are_tuned_and_a_network_is_trained_on_such_keys(
    module: NMTModule, toy_datamodule: ParallelDataModule, tmp_path: Path,
    new_trainer: NewTrainer, new_callback: NewCallback,
) -> None:  # fmt: skip
    test: dict[str, Any] = {"datamodule": toy_datamodule, "verbose": False}
    tuned = new_callback(
        key_layer="ffn_input", tune=True, num_neighbours=None, temperature=None, max_neighbours=4,

    )  # fmt: skip
    trainer = new_trainer(tuned)
    trainer.test(module, **test)
    adaptive = knn_callback(
        "adaptive", tmp_path / "datastores", FlatChoice(), key_layer="ffn_input", max_neighbours=4,
        temperature=10.0, trainer=CombinerTrainer(max_updates=2, first_validation=1),
    )  # fmt: skip
    new_trainer(adaptive).test(module, **test)
    for knn in (tuned, adaptive):
        assert knn.retrieval is not None
        assert knn.retrieval.datastore.manifest.key_layer == "ffn_input"

    assert adaptive.retrieval is not None
    queries = TuningText(
        module.model, module.tokenizer, toy_datamodule.valid_corpus, adaptive.retrieval.datastore,
        FlatChoice(), "l2", precision=precision_of(trainer),
        max_tokens=toy_datamodule.eval_max_tokens,
    ).queries()  # fmt: skip
    read = [
        read_by_the_ffn(module, batch.source_ids, batch.decoder_input)[batch.label_mask]
        for batch in toy_datamodule.whole_dataloader("valid")
    ]
    assert torch.equal(queries, torch.cat(read))


def test_another_layer_is_refused_at_once(new_callback: NewCallback) -> None:
    with pytest.raises(ValueError, match=r"attention.*opl_input"):
        new_callback(key_layer="attention")
