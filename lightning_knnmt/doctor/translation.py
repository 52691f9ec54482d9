"""Whether the model translates this text at all, and in this direction."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_knnmt.data import Tokenizer
from lightning_knnmt.doctor.finding import Finding, example, graded
from lightning_knnmt.evaluation.scoring import bleu
from lightning_knnmt.models import Transformer

NO_TRANSLATION = 2.0  # BLEU
POOR_TRANSLATION = 10.0
CLEARLY = 0.2  # nats a token


def check_model(model: Transformer) -> Finding:
    """Architecture and size; weights that are no numbers."""
    broken = [name for name, each in model.named_parameters() if not each.isfinite().all()]
    if broken:
        return Finding(
            "model",
            "problem",
            f"{broken[0]} holds NaN or infinity: the file is damaged, or training diverged.",
        )
    config = model.config
    parameters = sum(each.numel() for each in model.parameters())
    return Finding(
        "model",
        "ok",
        f"{config['encoder_layers']} + {config['decoder_layers']} layers of "
        f"{config['model_dim']} ({config['decoder_cell']} decoder, {config['norm']}-norm), "
        f"{parameters:,} parameters.",
    )


def check_vocabulary(model: Transformer, tokenizer: Tokenizer) -> Finding:
    """Whether the tokenizer's ids are the model's."""
    vocabulary, size = tokenizer.vocabulary, model.output_projection.out_features
    ours = (vocabulary.size, vocabulary.pad_id, vocabulary.start_id, vocabulary.eos_id)
    theirs = (size, model.pad_id, model.start_id, model.eos_id)
    if ours != theirs:
        return Finding(
            "vocabulary",
            "problem",
            f"The tokenizer has size, padding, start and end {ours}, the model {theirs}: they do "
            "not belong together.",
        )
    return Finding("vocabulary", "ok", f"{size:,} ids, the same in model and tokenizer.")


def check_bleu(
    hypotheses: Sequence[str], references: Sequence[str], sources: Sequence[str]
) -> Finding:
    """BLEU of greedy translations; a fault of languages or preparation leaves next to nothing."""
    score = bleu(hypotheses, references).value
    text = f"BLEU {score:.1f} of {len(hypotheses)} greedy translations"
    if score >= POOR_TRANSLATION:
        return Finding("translation", "ok", f"{text}.")
    copied = bleu(hypotheses, sources).value
    cause = (
        "it copies the source, so the text may be in the model's target language already"
        if copied > 2 * max(score, NO_TRANSLATION)
        else "wrong languages, text that is tokenised otherwise, or weights that are not trained"
    )
    said = f"{example(sources[0])} became {example(hypotheses[0])}"
    verdict = graded(-score, -POOR_TRANSLATION, -NO_TRANSLATION)
    return Finding("translation", verdict, f"{text}: {cause}; {said}.")


def check_direction(forward: float, backward: float, source: str, target: str) -> Finding:
    """Whether the model finds the text likelier the other way round.

    Args:
        forward: Mean log p(gold) of targets given sources, in nats a token.
        backward: The same with both sides exchanged.
        source: The source's language.
        target: The target's.
    """
    text = f"mean log p(gold) is {forward:.2f} from {source} to {target}, {backward:.2f} backwards"
    if backward > forward + CLEARLY:
        return Finding("direction", "problem", f"{text}: exchange source and target.")
    return Finding("direction", "ok", f"{text}.")
