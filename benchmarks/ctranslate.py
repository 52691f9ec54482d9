"""CTranslate2 (https://github.com/OpenNMT/CTranslate2) with a Hugging Face model's weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# (tokens, sources, beam size, how many hypotheses) -> their tokens, sentence by sentence
Translate = Callable[[int, Tensor, int, int], list[list[list[int]]]]


def make_translator(model: Any, folder: Path) -> Translate | None:
    """CTranslate2's decoder in float32, with torch's number of threads; None if not installed.

    Args:
        model: A MarianMT or FSMT model of transformers.
        folder: Where its converted weights may be written; read once.
    """
    try:
        import ctranslate2
    except ImportError:
        return None
    config = model.config
    vocab_size = model.get_input_embeddings().num_embeddings
    _write(model, folder / "ctranslate2", [str(i) for i in range(vocab_size)])
    translator = ctranslate2.Translator(
        str(folder / "ctranslate2"),
        device="cpu",
        compute_type="float32",
        inter_threads=1,
        intra_threads=torch.get_num_threads(),
    )

    def translate(tokens: int, source_ids: Tensor, beam: int, count: int) -> list[list[list[int]]]:
        sources = [[str(i) for i in ids if i != config.pad_token_id] for ids in source_ids.tolist()]
        # It cannot force EOS: where hypotheses are compared, the last token is left out.
        length = tokens if count == 1 else tokens - 1
        results = translator.translate_batch(
            sources,
            beam_size=beam,
            num_hypotheses=count,
            min_decoding_length=length,
            max_decoding_length=length,
        )
        return [[[int(i) for i in tokens] for tokens in each.hypotheses] for each in results]

    return translate


def _write(model: Any, folder: Path, tokens: list[str]) -> None:
    """Converts a model as CTranslate2's own loader does, which has none for FSMT."""
    from ctranslate2.converters.transformers import BartLoader
    from ctranslate2.specs import TransformerSpec
    from ctranslate2.specs.common_spec import Activation

    config, inner, loader = model.config, model.model, BartLoader()
    layers = (config.encoder_layers, config.decoder_layers)
    activation = {"relu": Activation.RELU}[config.activation_function]
    spec = TransformerSpec.from_config(
        layers, config.encoder_attention_heads, pre_norm=False, activation=activation
    )
    loader.set_encoder(spec.encoder, inner.encoder)
    loader.set_decoder(spec.decoder, inner.decoder)
    loader.set_linear(spec.decoder.projection, model.get_output_embeddings())
    if config.model_type == "fsmt":  # its table begins with the rows up to the padding id
        for side, module in ((spec.encoder, inner.encoder), (spec.decoder, inner.decoder)):
            side.position_encodings.encodings = module.embed_positions.weight[
                config.pad_token_id + 1 :
            ]
    spec.register_source_vocabulary(tokens)
    spec.register_target_vocabulary(tokens)
    spec.config.eos_token = str(config.eos_token_id)
    spec.config.decoder_start_token = str(config.decoder_start_token_id)
    spec.config.bos_token = spec.config.decoder_start_token
    spec.config.unk_token = str(config.pad_token_id)  # never occurs
    spec.validate()
    folder.mkdir()
    spec.save(str(folder))
