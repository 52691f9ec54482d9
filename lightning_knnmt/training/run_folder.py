"""The folder of a run: the configuration it was made with, and whether it can be resumed.

.hydra/config.yaml       the resolved configuration
.hydra/overrides.yaml    what the command line changed
.hydra/evaluate.yaml     the configuration of a later evaluation into a training's folder
checkpoints/             best.ckpt (weights only), last.ckpt (to resume from)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lightning_knnmt.files import write_atomically
from lightning_knnmt.pretrained import read_checkpoint

# What defines an optimisation. A resumed run must have the same values; all others may change.
DEFINING = (
    *("model", "module", "data", "seed", "callbacks.train_on_datastore"),
    *("trainer.devices", "trainer.num_nodes", "trainer.precision", "trainer.plugins"),
    *("trainer.accumulate_grad_batches", "trainer.gradient_clip_val"),
    *("trainer.gradient_clip_algorithm", "trainer.limit_train_batches"),
)
# Exceptions. The training text is compared by its content, as it may have been moved.
MAY_CHANGE = (
    *("data.root", "data.cache_dir", "data.num_workers", "data.eval_max_tokens"),
    *("data.test", "data.also_test", "data.test_text", "data.bleu_tokenizer"),
    *("model.path.cache_dir", "module.bleu_every"),
    *("callbacks.train_on_datastore.datastores", "callbacks.train_on_datastore.directory"),
)
SHOWN = 5  # differences in a message


class ResumeError(ValueError):
    """A run that cannot be resumed as asked."""


def last_checkpoint(folder: Path, config: DictConfig) -> Path | None:
    """Finds the checkpoint that a run goes on from.

    Args:
        folder: The run's.
        config: What the run is started with; `resume` says whether it may go on.

    Returns:
        The checkpoint; None if the folder has none, to start from the beginning.

    Raises:
        ResumeError: If there is a training in the folder and `resume` is false, or it was recorded
            with another value of a setting that defines the optimisation.
        CheckpointError: If the checkpoint is damaged.
    """
    last = folder / "checkpoints" / "last.ckpt"
    if not last.exists():
        return None
    if not config.resume:
        raise ResumeError(
            f"{folder} already holds a training run: resume=true continues it, another name=... "
            "starts a new one."
        )
    record = folder / ".hydra" / "config.yaml"
    if record.exists():
        recorded = OmegaConf.load(record)
        assert isinstance(recorded, DictConfig)
        if changed := differences(recorded, config):
            listed = ", ".join(f"{name} ({a} there, {b} here)" for name, a, b in changed[:SHOWN])
            more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
            raise ResumeError(
                f"The training in {folder} cannot be resumed with other values of {listed}{more}: "
                "give the same values to continue it, or another name=... to start a new one."
            )
    read_checkpoint(last)
    return last


def differences(recorded: DictConfig, config: DictConfig) -> list[tuple[str, Any, Any]]:
    """Lists the settings of an optimisation that differ: name, recorded value, present value."""
    old, new = _defining(recorded), _defining(config)
    return [
        (name, old.get(name), new.get(name))
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]


def record(folder: Path, config: DictConfig, overrides: Sequence[str]) -> None:
    """Writes the configuration of a run into its folder.

    A training's record stays when its folder is only evaluated into.
    """
    is_evaluation = not config.fit and (folder / "checkpoints" / "last.ckpt").exists()
    name = "evaluate.yaml" if is_evaluation else "config.yaml"
    write_atomically(folder / ".hydra" / name, OmegaConf.to_yaml(config, resolve=True))
    if not is_evaluation:
        changed = OmegaConf.to_yaml(OmegaConf.create(list(overrides)))
        write_atomically(folder / ".hydra" / "overrides.yaml", changed)


def remove_if_fruitless(folder: Path) -> None:
    """Removes the folder of a failed command unless it holds more than its record and log."""
    if not folder.is_dir():
        return
    inside = list(folder.rglob("*"))
    files = [path for path in inside if not path.is_dir()]
    if any(not _is_record(path.relative_to(folder)) for path in files):
        return
    for path in files:
        path.unlink()
    for path in sorted(inside, reverse=True):  # a folder after what is in it
        if path.is_dir():
            path.rmdir()
    folder.rmdir()


def _is_record(path: Path) -> bool:
    """Whether a file of a run's folder only describes the run."""
    is_log = len(path.parts) == 1 and path.name in ("train.log", "evaluate.log")
    return path.parts[0] == ".hydra" or path.name == "hparams.yaml" or is_log


def _defining(config: DictConfig) -> dict[str, Any]:
    """The settings that define the optimisation, by their dotted names."""
    found: dict[str, Any] = {}
    for name in DEFINING:
        value = OmegaConf.select(config, name)
        found |= _flat(
            name,
            OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value,
        )
    return {
        name: value
        for name, value in found.items()
        if not any(name == each or name.startswith(f"{each}.") for each in MAY_CHANGE)
    }


def _flat(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {
        path: leaf for key in value for path, leaf in _flat(f"{name}.{key}", value[key]).items()
    }
