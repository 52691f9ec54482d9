"""A model that really translates: word by word, between two languages of twelve words each."""

import random
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_knnmt.data import ParallelDataModule, TokenBatchSampler
from lightning_knnmt.decoding import SoftmaxDistribution
from lightning_knnmt.models import Transformer

WORDS = {
    "casa": "house", "porta": "door", "luz": "light", "cor": "colour", "sala": "room",
    "mesa": "table", "rua": "street", "chave": "key", "noite": "night", "dia": "day",
    "Rui": "Roy", "fim": "end",
}  # fmt: skip
EPOCHS = 20


class Healthy(NamedTuple):
    """What belongs together."""

    model: Transformer
    data: ParallelDataModule


def write_text(folder: Path, seed: int = 3) -> None:
    """400 training and 40 validation sentences of three to six words, ended by a full stop."""
    rng = random.Random(seed)
    folder.mkdir(exist_ok=True)
    for split, size in (("train", 400), ("valid", 40)):
        sentences = [rng.choices(list(WORDS), k=rng.randint(3, 6)) for _ in range(size)]
        sides = (sentences, [[WORDS[word] for word in words] for words in sentences])
        for lang, side in zip(("pt", "en"), sides, strict=True):
            lines = "".join(f"{' '.join(words).capitalize()}.\n" for words in side)
            (folder / f"{split}.{lang}").write_text(lines)


@pytest.fixture(scope="session")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Healthy:
    folder = tmp_path_factory.mktemp("healthy")
    write_text(folder / "text")
    data = ParallelDataModule(
        folder / "text", "pt", "en", cache_dir=folder / "cache", vocab_size=90, max_tokens=1500
    )
    vocabulary = data.tokenizer.vocabulary
    torch.manual_seed(1)
    model = Transformer(
        vocab_size=vocabulary.size, pad_id=vocabulary.pad_id, start_id=vocabulary.start_id,
        eos_id=vocabulary.eos_id, model_dim=48, num_heads=2, encoder_layers=1, decoder_layers=1,
        encoder_ffn_dim=64, decoder_ffn_dim=64, dropout=0.0, norm="pre",
    )  # fmt: skip
    distribution = SoftmaxDistribution(model.output_projection)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for epoch in range(EPOCHS):
        loader = data.train_dataloader()
        assert isinstance(loader, DataLoader)
        assert isinstance(loader.sampler, TokenBatchSampler)
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            mask = batch.label_mask
            log_probs = distribution(model(batch.source_ids, batch.decoder_input).select(mask))
            loss = torch.nn.functional.nll_loss(log_probs, batch.labels[mask])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return Healthy(model.eval(), data)
