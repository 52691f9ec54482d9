"""Our search with a model that fairseq trained, against what fairseq-generate printed.

Skipped unless LIGHTNING_KNNMT_FAIRSEQ_DIR names a folder with a checkpoint, its dictionaries, its
BPE codes, and generate.out, the output of

    fairseq-generate data-bin --path checkpoint_best.pt --beam 4 --lenpen 0.6 \
        --max-len-a 1.2 --max-len-b 10
"""

import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import sacrebleu
import torch

from lightning_knnmt.data import FairseqTokenizer
from lightning_knnmt.decoding import BeamSearch, Hypothesis, SoftmaxDistribution
from lightning_knnmt.models import Transformer
from lightning_knnmt.pretrained import load_fairseq

FOLDER = os.environ.get("LIGHTNING_KNNMT_FAIRSEQ_DIR")
pytestmark = pytest.mark.skipif(
    FOLDER is None, reason="needs LIGHTNING_KNNMT_FAIRSEQ_DIR, a folder of fairseq's"
)
BATCH = 50


class Printed(NamedTuple):
    """What fairseq-generate says of one sentence; all text is segmented."""

    source: str
    reference: str
    hypothesis: str
    score: float  # by token, to base 2
    token_scores: list[float]  # likewise, each


@pytest.fixture(scope="module")
def printed() -> list[Printed]:
    fields: dict[int, dict[str, list[str]]] = {}
    for line in (Path(str(FOLDER)) / "generate.out").read_text(encoding="utf-8").splitlines():
        if match := re.match(r"([STHP])-(\d+)\t(.*)", line):
            fields.setdefault(int(match[2]), {})[match[1]] = match[3].split("\t")
    return [
        Printed(f["S"][0], f["T"][0], f["H"][1], float(f["H"][0]), [*map(float, f["P"][0].split())])
        for _, f in sorted(fields.items())
    ]


@pytest.fixture(scope="module")
def loaded() -> tuple[Transformer, FairseqTokenizer]:
    torch.set_num_threads(1)
    return load_fairseq(str(FOLDER), text="segmented")


@pytest.fixture(scope="module")
def ours(loaded: tuple[Transformer, FairseqTokenizer], printed: list[Printed]) -> list[Hypothesis]:
    """Our best hypothesis of each sentence."""
    model, tokenizer = loaded
    vocabulary = tokenizer.vocabulary
    search = BeamSearch(beam_size=4, length_penalty=0.6, max_length_ratio=1.2, max_length_offset=10)
    best: dict[int, Hypothesis] = {}
    sources = tokenizer.encode_source([each.source for each in printed])
    by_length = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    for start in range(0, len(sources), BATCH):
        rows = by_length[start : start + BATCH]
        tensors = [torch.tensor(sources[i]) for i in rows]
        source_ids = torch.nn.utils.rnn.pad_sequence(
            tensors, batch_first=True, padding_value=vocabulary.pad_id
        )
        found = search(
            model,
            source_ids,
            source_ids != vocabulary.pad_id,
            SoftmaxDistribution(model.output_projection),
            start_id=vocabulary.start_id,
            eos_id=vocabulary.eos_id,
            max_positions=model.max_positions,
        )
        best |= {i: hypotheses[0] for i, hypotheses in zip(rows, found, strict=True)}
    return [best[i] for i in range(len(sources))]


def test_forced_tokens_have_the_printed_scores(
    loaded: tuple[Transformer, FairseqTokenizer], printed: list[Printed]
) -> None:
    model, tokenizer = loaded
    for each in printed:
        source = torch.tensor(tokenizer.encode_source([each.source]))
        target = torch.tensor(tokenizer.encode_target([each.hypothesis]))
        decoder_input = torch.cat([target[:, -1:], target[:, :-1]], dim=1)
        with torch.inference_mode():
            hidden = model(source, decoder_input).hidden
            log_probs = torch.log_softmax(model.output_projection(hidden), dim=-1)
        scores = log_probs.gather(-1, target.unsqueeze(-1)).flatten() / math.log(2)
        expected = torch.tensor(each.token_scores)
        torch.testing.assert_close(scores, expected, atol=2e-4, rtol=0)


def test_the_search_finds_the_same_hypotheses(
    loaded: tuple[Transformer, FairseqTokenizer],
    printed: list[Printed],
    ours: list[Hypothesis],
) -> None:
    _, tokenizer = loaded
    for hypothesis, each in zip(ours, printed, strict=True):
        score = hypothesis.normalized_score / math.log(2)
        assert score == pytest.approx(each.score, abs=1e-3)
        assert tokenizer.decode(hypothesis.tokens) == each.hypothesis


def test_bleu_is_the_printed(
    loaded: tuple[Transformer, FairseqTokenizer],
    printed: list[Printed],
    ours: list[Hypothesis],
) -> None:
    """fairseq counts pieces, does not smooth, and prints two decimals."""
    _, tokenizer = loaded
    last = (Path(str(FOLDER)) / "generate.out").read_text(encoding="utf-8").splitlines()[-1]
    match = re.search(r"BLEU4 = ([\d.]+)", last)
    assert match
    bleu = sacrebleu.corpus_bleu(
        [tokenizer.decode(hypothesis.tokens) for hypothesis in ours],
        [[each.reference for each in printed]],
        tokenize="none",
        smooth_method="none",
        force=True,
    )
    assert f"{bleu.score:.2f}" == match[1]
