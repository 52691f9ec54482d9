"""A run's folder: its record, the settings that may change on resume, what a failure leaves."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import DictConfig, OmegaConf

from lightning_knnmt.pretrained import checkpoint_entry
from lightning_knnmt.training.run_folder import (
    ResumeError,
    differences,
    last_checkpoint,
    record,
    remove_if_fruitless,
)

CONFIG = """
name: run
fit: true
test: true
resume: true
seed: 1
model: {_target_: load, path: model.ckpt}
module: {optimizer: {lr: 0.001, betas: [0.9, 0.98]}, warmup_steps: 0, bleu_every: 1}
data: {root: text, cache_dir: "${paths.cache}", max_tokens: 4096, seed: "${seed}", test: test}
trainer: {max_steps: 10, devices: 1, precision: 32-true, accumulate_grad_batches: 1}
knn: {}
paths: {cache: cache, output_dir: run}
"""


def config_of(**changes: Any) -> DictConfig:
    config = OmegaConf.create(CONFIG)
    for name, value in changes.items():
        OmegaConf.update(config, name.replace("__", "."), value, force_add=True)
    assert isinstance(config, DictConfig)
    return config


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("module.optimizer.lr", 1e-6),
        ("module.optimizer.betas", [0.9, 0.99]),
        ("module.warmup_steps", 100),
        ("module.rank", 8),
        ("model.path", "other.ckpt"),
        ("data.max_tokens", 2048),
        ("seed", 2),
        ("trainer.accumulate_grad_batches", 2),
        ("trainer.precision", "bf16-mixed"),
        ("trainer.devices", 2),
        ("trainer.limit_train_batches", 3),
        ("callbacks.train_on_datastore.batch_size", 64),
    ],
)
def test_what_defines_the_optimisation_is_compared(name: str, value: Any) -> None:
    found = differences(config_of(), config_of(**{name.replace(".", "__"): value}))
    # data.seed follows the seed
    assert (name, OmegaConf.select(config_of(), name), value) in found
    assert {each for each, _, _ in found} <= {name, "data.seed"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("trainer.max_steps", 20),
        ("trainer.max_time", "00:01:00:00"),
        ("test", False),
        ("knn", {"num_neighbours": 8}),
        ("module.bleu_every", 0),
        ("data.root", "moved"),
        ("data.root", {"_target_": "prepare", "cache_dir": "elsewhere"}),
        ("data.test", "other"),
        ("paths.cache", "elsewhere"),
    ],
)
def test_everything_else_may_change(name: str, value: Any) -> None:
    assert differences(config_of(), config_of(**{name.replace(".", "__"): value})) == []


@pytest.fixture
def run(tmp_path: Path, tiny_model: Any, toy_datamodule: Any) -> Path:
    """A folder with a checkpoint."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    entry = checkpoint_entry(tiny_model, toy_datamodule.tokenizer)
    torch.save({"state_dict": {}, **entry}, folder / "checkpoints" / "last.ckpt")
    return folder


def test_a_run_goes_on_from_its_last_checkpoint(run: Path) -> None:
    record(run, config_of(), ["seed=1"])
    last = run / "checkpoints" / "last.ckpt"
    assert last_checkpoint(run, config_of(trainer__max_steps=20)) == last
    assert last_checkpoint(run.parent / "elsewhere", config_of()) is None


def test_another_value_is_rejected_with_both(run: Path) -> None:
    record(run, config_of(), [])
    with pytest.raises(ResumeError, match=r"module\.optimizer\.lr \(0\.001 there, 1e-06 here\)"):
        last_checkpoint(run, config_of(module__optimizer__lr=1e-6))


def test_a_record_that_hydra_wrote_unresolved_is_understood(run: Path) -> None:
    (run / ".hydra").mkdir()
    text = CONFIG.replace("output_dir: run", "output_dir: '${hydra:runtime.output_dir}'")
    (run / ".hydra" / "config.yaml").write_text(text)
    assert last_checkpoint(run, config_of()) is not None
    with pytest.raises(ResumeError, match="seed"):
        last_checkpoint(run, config_of(seed=2))


def test_a_training_is_not_continued_unasked(run: Path) -> None:
    with pytest.raises(ResumeError, match="resume=true"):
        last_checkpoint(run, config_of(resume=False))


def test_the_record_is_resolved_and_an_evaluation_does_not_replace_a_trainings(run: Path) -> None:
    record(run, config_of(seed=7), ["seed=7"])
    record(run, config_of(fit=False, seed=8), ["seed=8"])
    kept = {path.name: yaml.safe_load(path.read_text()) for path in (run / ".hydra").iterdir()}
    assert kept.keys() == {"config.yaml", "overrides.yaml", "evaluate.yaml"}
    assert kept["overrides.yaml"] == ["seed=7"]
    assert (kept["config.yaml"]["seed"], kept["config.yaml"]["data"]["seed"]) == (7, 7)
    assert kept["config.yaml"]["data"]["cache_dir"] == "cache"
    assert kept["evaluate.yaml"]["seed"] == 8


RECORDS = (".hydra/config.yaml", "train.log", "logs/version_0/hparams.yaml")


@pytest.mark.parametrize(
    ("files", "stays"),
    [
        ((), False),
        (RECORDS, False),
        ((*RECORDS, "logs/version_0/metrics.csv"), True),
        ((*RECORDS, "checkpoints/last.ckpt"), True),
        (("results.json",), True),
        (("notes.log",), True),
    ],
)
def test_a_failed_commands_folder_stays_only_for_its_results(
    tmp_path: Path, files: tuple[str, ...], stays: bool
) -> None:
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("content")
    remove_if_fruitless(folder)
    assert folder.exists() == stays
    assert not stays or all((folder / name).exists() for name in files)
    remove_if_fruitless(tmp_path / "nowhere")
