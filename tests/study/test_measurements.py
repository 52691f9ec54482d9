"""What systems are asked, for the analyses."""

import functools

import pytorch_lightning as pl
import torch

from lightning_knnmt.data import ParallelDataModule
from lightning_knnmt.decoding import BeamSearch
from lightning_knnmt.models import Transformer
from lightning_knnmt.modules import NMTModule
from lightning_knnmt.study.measurements import first_sentences, translate
from lightning_knnmt.study.system import System


def test_translations_are_greedy_within_the_runs_own_bounds(
    tiny_model: Transformer, toy_datamodule: ParallelDataModule
) -> None:
    adam = functools.partial(torch.optim.Adam, lr=0.0)
    search = BeamSearch(beam_size=3, max_length_ratio=0.5, max_length_offset=1)
    module = NMTModule(tiny_model, toy_datamodule.tokenizer, search, optimizer=adam).eval()
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    own = module.nmt_distribution
    system = System("NMT", module, toy_datamodule, trainer, None, own, num_sentences=10)

    batches = first_sentences(system, "test")
    found = translate(system, batches)
    assert sorted(found) == list(range(10))
    greedy = BeamSearch(beam_size=1, max_length_ratio=0.5, max_length_offset=1)
    with torch.inference_mode():
        for batch in batches:
            expected = module.translate(batch, greedy, own)
            assert [found[i] for i in batch.index.tolist()] == [each.tokens for each in expected]
