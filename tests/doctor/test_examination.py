"""A healthy patient, and one mistake at a time."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_knnmt.data import ParallelDataModule
from lightning_knnmt.doctor.checks import Finding
from lightning_knnmt.doctor.examination import Examination
from lightning_knnmt.models import KeyLayer, Transformer
from lightning_knnmt.retrieval import Datastore, DatastorePlan, ensure_datastore

Examine = Callable[..., dict[str, Finding]]


@pytest.fixture
def examine(healthy: Any, tmp_path: Path) -> Examine:
    """The findings by name, of the healthy patient with something changed."""

    def run(data: ParallelDataModule | None = None, **changes: Any) -> dict[str, Finding]:
        data = data or healthy.data
        model = changes.pop("model", healthy.model)
        examination = Examination(
            model, healthy.data.tokenizer, data, directory=tmp_path, **changes
        )
        return {finding.name: finding for finding in examination.findings()}

    return run


@pytest.fixture
def rewritten(healthy: Any, tmp_path: Path) -> Callable[..., ParallelDataModule]:
    """The healthy text after some change to each line of a language."""

    def rewrite(source: str = "pt", target: str = "en", **changes: Any) -> ParallelDataModule:
        folder = tmp_path / "rewritten"
        folder.mkdir()
        for path in healthy.data.root.iterdir():
            change = changes.get(path.suffix[1:], lambda line: line)
            lines = [change(line) for line in path.read_text().splitlines()]
            (folder / path.name).write_text("".join(f"{line}\n" for line in lines))
        return ParallelDataModule(
            folder, source, target, cache_dir=tmp_path, tokenizer=healthy.data.tokenizer
        )

    return rewrite


@pytest.fixture
def datastore(healthy: Any, tmp_path: Path) -> Datastore:
    return build(healthy, tmp_path / "store")


def build(healthy: Any, directory: Path, key_layer: KeyLayer = "opl_input") -> Datastore:
    """The datastore of the whole training text."""
    plan = DatastorePlan(directory.parent, directory, key_layer=key_layer)
    return ensure_datastore(healthy.model, healthy.data.tokenizer, healthy.data.train_corpus, plan)


def problems(findings: dict[str, Finding]) -> list[str]:
    return [name for name, finding in findings.items() if finding.verdict == "problem"]


def test_what_belongs_together_is_well(examine: Examine, datastore: Datastore) -> None:
    findings = examine(datastore=datastore)
    assert problems(findings) == []
    for name in ("fingerprint", "key layer", "translation", "direction", "neighbours", "style"):
        assert findings[name].verdict == "ok", findings[name]
    assert "3,277 entries" in findings["size"].text


def test_keys_of_the_feed_forward_network_are_well_too(
    examine: Examine, healthy: Any, tmp_path: Path
) -> None:
    store = build(healthy, tmp_path / "store", "ffn_input")
    findings = examine(datastore=store)
    assert problems(findings) == []
    assert findings["fingerprint"].verdict == "ok"
    assert "last feed-forward network" in findings["key layer"].text
    mislabelled = replace(store, manifest=replace(store.manifest, key_layer="opl_input"))
    assert problems(examine(datastore=mislabelled))[:2] == ["fingerprint", "key layer"]


def test_without_a_datastore_a_small_one_is_made(examine: Examine, datastore: Datastore) -> None:
    ours, theirs = examine(), examine(datastore=datastore)
    assert "fingerprint" not in ours
    # The toy text is small enough to be stored whole, so both have the same neighbours.
    assert ours["neighbours"] == theirs["neighbours"]
    assert ours["temperature"] == theirs["temperature"]


def test_swapped_languages_are_caught(examine: Examine, rewritten: Any) -> None:
    findings = examine(rewritten("en", "pt"))
    assert "direction" in problems(findings)
    assert "swap source and target" in findings["direction"].text
    assert findings["translation"].verdict != "ok"


def test_text_that_is_tokenised_otherwise_is_caught(examine: Examine, rewritten: Any) -> None:
    findings = examine(rewritten(en=lambda line: line.replace(".", " .")))
    assert findings["style"].verdict == "problem"
    assert "100% of the references but 0% of the translations have ' .'" in findings["style"].text


def test_text_in_another_script_is_caught(examine: Examine, rewritten: Any) -> None:
    findings = examine(rewritten(pt=lambda line: "".join(chr(ord(c) + 0x3B0) for c in line)))
    assert findings["pt: unknown"].verdict == "problem"
    assert findings["pt: round trip"].verdict == "problem"
    assert findings["en: unknown"].verdict == "ok"


def test_an_untrained_model_is_caught(examine: Examine, healthy: Any) -> None:
    fresh = Transformer(**healthy.model.config).eval()
    finding = examine(model=fresh)["translation"]
    assert finding.verdict == "problem"
    assert "untrained" in finding.text


def test_a_stale_datastore_is_caught(examine: Examine, healthy: Any, datastore: Datastore) -> None:
    other = Transformer(**healthy.model.config).eval()
    other.load_state_dict(healthy.model.state_dict())
    with torch.no_grad():
        other.target_embedding.weight.mul_(1.1)
    findings = examine(datastore=datastore, model=other)
    assert {"fingerprint", "key layer"} <= {*problems(findings)}
    assert "ebuild" in findings["fingerprint"].text


@pytest.mark.parametrize("kind", ["layer", "size"])
def test_keys_of_another_layer_are_caught(
    examine: Examine, datastore: Datastore, kind: str
) -> None:
    # As stores of other programs: the fingerprint is right, the keys are not.
    keys = np.array(datastore.keys)
    if kind == "layer":
        keys = keys @ np.linalg.qr(np.random.default_rng(0).normal(size=(48, 48)))[0]
        changed = replace(datastore, keys=keys.astype(np.float16))
    else:
        manifest = replace(datastore.manifest, key_dim=24)
        changed = replace(datastore, keys=keys[:, :24], manifest=manifest)
    finding = examine(datastore=changed)["key layer"]
    assert finding.verdict == "problem"
    assert "Rebuild the datastore" in finding.text


def test_values_that_are_shuffled_are_caught(examine: Examine, datastore: Datastore) -> None:
    values = np.random.default_rng(0).permutation(datastore.values)
    findings = examine(datastore=replace(datastore, values=values))
    assert findings["neighbours"].verdict in ("warning", "problem")


def test_a_datastore_of_other_text_is_told(examine: Examine, datastore: Datastore) -> None:
    manifest = replace(datastore.manifest, corpus_digest="other", corpus_name="law/train")
    finding = examine(datastore=replace(datastore, manifest=manifest))["key layer"]
    assert finding.verdict == "warning"
    assert "law/train" in finding.text


def test_text_inside_the_datastore_is_told(examine: Examine, rewritten: Any) -> None:
    data = rewritten()
    for lang in ("pt", "en"):
        lines = (data.root / f"train.{lang}").read_text().splitlines()[:40]
        (data.root / f"valid.{lang}").write_text("".join(f"{line}\n" for line in lines))
    finding = examine(data)["neighbours"]
    assert finding.verdict == "warning"
    assert "not held out" in finding.text


@pytest.mark.parametrize(
    ("temperature", "verdict", "words"),
    [
        (1e-4, "problem", "only the nearest neighbour"),
        (1e6, "problem", "all neighbours"),
        (5.0, "ok", "5 was given"),
    ],
)
def test_an_absurd_temperature_is_caught(
    examine: Examine, temperature: float, verdict: str, words: str
) -> None:
    finding = examine(temperature=temperature)["temperature"]
    assert finding.verdict == verdict
    assert words in finding.text


@pytest.mark.parametrize(("memory", "verdict"), [(10_000, "problem"), (2_000_000, "warning")])
def test_too_little_memory_is_caught(
    examine: Examine, monkeypatch: pytest.MonkeyPatch, memory: int, verdict: str
) -> None:
    for module in ("retrieval.estimate", "doctor.retrieval_checks"):
        monkeypatch.setattr(f"lightning_knnmt.{module}.available_memory", lambda: memory)
    finding = examine()["size"]
    assert finding.verdict == verdict
    assert ("10,000 bytes" if verdict == "problem" else "close other programs") in finding.text


def test_broken_weights_end_the_examination(examine: Examine, healthy: Any) -> None:
    broken = Transformer(**healthy.model.config).eval()
    with torch.no_grad():
        broken.output_projection.weight[3, 4] = torch.nan
    findings = examine(model=broken)
    assert problems(findings) == ["model"]
    assert "NaN" in findings["model"].text
    assert "translation" not in findings


def test_another_models_tokenizer_is_caught(examine: Examine, healthy: Any) -> None:
    config = healthy.model.config | {"vocab_size": healthy.model.config["vocab_size"] + 8}
    findings = examine(model=Transformer(**config).eval())
    assert problems(findings) == ["vocabulary"]
    assert "do not belong together" in findings["vocabulary"].text
