r"""Trains or fine-tunes a model, builds its datastore, and tests it with and without retrieval.

    python train.py                 the demo (experiment=demo)
    python train.py model=transformer_small \
        data=text data.root=DIR data.source_lang=de data.target_lang=en
    python train.py -m module.optimizer.lr=1e-3,3e-3 ...     a sweep: one run for each value
    python train.py --help          every group, choice and setting
"""

import inspect
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

# Slow imports stand where they are used, so that --help does not wait for them.

CONF = Path(__file__).parent / "conf"
FULL_ERROR = "HYDRA_FULL_ERROR"  # set to see tracebacks

log = logging.getLogger("lightning_knnmt.train")
sweep: dict[Path, str] = {}  # the folders of the runs of -m, and why a run failed
hydra_raises: list[bool] = []  # not empty while Hydra reads the command line for `launch`

# OpenMP threads that spin while they wait become several times slower when other programs use the
# cores; sleeping costs some percent on a quiet machine. torch reads this when it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def run(config: DictConfig) -> None:
    """Runs what `config` describes."""
    import pytorch_lightning as pl

    from lightning_knnmt.evaluation.evaluate import evaluate
    from lightning_knnmt.evaluation.loggers import finish, log_config
    from lightning_knnmt.evaluation.results import check_results
    from lightning_knnmt.evaluation.scoring import Bleu
    from lightning_knnmt.training import run_folder

    refuse_multirun_with_ranks(config)
    refuse_missing_settings(config)
    output_dir = Path(config.paths.output_dir)
    checkpoint = run_folder.last_checkpoint(output_dir, config) if config.fit else None
    pl.seed_everything(config.seed, workers=True, verbose=False)
    datamodule, module = datamodule_and_module(config)
    # What is wrong here is found now, not after training.
    Bleu.for_language(datamodule.target_lang, datamodule.bleu_tokenizer)
    if config.test:
        datamodule.test_corpora()
        check_results(output_dir)
    knn = instantiate(config.knn) or None
    logger = instantiate(config.logger) or False
    trainer = build(
        config.trainer,
        callbacks=callbacks_of(config, with_logger=bool(logger)) + ([knn] if knn else []),
        logger=logger,
        enable_checkpointing=config.fit,
        enable_model_summary=False,  # it lists metrics and no fine-tuning method
    )
    if trainer.is_global_zero:
        run_folder.record(output_dir, config, HydraConfig.get().overrides.task)
    log_config(trainer.loggers, OmegaConf.to_container(config, resolve=True))

    if config.fit:
        fit(trainer, module, datamodule, checkpoint, output_dir)
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
    command = shlex.join(["lightning-knnmt", "translate", str(folder)])
    log.info("System: %s; translate with: %s", folder / "system", command)


def datamodule_and_module(config: DictConfig) -> tuple[Any, Any]:
    """Makes both: a pretrained model brings its tokenizer, a fresh one gets the text's."""
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
    """Instantiates `config` with objects that Hydra would otherwise convert to configuration."""
    return instantiate(config, _partial_=True)(**parts)


def callbacks_of(config: DictConfig, *, with_logger: bool) -> list[Any]:
    """What accompanies training; a callback that is null on the command line is left out."""
    from pytorch_lightning.callbacks import LearningRateMonitor

    from lightning_knnmt.training import ProgressBar

    callbacks = [c for c in instantiate(config.callbacks).values() if c] if config.fit else []
    if not with_logger:  # the monitor would have nothing to write to, and Lightning refuses it
        callbacks = [c for c in callbacks if not isinstance(c, LearningRateMonitor)]
    return callbacks + ([ProgressBar()] if config.trainer.enable_progress_bar else [])


def fit(
    trainer: Any, module: Any, datamodule: Any, checkpoint: Path | None, output_dir: Path
) -> None:
    """Trains, from a checkpoint on if there is one, and gives the module the best weights.

    Trained adapters are also written alone.
    """
    from lightning_knnmt.pretrained import read_checkpoint, save_adapters
    from lightning_knnmt.training import AdapterFineTuner, LoRAFineTuner, load_best_weights

    total = sum(parameter.numel() for parameter in module.parameters())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    share = f"{trained:,} of {total:,} parameters train ({100 * trained / total:.3g} %)"
    log.info("%s: %s.", module.method, share)
    trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint)
    if checkpoint is not None and trainer.global_step == read_checkpoint(checkpoint)["global_step"]:
        log.info(
            "The training in %s had already ended after %s steps, so nothing was trained: raise "
            "trainer.max_epochs or trainer.max_steps to continue it.",
            output_dir,
            f"{trainer.global_step:,}",
        )
    load_best_weights(trainer, module)
    if isinstance(module, AdapterFineTuner | LoRAFineTuner) and trainer.is_global_zero:
        adapters = output_dir / "adapters.safetensors"
        save_adapters(module.model, adapters)
        log.info("Adapters, for model.adapters=... with the same base model: %s", adapters)


def refuse_multirun_with_ranks(config: DictConfig) -> None:
    """Rejects -m with several ranks: each child process would run the whole sweep again."""
    if HydraConfig.get().mode == RunMode.MULTIRUN and config.trainer.devices != 1:
        raise ValueError(
            f"-m (several runs in one command) works with trainer.devices=1 only, not "
            f"{config.trainer.devices}: use a shell loop or a W&B sweep instead."
        )


def refuse_missing_settings(config: DictConfig) -> None:
    """Rejects settings without a value, which Hydra would silently leave out."""
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise ValueError(
            f"{', '.join(missing)} must be given: add {' '.join(f'{key}=...' for key in missing)} "
            "to the command line."
        )


# What users read when something is wrong


def run_or_explain(config: DictConfig) -> None:
    """Runs; a user's mistake ends in one sentence instead of a traceback.

    A failed run of several (-m) does not end the others. A failed command leaves no folder unless
    there is something in it.
    """
    from lightning_knnmt.terminal import explanation, keep_freed_memory, quieten_libraries

    if hydra_raises:  # the command line is right: from here on errors are ours to explain
        hydra_raises.clear()
        os.environ.pop(FULL_ERROR, None)
    keep_freed_memory()
    quieten_libraries()
    folder = Path(config.paths.output_dir)
    is_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    if is_sweep:
        sweep[folder] = ""
    try:
        run(config)
    except BaseException as error:
        remove_if_fruitless(folder)
        if not isinstance(error, Exception):  # interrupted
            raise
        told = explanation(cause_of(error, config))
        if not is_sweep:
            sys.exit(told or 1)
        print(told, file=sys.stderr)
        sweep[folder] = told.partition("\n")[0]


def remove_if_fruitless(folder: Path) -> None:
    from lightning_utilities.core.rank_zero import rank_zero_only

    from lightning_knnmt.training import run_folder

    if not getattr(rank_zero_only, "rank", 0):
        run_folder.remove_if_fruitless(folder)


def cause_of(error: Exception, config: DictConfig) -> Exception:
    """What lies behind Hydra's wrapping; an unknown setting as a sentence about it."""
    cause = error.__cause__ if isinstance(error, InstantiationException) else error
    if isinstance(cause, TypeError) and (sentence := about_unknown_setting(cause, config)):
        return ValueError(sentence)
    return cause if isinstance(cause, Exception) else error


def about_unknown_setting(error: TypeError, config: DictConfig) -> str | None:
    """`+knn.foo=1` makes Hydra accept any name, but not what is built from the group."""
    from lightning_knnmt.terminal import near_matches

    unexpected = re.search(r"(?:unexpected keyword argument|no setting) '(\w+)'", str(error))
    if unexpected is None:
        return None
    name = unexpected[1]
    for where, node in nodes_with_targets(OmegaConf.to_container(config, resolve=False)):
        parameters = inspect.signature(get_object(node["_target_"])).parameters
        if name in node and name not in parameters:
            known = {*node, *parameters} - {name, "args", "kwargs", "settings"}
            known = {each for each in known if not each.startswith("_")}
            near = near_matches(f"{where}.{name}", [f"{where}.{each}" for each in sorted(known)])
            advice = (
                f"did you mean {' or '.join(near)}?"
                if near
                else f"it has {', '.join(sorted(known))}."
            )
            return f"There is no setting {where}.{name}: {advice}"
    return None


def nodes_with_targets(node: Any, where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every part of a configuration from which Hydra builds an object."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield where, node
        for name, inner in node.items():
            yield from nodes_with_targets(inner, f"{where}.{name}".lstrip("."))


def about_command_line(error: Exception, root: str, arguments: Sequence[str]) -> str:
    """What is wrong with a command line that Hydra cannot compose."""
    from lightning_knnmt.terminal import near_matches

    sentence = " ".join(str(error).split())
    choice = re.search(
        r"Could not find '([^']+)/([^']+)' Available options in '\1': (.+) Config search", sentence
    )
    if choice is not None:
        group, wrong, options = choice.groups()
        return f"There is no {group}={wrong}: choose one of {', '.join(options.split())}."
    unknown = re.match(r"Could not override '([^']+)'", sentence)
    if unknown is None:
        return sentence
    name = unknown[1]
    groups = [each for each in arguments if (CONF / each.partition("=")[0]).is_dir()]
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            known = list(names_of(hydra.compose(root, groups)))
    except HydraException:  # something else is wrong too, so there is nothing to compare with
        known = []
    group = name.rpartition(".")[0]
    if near := near_matches(name, known):
        advice = f"did you mean {' or '.join(near)}?"
    elif group in known and not any(each.startswith(f"{group}.") for each in known):
        advice = f"the present choice of {group} has none; choose one with {group}=..."
    else:
        advice = f"`python {root}.py --help` lists all settings."
    return f"There is no setting {name}: {advice}"


def names_of(config: DictConfig) -> Iterator[str]:
    """The dotted names of all settings."""

    def visit(node: Any, where: str) -> Iterator[str]:
        for name, inner in node.items():
            if not str(name).startswith("_"):
                yield f"{where}{name}"
                if isinstance(inner, dict):
                    yield from visit(inner, f"{where}{name}.")

    return visit(OmegaConf.to_container(config, resolve=False), "")


def launch(main: Callable[[], None], root: str) -> None:
    """Runs an entry point; after several runs (-m) it prints a table of them.

    Args:
        main: Decorated by Hydra, which reads the command line.
        root: The configuration's name.
    """
    if FULL_ERROR not in os.environ:
        os.environ[FULL_ERROR] = "1"  # Hydra raises its errors instead of printing them
        hydra_raises.append(True)
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        if not hydra_raises:
            raise
        from lightning_knnmt.terminal import in_one_sentence

        sys.exit(in_one_sentence(about_command_line(error, root, sys.argv[1:])))
    if sweep:
        from rich.console import Console

        from lightning_knnmt.evaluation.sweep import print_sweep

        print_sweep(Console(), sweep)
        sys.exit(1 if any(sweep.values()) else 0)


def with_demo(arguments: list[str]) -> list[str]:
    """The command line; without arguments it runs the demo."""
    return arguments if len(arguments) > 1 else [*arguments, "experiment=demo"]


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> None:
    run_or_explain(config)


if __name__ == "__main__":
    sys.argv = with_demo(sys.argv)
    launch(main, "train")
