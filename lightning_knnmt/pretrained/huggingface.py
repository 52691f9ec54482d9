"""Hugging Face directories (`save_pretrained`, or a copy of a model of the hub).

MarianMT (OPUS-MT; Tiedemann & Thottingal, 2020), FSMT (fairseq's WMT19 models; Ng et al., 2019,
arXiv:1907.06616), M2M-100 (Fan et al., 2020, arXiv:2010.11125) and NLLB-200, which has its
architecture. The weights keep their values; what differs between the families stands in
`huggingface_config.FAMILIES`.
"""

from pathlib import Path

from lightning_knnmt.data import Tokenizer
from lightning_knnmt.models import Transformer
from lightning_knnmt.pretrained.assembly import assemble
from lightning_knnmt.pretrained.huggingface_config import read_config, settings
from lightning_knnmt.pretrained.huggingface_files import CONFIG, HuggingFaceError, Weights
from lightning_knnmt.pretrained.huggingface_tokenizer import Languages, read_tokenizer
from lightning_knnmt.pretrained.huggingface_weights import read_state


def is_huggingface(path: Path) -> bool:
    """Whether the path is a directory with a configuration."""
    return path.is_dir() and (path / CONFIG).is_file()


def load_huggingface(
    path: Path | str, *, source_lang: str | None = None, target_lang: str | None = None
) -> tuple[Transformer, Tokenizer]:
    """Reads a model and its tokenizer.

    Args:
        path: The directory.
        source_lang: The source's language code, for models that translate from many.
        target_lang: The target's, for models that translate into many.

    Raises:
        HuggingFaceError: If a file is damaged or absent, or architecture or language unknown.
    """
    directory = Path(path)
    model = load_huggingface_model(directory)
    family = read_config(directory)["model_type"]
    tokenizer = read_tokenizer(directory, family, model, Languages(source_lang, target_lang))
    return model, tokenizer


def load_huggingface_model(path: Path | str) -> Transformer:
    """Reads a model without its tokenizer, in evaluation mode; half precision becomes float32.

    Raises:
        HuggingFaceError: If a file is damaged or absent, or the architecture another.
    """
    directory = Path(path)
    config = read_config(directory)
    weights = Weights(directory)
    architecture, state = read_state(config, weights)
    try:
        return assemble(settings(config) | architecture, state)
    except ValueError as error:
        raise HuggingFaceError(f"{directory / CONFIG}: {error}") from error
