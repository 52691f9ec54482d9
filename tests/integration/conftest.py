"""Runs of train.py and evaluate.py on toy text: in this process, or as a user starts them."""

import importlib.util
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

ROOT = Path(__file__).parents[2]
WORDS = dict(
    zip(
        ("casa", "porta", "janela", "luz", "vermelha", "grande", "nova", "velha"),
        ("house", "door", "window", "light", "red", "large", "new", "old"),
        strict=True,
    )
)
# An odd number of validation batches (3): two ranks get unequally many.
SETTINGS = (
    *("data.vocab_size=40", "data.max_tokens=400", "data.eval_max_tokens=300"),
    *("trainer.enable_progress_bar=false", "trainer.log_every_n_steps=1", "decoding=greedy"),
)
MODEL = (
    *("model.model_dim=32", "model.num_heads=2", "model.encoder_layers=1"),
    *("model.decoder_layers=1", "model.encoder_ffn_dim=64", "model.decoder_ffn_dim=64"),
    *("model.dropout=0.1", "module.warmup_steps=20", "module.optimizer.lr=5e-3"),
)
# Two ways of retrieval: with given numbers, and with numbers chosen on the validation set.
GIVEN = (
    *("knn=fixed", "index=flat", "knn.tune=false", "knn.num_neighbours=4"),
    *("knn.knn_weight=0.7", "knn.temperature=1.5"),
)
TUNED = ("knn=fixed", "index=flat", "knn.max_neighbours=8")

Run = Callable[..., Path]
Mistake = Callable[..., str]
Start = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder {train,valid,test}.{pt,en} of word-for-word translations: learnt in seconds."""
    folder = tmp_path_factory.mktemp("integration") / "words"
    folder.mkdir()
    rng = random.Random(1)
    for split, size in {"train": 400, "valid": 30, "test": 40}.items():
        sources = [rng.choices(list(WORDS), k=rng.randint(2, 7)) for _ in range(size)]
        targets = [[WORDS[word] for word in source] for source in sources]
        for lang, side in (("pt", sources), ("en", targets)):
            (folder / f"{split}.{lang}").write_text("".join(" ".join(s) + "\n" for s in side))
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("integration_cache")


@pytest.fixture(scope="session")
def entry_point() -> ModuleType:
    """train.py as a module."""
    spec = importlib.util.spec_from_file_location("train", ROOT / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def composed(words: Path, cache: Path) -> Iterator[Callable[..., DictConfig]]:
    """The config of a command: composed("train" or "evaluate", folder, *overrides)."""

    def call(config: str, folder: Path, *overrides: str) -> DictConfig:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            composed = compose(
                config,
                [
                    *(*text(words), *SETTINGS),
                    *(f"paths.output_dir={folder}", f"paths.cache={cache}"),
                    *overrides,
                ],
                return_hydra_config=True,
            )
        HydraConfig.instance().set_config(composed)
        with open_dict(composed):
            del composed.hydra
        return composed

    yield call
    HydraConfig.instance().cfg = None


@pytest.fixture(scope="session")
def train(entry_point: ModuleType, composed: Callable[..., DictConfig]) -> Iterator[Run]:
    """train.py in this process, but errors are raised: train(folder, *overrides) -> folder."""
    yield in_process(entry_point, composed, "train", MODEL)
    forget_seeds()


@pytest.fixture(scope="session")
def evaluate(entry_point: ModuleType, composed: Callable[..., DictConfig]) -> Iterator[Run]:
    """evaluate.py in this process: evaluate(folder, *overrides) -> folder."""
    yield in_process(entry_point, composed, "evaluate", ())
    forget_seeds()


def in_process(
    entry_point: ModuleType,
    composed: Callable[..., DictConfig],
    config: str,
    more: tuple[str, ...],
) -> Run:
    def call(folder: Path, *overrides: str) -> Path:
        from lightning_knnmt.terminal import quieten_libraries

        quieten_libraries()
        entry_point.run(composed(config, folder, *more, *overrides))
        return folder

    return call


def forget_seeds() -> None:
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)


@pytest.fixture
def mistake(
    entry_point: ModuleType, composed: Callable[..., DictConfig], tmp_path: Path
) -> Iterator[Mistake]:
    """The sentence that a wrong command ends with: mistake(*overrides, config="train")."""

    def call(*overrides: str, config: str = "train", folder: Path = tmp_path / "run") -> str:
        more = MODEL if config == "train" else ()
        with pytest.raises(SystemExit) as stopped:
            entry_point.run_or_explain(composed(config, folder, *more, *overrides))
        return sentence_of(str(stopped.value.code))

    yield call
    forget_seeds()


def sentence_of(printed: str) -> str:
    """What an error says, after a check of the form that all have."""
    sentence, hint = printed.strip().splitlines()[-2:]
    assert sentence.startswith("error: ")
    assert hint == "(HYDRA_FULL_ERROR=1 shows where it came from)"
    return sentence.removeprefix("error: ")


@pytest.fixture(scope="session")
def command(words: Path, cache: Path) -> Callable[..., list[str]]:
    """Arguments for a run on the toy text: command("train", folder, *overrides)."""

    def call(script: str, folder: Path, *overrides: str) -> list[str]:
        model = MODEL if script == "train" else ()
        given = [*text(words), *SETTINGS, *model, f"paths.cache={cache}"]
        return [*given, f"hydra.run.dir={folder}", f"hydra.sweep.dir={folder}", *overrides]

    return call


@pytest.fixture(scope="session")
def start(command: Callable[..., list[str]]) -> Start:
    """`python train.py` or `evaluate.py` as a user starts it: start("train", folder, *overrides).

    Without a folder nothing is added to the arguments.
    """

    def call(
        script: str, folder: Path | None = None, *overrides: str, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        arguments = overrides if folder is None else command(script, folder, *overrides)
        return subprocess.run(
            [sys.executable, str(ROOT / f"{script}.py"), *arguments],
            env=child_environment() | environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return call


def text(folder: Path) -> list[str]:
    return ["data=text", f"data.root={folder}", "data.source_lang=pt", "data.target_lang=en"]


def child_environment() -> dict[str, str]:
    """This process's environment without what Lightning has put there."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PL_", "HYDRA_"))}
    return inherited | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def trained(train: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that trained, built a datastore in `datastore` and tested."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    return train(folder, *GIVEN, f"knn.directory={folder}/datastore", "trainer.max_epochs=4")


class Reader:
    """What a run has left in its folder."""

    @staticmethod
    def rows(folder: Path) -> dict[str, dict[str, Any]]:
        """The rows of results.json by method."""
        return {row["method"]: row for row in json.loads((folder / "results.json").read_text())}

    @staticmethod
    def translations(folder: Path) -> dict[str, list[str]]:
        """The translations by method."""
        return {
            path.name.split(".")[-2]: path.read_text().splitlines()
            for path in folder.glob("hypotheses.*.txt")
        }

    @staticmethod
    def datastore(folder: Path) -> dict[str, bytes]:
        names = ("keys.npy", "values.npy", "manifest.json")
        return {name: (folder / name).read_bytes() for name in names}


@pytest.fixture
def read() -> Reader:
    return Reader()


@pytest.fixture
def given() -> tuple[str, ...]:
    """Retrieval with given numbers."""
    return GIVEN


@pytest.fixture
def tuned() -> tuple[str, ...]:
    """Retrieval with numbers chosen on the validation set."""
    return TUNED


@pytest.fixture
def sentence() -> Callable[[str], str]:
    """What a failed command said, from what it printed."""
    return sentence_of
