"""How fast do we decode, compared with Hugging Face's `generate` and CTranslate2?

The same random weights, random sources and work: every hypothesis has exactly --tokens tokens, as
EOS is suppressed until the last step and then forced. Each precision is compared with itself.
CTranslate2 is optional:

    pip install --target ENGINE ctranslate2
    PYTHONPATH=ENGINE:. python -m benchmarks.generate --config base
"""

import argparse
import copy
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.ctranslate import make_translator
from benchmarks.random_models import CONFIGURATIONS, make_model
from benchmarks.workload import in_turns, machine, print_table
from lightning_knnmt.decoding import SoftmaxDistribution, beam_search
from lightning_knnmt.models import Transformer
from lightning_knnmt.pretrained import load_huggingface_model

HEADER = (
    *("precision", "batch", "beam", "decoder", "tokens/s", "ours over it"),
    *("tokens per processor second", "ours over it", "same hypotheses"),
)
# Fewer identical hypotheses in float32 are not due to ties: something else is computed.
AGREEMENT = 0.95

# (sources, beam size, how many hypotheses of each sentence) -> their tokens, sentence by sentence
Decoder = Callable[[Tensor, int, int], Sequence[Sequence[Sequence[int]]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", choices=CONFIGURATIONS, default="base")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64], help="sentences")
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--tokens", type=int, default=24, help="of every hypothesis, EOS included")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each task")
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args()
    theirs = make_model(options.config)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = load_huggingface_model(folder)
        translate = make_translator(theirs, Path(folder))
    parameters = sum(p.numel() for p in ours.parameters())
    print(f"{machine()}\n{options.config}: {parameters:,} parameters, ", end="")
    print(f"{options.tokens} tokens per hypothesis\n")
    if translate is None:
        print("CTranslate2 is not installed, so it is left out (see --help).\n")

    rows = []
    for precision in options.precisions:
        dtype: torch.dtype = getattr(torch, precision)
        decoders: dict[str, Decoder] = {
            "ours": functools.partial(decode, copy.deepcopy(ours).to(dtype), options.tokens),
            "generate": functools.partial(
                generate, copy.deepcopy(theirs).to(dtype), options.tokens
            ),
        }
        if translate is not None and precision == "float32":
            decoders["CTranslate2"] = functools.partial(translate, options.tokens)
        for batch in options.batches:
            source_ids = random_sources(batch, ours)
            for beam in options.beams:
                rows += compare(decoders, source_ids, beam, precision, options)
                print_table(HEADER, rows[-len(decoders) :])
    print_table(HEADER, rows)


def compare(
    decoders: dict[str, Decoder],
    source_ids: Tensor,
    beam: int,
    precision: str,
    options: argparse.Namespace,
) -> list[Sequence[object]]:
    """Decodes a batch with each decoder, checks and times it; returns rows of the table."""
    found = {name: decode(source_ids, beam, beam) for name, decode in decoders.items()}
    agreement = {
        name: shared(found["ours"], hypotheses, options.tokens - 1)
        for name, hypotheses in found.items()
    }
    if precision == "float32" and agreement["generate"] < AGREEMENT:
        raise SystemExit(
            f"Only {agreement['generate']:.1%} of our hypotheses are generate's too, fewer than "
            f"{AGREEMENT:.0%}: the two do different work."
        )
    tasks = {
        name: functools.partial(decode, source_ids, beam, 1) for name, decode in decoders.items()
    }
    seconds = in_turns(options.repeats, warm=False, **tasks)
    tokens = options.tokens * len(source_ids)
    rows: list[Sequence[object]] = []
    for name, (wall, cpu) in seconds.items():
        ratios = wall / seconds["ours"].wall, cpu / seconds["ours"].cpu
        rows.append(
            (
                *(precision, len(source_ids), beam, name),
                *(f"{tokens / wall:.0f}", f"{ratios[0]:.2f}"),
                *(f"{tokens / cpu:.0f}", f"{ratios[1]:.2f}", f"{agreement[name]:.1%}"),
            )
        )
    return rows


def shared(
    ours: Sequence[Sequence[Sequence[int]]], theirs: Sequence[Sequence[Sequence[int]]], length: int
) -> float:
    """The share of our hypotheses, cut to `length` tokens, that they have too.

    The last token is forced, so it is cut off; its part in a score differs between the decoders, so
    the n best are compared as sets.
    """
    same = total = 0
    for our, their in zip(ours, theirs, strict=True):
        others = {tuple(tokens[:length]) for tokens in their}
        same += sum(tuple(tokens[:length]) in others for tokens in our)
        total += len(our)
    return same / total


def random_sources(batch: int, model: Transformer, seed: int = 2) -> Tensor:
    """Sentences of 5 to 30 tokens, the last of them EOS, padded on the right, [B, S]."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 31, (batch,), generator=generator)
    special = 3  # ids that published vocabularies reserve for padding, EOS and the like
    high = model.source_embedding.num_embeddings - special
    ids = torch.randint(special, high, (batch, int(lengths.max())), generator=generator)
    positions = torch.arange(ids.shape[1])
    ids[positions == lengths.unsqueeze(1) - 1] = model.eos_id
    return ids.masked_fill(positions >= lengths.unsqueeze(1), model.pad_id)


def decode(
    model: Transformer, tokens: int, source_ids: Tensor, beam: int, count: int
) -> list[list[list[int]]]:
    """Our decoder: the best `count` hypotheses of each sentence."""
    hypotheses = beam_search(
        model,
        source_ids,
        SoftmaxDistribution(model.output_projection),
        start_id=model.start_id,
        eos_id=model.eos_id,
        beam_size=beam,
        min_length=tokens - 1,
        max_length=tokens,
    )
    return [[each.tokens for each in ranked[:count]] for ranked in hypotheses]


@torch.inference_mode()
def generate(
    model: Any, tokens: int, source_ids: Tensor, beam: int, count: int
) -> list[list[list[int]]]:
    """Hugging Face's decoder."""
    output = model.generate(
        input_ids=source_ids,
        attention_mask=(source_ids != model.config.pad_token_id).long(),
        num_beams=beam,
        num_return_sequences=count,
        do_sample=False,
        early_stopping=False,
        min_new_tokens=tokens - 1,
        max_new_tokens=tokens,
        forced_eos_token_id=model.config.eos_token_id,
    )
    ids: list[list[list[int]]] = output.view(len(source_ids), count, -1)[:, :, 1:].tolist()
    return ids


if __name__ == "__main__":
    main()
