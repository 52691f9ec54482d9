"""Models of published sizes with random weights, which suffice for measuring speed.

They are made by Hugging Face's transformers, which nothing else needs:
`pip install -r requirements-dev.txt`.
"""

import sys
from typing import Any

import torch

COMMON = {"init_std": 0.02, "scale_embedding": True, "activation_function": "relu"}
EMBEDDING_STD = 0.1  # so that scores seldom tie
MARIAN_IDS = {"eos_token_id": 0, "forced_eos_token_id": 0}


def _sizes(dim: int, layers: int, heads: int, encoder_ffn: int, decoder_ffn: int) -> dict[str, int]:
    both = {"layers": layers, "attention_heads": heads}
    sides = {f"{s}_{name}": value for s in ("encoder", "decoder") for name, value in both.items()}
    return {
        **{"d_model": dim, "encoder_ffn_dim": encoder_ffn, "decoder_ffn_dim": decoder_ffn},
        **sides,
    }


def _marian(vocab_size: int, *sizes: int) -> tuple[str, dict[str, Any]]:
    last = vocab_size - 1
    ids = {"vocab_size": vocab_size, "pad_token_id": last, "decoder_start_token_id": last}
    return "Marian", {**COMMON, **_sizes(*sizes), **ids, **MARIAN_IDS}


def _fsmt(vocab_size: int, *sizes: int) -> tuple[str, dict[str, Any]]:
    vocabulary = {"src_vocab_size": vocab_size, "tgt_vocab_size": vocab_size}
    return "FSMT", {**COMMON, **_sizes(*sizes), **vocabulary, "tie_word_embeddings": True}


CONFIGURATIONS = {
    "tiny": _marian(1_000, 64, 2, 4, 128, 128),
    "tiny-fsmt": _fsmt(1_000, 64, 2, 4, 128, 96),
    "small": _fsmt(16_000, 512, 3, 8, 2048, 2048),  # 30M parameters
    "base": _marian(32_000, 512, 6, 8, 2048, 2048),  # OPUS-MT's
    "big": _fsmt(42_024, 1024, 6, 16, 8192, 4096),  # WMT19's, German to English
}
CLASSES = {"Marian": "MarianMTModel", "FSMT": "FSMTForConditionalGeneration"}


def make_model(name: str, seed: int = 1) -> Any:
    """A transformers model with random weights, in evaluation mode.

    Args:
        name: One of `CONFIGURATIONS`.
    """
    try:
        import transformers
    except ImportError:
        sys.exit("This benchmark needs transformers: pip install -r requirements-dev.txt.")
    torch.manual_seed(seed)
    family, settings = CONFIGURATIONS[name]
    config = getattr(transformers, f"{family}Config")(**settings)
    model = getattr(transformers, CLASSES[family])(config).eval()
    _enliven(model)
    model.generation_config.max_length = None  # FSMT's is 200; each call would warn
    transformers.utils.logging.disable_progress_bar()
    return model


@torch.no_grad()
def _enliven(model: Any) -> None:
    """Makes the next token depend on the previous ones: untrained models repeat themselves.

    If embedding and output projection are shared, the most probable next token is the last one,
    unless the decoder's last layer norm flips signs.
    """
    embedding = model.get_input_embeddings().weight
    embedding.mul_(EMBEDDING_STD / model.config.init_std)
    scale = model.model.decoder.layers[-1].final_layer_norm.weight
    scale.copy_(torch.randint(0, 2, scale.shape) * 2.0 - 1.0)
