r"""Trains or fine-tunes a model, builds its datastore, and tests it with and without retrieval.

    python train.py                 the demo (experiment=demo)
    python train.py model=transformer_small \
        data=text data.root=DIR data.source_lang=de data.target_lang=en
    python train.py --help          every group, choice and setting
"""

import inspect
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

# What takes seconds to import is imported where it is used: --help should not wait for it.

log = logging.getLogger("lightning_knnmt.train")

# Threads that wait for each other by spinning take several times as long when another program needs
# a core; sleeping costs some percent on a quiet machine. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def run(config: DictConfig) -> None:
    """One run, as `config` describes it."""
    import pytorch_lightning as pl

    from lightning_knnmt.evaluation.evaluate import evaluate
    from lightning_knnmt.evaluation.loggers import finish, log_config
    from lightning_knnmt.evaluation.results import check_results
    from lightning_knnmt.training import load_best_weights

    refuse_multirun_with_ranks(config)
    refuse_unknown_settings(OmegaConf.to_container(config))
    refuse_missing_settings(config)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    datamodule, module = datamodule_and_module(config)
    output_dir = Path(config.paths.output_dir)
    if config.test:  # what is wrong is found now, not after training
        datamodule.test_corpora()
        check_results(output_dir)
    knn = instantiate(config.knn) or None
    # A callback that is null on the command line is left out.
    callbacks = [c for c in instantiate(config.callbacks).values() if c] if config.fit else []
    trainer = build(
        config.trainer,
        callbacks=callbacks + ([knn] if knn else []),
        logger=instantiate(config.logger) or False,
        enable_checkpointing=config.fit,
        enable_model_summary=config.fit,
    )
    log_config(trainer.loggers, OmegaConf.to_container(config, resolve=True))

    if config.fit:
        trainer.fit(module, datamodule=datamodule, ckpt_path=last_checkpoint(config, output_dir))
        load_best_weights(trainer, module)
    if config.validate:
        trainer.validate(module, datamodule=datamodule)
    if config.test:
        evaluate(
            trainer,
            module,
            datamodule,
            knn,
            output_dir=output_dir,
            method=module.method if config.fit else "NMT",
            base=base_model(config),
            without_retrieval=config.test_without_retrieval,
        )
    leave_system(config, trainer, module, datamodule, knn)
    finish(trainer.loggers)


def leave_system(config: DictConfig, trainer: Any, module: Any, datamodule: Any, knn: Any) -> None:
    """Leaves a system in the run's folder that `lightning-knnmt translate` takes, and says where.

    Retrieval is prepared now if no test has done it.
    """
    from lightning_knnmt.retrieval import SavedSystemError
    from lightning_knnmt.system import System
    from lightning_knnmt.training import precision_of

    precision = precision_of(trainer)
    model, tokenizer = module.model, module.tokenizer
    retrieval = knn.prepare(model, tokenizer, datamodule, precision) if knn else None
    source = {"path": getattr(trainer.checkpoint_callback, "best_model_path", None)}
    if not config.fit and not config.model.get("_partial_", False):
        source = instantiate(OmegaConf.merge(config.model, {"_target_": "builtins.dict"}))
    if not source["path"] or not trainer.is_global_zero:  # nothing was trained, or kept
        return
    languages = (datamodule.source_lang, datamodule.target_lang)
    try:
        system = System.of(
            source,
            model,
            tokenizer,
            module.search,
            retrieval,
            precision=precision.name,
            languages=languages,
        )
    except SavedSystemError as error:
        log.warning("No system is left in the run's folder: %s", error)
        return
    folder = Path(config.paths.output_dir)
    if folder.is_relative_to(Path.cwd()):
        folder = folder.relative_to(Path.cwd())
    system.save(folder / "system")
    log.info("System: %s; translate with: lightning-knnmt translate %s", folder / "system", folder)


def datamodule_and_module(config: DictConfig) -> tuple[Any, Any]:
    """A pretrained model brings its tokenizer to the text; a fresh one gets the text's."""
    from lightning_knnmt.pretrained import Pretrained

    source = instantiate(config.model)
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
    return datamodule, build(config.module, model=model, tokenizer=tokenizer, search=search)


def base_model(config: DictConfig) -> Callable[[], Any] | None:
    """Loads the model that fine-tuning began with; None if there is none, or no test of it."""
    is_fresh = config.model.get("_partial_", False)
    if is_fresh or not config.fit or not config.test_base:
        return None
    return lambda: instantiate(config.model).model


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


def refuse_unknown_settings(node: Any, where: str = "") -> None:
    """`+knn.foo=1` makes Hydra accept any name, but what is built from the group would not."""
    if not isinstance(node, dict):
        return
    if "_target_" in node:
        parameters = inspect.signature(get_object(node["_target_"])).parameters
        open_ended = any(each.kind == each.VAR_KEYWORD for each in parameters.values())
        for name in node.keys() - parameters.keys():
            if not open_ended and not name.startswith("_"):
                raise ValueError(
                    f"{where} has no setting {name!r}, only {', '.join(parameters)}: leave out "
                    f"+{where}.{name}."
                )
    for name, inner in node.items():
        refuse_unknown_settings(inner, f"{where}.{name}".lstrip("."))


def refuse_missing_settings(config: DictConfig) -> None:
    """Hydra would leave out what has no value, and a constructor would miss it."""
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise ValueError(
            f"{', '.join(missing)} must be given: add {' '.join(f'{key}=...' for key in missing)} "
            "to the command line."
        )


def last_checkpoint(config: DictConfig, output_dir: Path) -> Path | None:
    """Where training goes on from; None to begin anew."""
    from lightning_knnmt.pretrained import read_checkpoint

    last = output_dir / "checkpoints" / "last.ckpt"
    if not last.exists():
        return None
    if not config.resume:
        raise ValueError(
            f"{output_dir} already holds a training run: resume=true goes on with it, "
            f"another name=... starts a new one."
        )
    read_checkpoint(last)  # says what is wrong with a damaged one
    return last


def run_or_explain(config: DictConfig) -> None:
    """Runs; a user's mistake ends in one sentence instead of a traceback."""
    from lightning_knnmt.allocator import keep_freed_memory
    from lightning_knnmt.terminal import explanation, quieten_libraries

    keep_freed_memory()
    quieten_libraries()
    try:
        run(config)
    except InstantiationException as error:  # Hydra's wrapping of what a constructor raised
        sys.exit(explanation(error.__cause__ or error) or 1)
    except Exception as error:
        sys.exit(explanation(error) or 1)


def with_demo(arguments: list[str]) -> list[str]:
    """The command line, which means the demo if nothing was asked for."""
    return arguments if len(arguments) > 1 else [*arguments, "experiment=demo"]


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> None:
    run_or_explain(config)


if __name__ == "__main__":
    sys.argv = with_demo(sys.argv)
    main()
