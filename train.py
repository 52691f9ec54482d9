r"""Trains or fine-tunes a model, builds its datastore, and tests it with and without retrieval.

python train.py                             the demo (experiment=demo)
python train.py data=text data.root=DIR data.source_lang=de data.target_lang=en model=transformer_small
python train.py --help                      every group, choice and setting
"""

import os
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf


def run(config: DictConfig) -> None:
    """One run, as `config` describes it."""
    import pytorch_lightning as pl  # here, because it takes seconds and --help should not
    from rich.console import Console

    from lightning_knnmt.evaluation import evaluate
    from lightning_knnmt.pretrained import Pretrained

    refuse_multirun_with_ranks(config)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    output_dir = Path(config.paths.output_dir)

    source = instantiate(
        config.model
    )  # a model with its tokenizer, or one that awaits a vocabulary
    if isinstance(source, Pretrained):
        model, tokenizer = source
        datamodule = build(config.data, tokenizer=tokenizer)
    else:
        datamodule = instantiate(config.data)
        tokenizer = datamodule.tokenizer
        vocabulary = tokenizer.vocabulary
        model = source(
            vocab_size=vocabulary.size,
            pad_id=vocabulary.pad_id,
            start_id=vocabulary.start_id,
            eos_id=vocabulary.eos_id,
        )

    search = instantiate(config.decoding)
    module = build(config.module, model=model, tokenizer=tokenizer, search=search)
    knn = instantiate(config.knn) or None
    callbacks = list(instantiate(config.callbacks).values()) if config.fit else []
    trainer = build(
        config.trainer,
        callbacks=callbacks + ([knn] if knn else []),
        logger=instantiate(config.logger) or False,
        enable_checkpointing=config.fit,
        enable_model_summary=config.fit,
    )
    for logger in trainer.loggers:
        logger.log_hyperparams(flat_settings(config))

    if config.fit:
        trainer.fit(module, datamodule=datamodule, ckpt_path=last_checkpoint(config, output_dir))
    if config.test:
        evaluate(
            trainer,
            module,
            datamodule,
            knn,
            checkpoint="best" if config.fit else None,
            output_dir=output_dir,
            console=Console(quiet=not trainer.is_global_zero),
        )


def build(config: DictConfig, **parts: Any) -> Any:
    """Instantiates `config` with finished parts: Hydra alone would turn dataclasses into config."""
    return instantiate(config, _partial_=True)(**parts)


def refuse_multirun_with_ranks(config: DictConfig) -> None:
    """A child rank would run the whole sweep again."""
    if HydraConfig.get().mode == RunMode.MULTIRUN and config.trainer.devices != 1:
        raise ValueError(
            f"-m (several runs in one command) works with trainer.devices=1 only, not "
            f"{config.trainer.devices}: use a shell loop or a W&B sweep instead."
        )


def last_checkpoint(config: DictConfig, output_dir: Path) -> Path | None:
    """Where training goes on from; None to begin anew."""
    last = output_dir / "checkpoints" / "last.ckpt"
    if not last.exists():
        return None
    if not config.resume:
        raise ValueError(
            f"{output_dir} already holds a training run: resume=true goes on with it, "
            f"another name=... starts a new one."
        )
    return last


def flat_settings(config: DictConfig) -> dict[str, Any]:
    """The whole configuration with dotted keys, as loggers like it."""
    settings: dict[str, Any] = {}

    def visit(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                visit(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            settings[prefix] = value

    visit("", OmegaConf.to_container(config, resolve=True))
    return settings


def run_or_explain(config: DictConfig) -> None:
    """Runs; a user's mistake ends in one sentence instead of a traceback."""
    try:
        run(config)
    except InstantiationException as error:
        explain(error.__cause__ or error, error)
    except (ValueError, OSError) as error:
        explain(error, error)


def explain(cause: BaseException, error: BaseException) -> None:
    if not isinstance(cause, (ValueError, OSError)) or "HYDRA_FULL_ERROR" in os.environ:
        raise error
    sys.exit(f"error: {cause}\n(HYDRA_FULL_ERROR=1 shows where it came from)")


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> None:
    run_or_explain(config)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.argv.append("experiment=demo")
    main()
