"""Every file under conf/ composes and builds what its group is named after."""

import inspect
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from lightning_knnmt.data import CORPORA, MODELS, ParallelDataModule
from lightning_knnmt.decoding import BeamSearch
from lightning_knnmt.models import Transformer
from lightning_knnmt.pretrained import Pretrained, checkpoint_entry, load_pretrained
from lightning_knnmt.retrieval import AutoChoice, FaissChoice, FlatChoice
from lightning_knnmt.training import KNNCallback, NMTModule

CONF = Path(__file__).parents[1] / "conf"
# sweeps/ and studies/ are read by others, not composed: see test_sweeps.py and study/.
FILES = sorted(path for path in CONF.rglob("*.yaml") if path.parent.name not in ("sweep", "study"))
# The folders of conf/experiment/ are no groups of their own.
GROUPS = sorted({path.relative_to(CONF).parts[0] for path in FILES if path.parent != CONF})
ROOTS = sorted(path.stem for path in CONF.glob("*.yaml"))
EXPERIMENTS = sorted((CONF / "experiment").rglob("*.yaml"))
# Composed as a part of an experiment, not alone.
PARTS = {"experiment", "domain", "hydra", "debug"}

# Published for each domain (adaptive-knn-mt's README, knn-box): k, λ and T of kNN-MT, K of AK-MT.
DOMAINS = {
    "it": (8, 0.7, 10, 8),
    "koran": (16, 0.8, 100, 16),
    "law": (4, 0.8, 10, 8),
    "medical": (4, 0.8, 10, 16),
}

# Where a file deliberately says something else than the class's own default, and why.
DELIBERATE = {
    "data/fairseq_bin:max_length": "fairseq's own bound: its ids were not made for this program",
    "model/transformer_small": "its sizes",
    "model/transformer_tiny": "its sizes",
    "index/faiss:parameters": "they go with the factory",
    "knn/adaptive_knnbox:combiner": "what it is for",
    "knn/robust:combiner": "what it is for",
    "knn/robust:max_neighbours": "the paper's K",
    "module/full": "it moves pretrained weights little",
    "module/opl_datastore": "its batches are a datastore's, and an epoch is short",
    "decoding/greedy:beam_size": "greedy is a beam of one",
    "trainer/cpu:accelerator": "the default trainer must run anywhere alike",
    "trainer/cpu:devices": "one process unless asked for more",
    "trainer/cpu:precision": "the same as Lightning's, by its full name",
    "trainer/cpu:max_epochs": "Lightning's default trains for 1000",
    "trainer/cpu:max_steps": "the same as Lightning's",
    "trainer/cpu:val_check_interval": "the same as Lightning's",
    "trainer/cpu:gradient_clip_val": "Transformers train more steadily",
    "trainer/cpu:num_sanity_val_steps": "validation is tested, and would be timed",
    "trainer/cpu:log_every_n_steps": "small corpora have short epochs",
    "trainer/cpu:enable_progress_bar": "the same as Lightning's",
    "trainer/cpu:use_distributed_sampler": "our batches are shared out already",
    "trainer/ddp:devices": "several processes",
    "trainer/ddp:strategy": "several processes",
    "trainer/gpu:accelerator": "a GPU",
    "trainer/gpu:precision": "where it helps",
    "callbacks/default": "Lightning's classes, set up for this program",
    "logger/csv:name": "shorter than lightning_logs",
    "logger/wandb:project": "one project for all runs",
}


def config_id(path: Path) -> str:
    return str(path.relative_to(CONF).with_suffix(""))


def composed(root: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(root, list(overrides))


@pytest.fixture
def toy(
    toy_text: Path, toy_cache: Path, tmp_path: Path, tiny_model: Transformer,
    toy_datamodule: ParallelDataModule, monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., DictConfig]:  # fmt: skip
    """Composes with the toy text and model in the place of everything that is downloaded."""
    model_path = tmp_path / "tiny.ckpt"
    weights = {f"model.{name}": tensor for name, tensor in tiny_model.state_dict().items()}
    torch.save(
        {"state_dict": weights, **checkpoint_entry(tiny_model, toy_datamodule.tokenizer)},
        model_path,
    )

    def prepare_corpus(name: str, cache_dir: str) -> Path:
        entry = CORPORA[name]
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for split in ("train", "valid", "test"):
            for toy_lang, lang in (("xx", entry.source_lang), ("yy", entry.target_lang)):
                shutil.copy(toy_text / f"{split}.{toy_lang}", folder / f"{split}.{lang}")
        return folder

    def prepare_model(name: str, cache_dir: str) -> Path:
        assert name in MODELS
        return model_path

    monkeypatch.setattr("lightning_knnmt.data.prepare_corpus", prepare_corpus)
    monkeypatch.setattr("lightning_knnmt.data.prepare_model", prepare_model)

    # What docs/models.md says where to put.
    fetched = tmp_path / "data"
    for domain in DOMAINS:
        folder = fetched / "multi_domain" / domain
        folder.mkdir(parents=True)
        for split in ("train", "valid", "test"):
            for toy_lang, lang in (("xx", "de"), ("yy", "en")):
                (folder / f"{split}.{lang}").symlink_to(toy_text / f"{split}.{toy_lang}")

    def load(path: str, **options: Any) -> Pretrained:
        wmt19 = f"{fetched}/wmt19.de-en/wmt19.de-en.ffn8192.pt"
        return load_pretrained(model_path if path == wmt19 else path, **options)

    monkeypatch.setattr("lightning_knnmt.pretrained.load_pretrained", load)

    def compose_toy(*overrides: str, root: str = "train") -> DictConfig:
        names = {override.split("=")[0] for override in overrides}
        given = [
            f"paths.output_dir={tmp_path}/run",
            f"paths.cache={toy_cache}",
            f"paths.data={fetched}",
            "data.vocab_size=100",
            "data.max_tokens=400",
        ]
        # Only a fairseq model can read a data-bin (see tests/data); text takes its settings.
        is_ours = {"data=text", "data=fairseq_bin"} & {*overrides}
        if not names & {"data", "experiment"} or is_ours:
            given += [f"data.root={toy_text}", "data.source_lang=xx", "data.target_lang=yy"]
        if "model=pretrained" in overrides or root == "evaluate":
            given.append(f"model.path={model_path}")
        return composed(root, *given, *overrides)

    return compose_toy


# What each group builds


def build_data(config: DictConfig) -> None:
    datamodule = instantiate(config.data)
    assert isinstance(datamodule, ParallelDataModule)
    assert len(next(iter(datamodule.train_dataloader())).index) > 1
    assert [len(datamodule.valid_corpus), len(datamodule.test_corpus)] == [30, 40]


def build_model(config: DictConfig) -> None:
    made = instantiate(config.model)
    if not isinstance(made, Pretrained):
        with torch.device("meta"):  # shapes, no numbers
            made = Pretrained(made(vocab_size=8000, pad_id=0, start_id=2, eos_id=3), None)
    assert isinstance(made.model, Transformer)


def build_module(config: DictConfig) -> None:
    datamodule = instantiate(config.data)
    vocabulary = datamodule.tokenizer.vocabulary
    model = Transformer(
        vocab_size=vocabulary.size, pad_id=0, start_id=2, eos_id=3, model_dim=8, num_heads=1,
        encoder_ffn_dim=8, decoder_ffn_dim=8, encoder_layers=1, decoder_layers=1,
    )  # fmt: skip
    parts = {"model": model, "tokenizer": datamodule.tokenizer, "search": BeamSearch()}
    module = instantiate(config.module, _partial_=True)(**parts)
    assert isinstance(module, NMTModule)
    # rows=seen asks the text which rows those are.
    module.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.trainer.datamodule = datamodule  # type: ignore[attr-defined]
    optimizer = module.configure_optimizers()["optimizer"]
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.defaults["betas"] == (0.9, 0.98)


def build_knn(config: DictConfig) -> None:
    made = instantiate(config.knn)
    assert made == {} or isinstance(made, KNNCallback)
    if made:
        assert isinstance(made.plan.index, AutoChoice | FlatChoice | FaissChoice)


def build_index(config: DictConfig) -> None:
    assert isinstance(instantiate(config.index), AutoChoice | FlatChoice | FaissChoice)


def build_decoding(config: DictConfig) -> None:
    assert isinstance(instantiate(config.decoding), BeamSearch)


def build_trainer(config: DictConfig) -> None:
    config.trainer.accelerator = "cpu"  # a GPU is not everywhere
    trainer = instantiate(config.trainer, logger=False, enable_checkpointing=False)
    assert isinstance(trainer, pl.Trainer)
    assert trainer.num_devices == config.trainer.devices
    assert not trainer._accelerator_connector.use_distributed_sampler


def build_callbacks(config: DictConfig) -> None:
    made = instantiate(config.callbacks)
    assert [type(made[name]).__name__ for name in ("best", "last", "early_stopping")] == [
        *("ModelCheckpoint", "ModelCheckpoint", "EarlyStopping")
    ]
    assert made.best.monitor == made.early_stopping.monitor == "val_loss"
    assert {made.best.filename, made.last.filename} == {"best", "last"}


def build_logger(config: DictConfig) -> None:
    if "Wandb" in config.logger.get("_target_", ""):
        pytest.importorskip("wandb")
    made = instantiate(config.logger)
    assert made == {} or isinstance(made, pl.loggers.Logger)


def build_paths(config: DictConfig) -> None:
    assert all(isinstance(path, str) for path in OmegaConf.to_container(config.paths).values())


BUILDERS = {
    name.removeprefix("build_"): function
    for name, function in list(globals().items())
    if name.startswith("build_")
}


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name in BUILDERS], ids=config_id)
def test_every_choice_builds_what_its_group_is_named_after(
    toy: Callable[..., DictConfig], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    group = path.parent.name
    BUILDERS[group](toy(f"{group}={path.stem}"))


def test_every_group_is_tested() -> None:
    assert {*BUILDERS, *PARTS} == set(GROUPS)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=config_id)
def test_every_experiment_composes_as_a_whole(toy: Callable[..., DictConfig], path: Path) -> None:
    name = path.relative_to(CONF / "experiment").with_suffix("")
    command = path.read_text().splitlines()[1]
    assert command.startswith(f"# python train.py experiment={name}"), "its command comes first"
    config = toy(*command.removeprefix("# python train.py ").split())
    for group in ("data", "model", "module", "decoding", "knn", "index", "callbacks", "logger"):
        BUILDERS[group](config.copy())


@pytest.mark.parametrize("root", ROOTS)
def test_the_roots_compose_and_list_every_group(toy: Callable[..., DictConfig], root: str) -> None:
    config = toy(root=root)
    assert {*config} >= {*GROUPS} - PARTS
    assert config.fit == (root == "train")


def test_both_roots_have_the_same_settings() -> None:
    train, evaluate = (yaml.safe_load((CONF / f"{root}.yaml").read_text()) for root in ROOTS[::-1])
    assert train.keys() == evaluate.keys()
    groups = [
        [next(iter(d)) for d in root["defaults"] if d != "_self_"] for root in (train, evaluate)
    ]
    assert groups[0] == groups[1]


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize(
    ("given", "beam_size"),
    [
        (["model=bergamot"], 1),
        (["model=bergamot", "decoding=greedy"], 1),
        (["model=bergamot", "decoding=beam"], 4),
        (["model=bergamot", "decoding.beam_size=3"], 3),
        (["experiment=demo"], 1),
        (["experiment=demo", "decoding=beam"], 4),
        ([], 4),
    ],
)
def test_a_model_may_choose_its_search_but_the_command_line_wins(
    root: str, given: list[str], beam_size: int
) -> None:
    assert composed(root, *given).decoding.beam_size == beam_size


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_papers_experiments_take_a_domains_settings(domain: str) -> None:
    k, knn_weight, temperature, max_neighbours = DOMAINS[domain]
    for name in ("knn", "adaptive", "adapter_knn"):
        config = composed("train", f"experiment=paper/{name}", f"domain={domain}")
        assert config.name.endswith(f"_{domain}")
        assert config.data.root == f"data/multi_domain/{domain}"
        choice = instantiate(config.knn).plan.combiner
        if name == "knn":
            given = {"num_neighbours": k, "knn_weight": knn_weight, "temperature": temperature}
            assert choice.given == given
        else:
            assert (choice.max_neighbours, choice.temperature) == (max_neighbours, temperature)
            assert choice.variant == "adaptive"
        search = instantiate(config.decoding)
        assert (search.beam_size, search.length_penalty) == (4, 0.6)
        assert (search.max_length_ratio, search.max_length_offset) == (1.2, 10)


def test_the_papers_experiments_are_told_the_domains() -> None:
    assert sorted(path.stem for path in (CONF / "domain").glob("*.yaml")) == sorted(DOMAINS)
    with pytest.raises(ConfigCompositionException, match=r"(?s)You must specify 'domain'.*medical"):
        composed("train", "experiment=paper/knn")


def test_the_papers_adapters_are_plain_and_everywhere() -> None:
    for name, bottleneck_dim in (("adapter", 64), ("adapter_knn", 256)):
        given = [f"experiment=paper/{name}", "domain=law"]
        given += [f"module.bottleneck_dim={bottleneck_dim}"] if bottleneck_dim != 64 else []
        config = composed("train", *given)
        assert config.fit
        assert config.name == f"paper_{name}_{bottleneck_dim}_law"
        module = config.module
        assert (module.bottleneck_dim, module.placement, module.stacks, module.init) == (
            *(bottleneck_dim, "all", "both"),
            "plain",
        )


def test_an_unknown_setting_is_refused_by_hydra() -> None:
    with pytest.raises(ConfigCompositionException) as raised:
        composed("train", "knn=fixed", "knn.lambda=0.5")
    assert "Key 'lambda' is not in struct" in str(raised.value.__cause__)


def test_an_unknown_choice_is_refused_with_the_known_ones() -> None:
    with pytest.raises(Exception, match=r"(?s)Could not find 'knn/adaptiv'.*fixed\n.*none"):
        composed("train", "knn=adaptiv")


# What the files say


def nodes_with_targets(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping of a choice, inherited settings included, that names a class or function."""
    group, choice = path.parent.name, path.stem
    with initialize_config_dir(str(CONF), version_base="1.3"):
        # A model may choose among searches, so there must be one.
        first = [] if group == "decoding" else ["+decoding=beam"]
        composed_alone = compose(None, [*first, f"+{group}={choice}"])
        content = OmegaConf.to_container(composed_alone, resolve=False)

    def visit(where: str, node: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        if not isinstance(node, dict):
            return
        if "_target_" in node:
            yield where, node
        for key, inner in node.items():
            yield from visit(f"{where}.{key}", inner)

    assert isinstance(content, dict)
    yield from visit(config_id(path), content[group])


CLASS_FILES = [p for p in FILES if p.parent.name in BUILDERS and list(nodes_with_targets(p))]


@pytest.mark.parametrize("path", CLASS_FILES, ids=config_id)
def test_every_setting_is_a_parameter_and_repeats_its_default_or_differs_on_purpose(
    path: Path,
) -> None:
    for where, node in nodes_with_targets(path):
        parameters = inspect.signature(get_object(node["_target_"])).parameters
        open_ended = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
        for key, value in node.items():
            if key.startswith("_"):
                continue
            assert open_ended or key in parameters, f"{where} has no parameter {key}"
            default = parameters[key].default if key in parameters else inspect.Parameter.empty
            is_plain = not isinstance(value, dict | list) and "${" not in str(value)
            if default is inspect.Parameter.empty or not is_plain or value == "???":
                continue
            names = (config_id(path), f"{config_id(path)}:{key}")
            inherited = {f"{path.parent.name}/{p.stem}:{key}" for p in path.parent.glob("*.yaml")}
            if value != default:
                assert {*names, *inherited} & DELIBERATE.keys(), (
                    f"{where}: {key} is {value!r}, but its default is {default!r}"
                )


@pytest.mark.parametrize("choice", ["nmt", "full", "adapter", "lora", "opl"])
def test_a_modules_settings_are_its_classes_own_defaults(
    tiny_model: Transformer, toy_datamodule: ParallelDataModule, choice: str
) -> None:
    """Those that a fine-tuner passes on, which its signature does not show."""
    config = composed("train", f"module={choice}").module
    parts = (tiny_model, toy_datamodule.tokenizer, BeamSearch())
    module = get_object(config._target_)(*parts, optimizer=torch.optim.Adam)
    for name in ("warmup_steps", "decay", "label_smoothing", "bleu_every"):
        assert getattr(module, name) == config[name], name


def test_what_differs_on_purpose_is_still_there() -> None:
    for name in DELIBERATE:
        file, _, key = name.partition(":")
        content = yaml.safe_load((CONF / f"{file}.yaml").read_text())
        assert not key or key in content, name


def test_named_corpora_have_the_catalogues_languages() -> None:
    for name, entry in CORPORA.items():
        config = composed("train", f"data={name}").data
        assert config.root.name == name
        assert (config.source_lang, config.target_lang) == (entry.source_lang, entry.target_lang)
