"""What a datastore must know of the model that made its keys."""

from lightning_knnmt.models import Transformer, digest

# Settings of what comes after the key, or of training alone. Which matrices are one decides how
# they train, not what they compute: an untied copy makes the same keys.
NOT_IN_THE_KEY = (
    *("tied_embeddings", "output_bias"),
    *("dropout", "attention_dropout", "activation_dropout"),
)


def fingerprint(model: Transformer, precision: str = "32-true") -> str:
    """Digest of everything that shapes a key: two models with one fingerprint make the same keys.

    The output projection comes after the key, so it is left out: tuning it alone keeps a datastore
    valid, while adapters or full fine-tuning change the fingerprint. The rule is bitwise.

    Args:
        model: The model that makes the keys, of its present `key_layer`.
        precision: Lightning's name of the arithmetic ("32-true", "bf16-mixed", ...), which changes
            the keys as much as a weight does.

    Returns:
        64 hexadecimal digits.
    """
    settings = {k: v for k, v in model.config.items() if k not in NOT_IN_THE_KEY}
    if model.key_layer != "opl_input":  # the default's fingerprints are older than the choice
        settings["key_layer"] = model.key_layer
    weights = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith("output_projection.")
    }
    return digest([precision, settings], weights)
