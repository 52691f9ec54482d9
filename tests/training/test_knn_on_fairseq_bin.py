"""A data-bin serves as text does: datastore, tuning and test without conversion."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from lightning_knnmt.data import ParallelDataModule
from lightning_knnmt.decoding import BeamSearch
from lightning_knnmt.models import Transformer
from lightning_knnmt.training import KNNCallback, NMTModule


def test_a_data_bin_gives_the_datastore_and_translations_of_its_text(
    toy_text: Path, toy_data_bin: tuple[Path, Any], tmp_path: Path,
    new_trainer: Callable[..., pl.Trainer], new_callback: Callable[..., KNNCallback],
    translated: Callable[..., Any],
) -> None:  # fmt: skip
    root, tokenizer = toy_data_bin
    model = Transformer(
        vocab_size=tokenizer.vocabulary.size, pad_id=1, start_id=2, eos_id=2, model_dim=16,
        num_heads=2, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16,
    )  # fmt: skip
    greedy = BeamSearch(beam_size=1, max_length_ratio=1.0, max_length_offset=5)
    adam = functools.partial(torch.optim.Adam, lr=0.0)
    made = []
    for folder in (root, toy_text):
        data = ParallelDataModule(
            folder, "xx", "yy", tokenizer=tokenizer, cache_dir=tmp_path / "cache"
        )
        module = NMTModule(model, tokenizer, greedy, optimizer=adam)
        knn = new_callback(num_neighbours=None, temperature=None, tune=True, max_neighbours=2)
        trainer = new_trainer(knn)
        trainer.validate(module, datamodule=data, verbose=False)
        texts = translated(trainer, module, data)
        assert knn.retrieval is not None
        made.append((knn.retrieval, texts, data.references("test")))
    (ours, our_texts, our_references), (theirs, their_texts, their_references) = made
    assert ours.datastore.directory != theirs.datastore.directory
    assert ours.datastore.manifest.keys_digest == theirs.datastore.manifest.keys_digest
    assert ours.datastore.manifest.values_digest == theirs.datastore.manifest.values_digest
    assert ours.fitted == theirs.fitted
    assert our_texts == their_texts
    assert our_references == their_references
