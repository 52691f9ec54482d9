"""Our models against Hugging Face's own, on random weights: logits, hidden states, search.

Where the searches differ: `generate` counts the start id in max_length and we do not; it is
fairseq's search only with `early_stopping=True`, its default going on until no running hypothesis
can win; it keeps log-probabilities that sum to one over forbidden tokens too, and we leave those
out before normalizing; and the end that it forces at max_length costs nothing, ours what EOS costs
there. The last two are `OurRules` below.
"""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from torch import Tensor

from lightning_knnmt.decoding import Hypothesis, SoftmaxDistribution, beam_search
from lightning_knnmt.models import Transformer
from lightning_knnmt.pretrained import load_huggingface_model, load_pretrained

transformers = pytest.importorskip(
    "transformers", reason="needs transformers, the witness (requirements-dev.txt)"
)

SMALL = {
    "d_model": 12,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 14,
    "decoder_ffn_dim": 10,
    "max_position_embeddings": 40,
}
LARGER = SMALL | {
    "d_model": 30,
    "encoder_layers": 1,
    "decoder_layers": 3,
    "encoder_attention_heads": 5,
    "decoder_attention_heads": 5,
    "encoder_ffn_dim": 22,
    "decoder_ffn_dim": 70,
}
MARIAN = SMALL | {
    "vocab_size": 61,
    "pad_token_id": 60,
    "decoder_start_token_id": 60,
    "eos_token_id": 0,
    "forced_eos_token_id": 0,
}
FSMT = {"src_vocab_size": 61, "tgt_vocab_size": 61, "tie_word_embeddings": True}
M2M = {"vocab_size": 61, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
SEPARATE = {"vocab_size": 83, "decoder_vocab_size": 61, "share_encoder_decoder_embeddings": False}
# Name: family, configuration, tied_embeddings expected of us.
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "marian": ("Marian", MARIAN | {"activation_function": "relu"}, "all"),
    "marian swish scaled": (
        "Marian",
        MARIAN | LARGER | {"activation_function": "swish", "scale_embedding": True},
        "all",
    ),
    "marian two vocabularies": ("Marian", MARIAN | SEPARATE, "decoder"),
    "fsmt": ("FSMT", SMALL | FSMT, "all"),
    "fsmt two vocabularies": (
        "FSMT",
        LARGER | {"src_vocab_size": 83, "tgt_vocab_size": 61, "activation_function": "gelu"},
        "none",
    ),
    "fsmt unscaled": ("FSMT", LARGER | FSMT | {"scale_embedding": False}, "all"),
    "m2m": ("M2M100", SMALL | M2M, "all"),
    "m2m gelu": ("M2M100", LARGER | M2M | {"activation_function": "gelu"}, "all"),
    "m2m untied": ("M2M100", LARGER | M2M | {"tie_word_embeddings": False}, "none"),
}
CLASSES = {
    "Marian": "MarianMTModel",
    "FSMT": "FSMTForConditionalGeneration",
    "M2M100": "M2M100ForConditionalGeneration",
}
NUM_SENTENCES, MAX_LENGTH = 200, 20
# With these seeds translations differ from source to source, and many end by themselves.
SEEDS = {
    "marian": 4,
    "marian swish scaled": 2,
    "marian two vocabularies": 13,
    "fsmt": 3,
    "fsmt two vocabularies": 14,
    "fsmt unscaled": 5,
    "m2m": 4,
    "m2m gelu": 4,
    "m2m untied": 15,
}


def random_model(name: str, attentive: float = 1.0) -> Any:
    """Hugging Face's model with random parameters, biases and norms too, that ends its sentences.

    Fresh ones repeat one token for ever: tied embeddings like the token that came in. A last norm
    of either sign cures that; its bias is a direction in which EOS is likelier. `attentive` is the
    gain of attention to the source: more makes translations differ, and rounding errors grow.
    """
    family, settings, _ = CASES[name]
    config = getattr(transformers, f"{family}Config")(**settings)
    torch.manual_seed(SEEDS[name])
    model = getattr(transformers, CLASSES[family])(config).eval()
    decoder = model.get_decoder()
    last = decoder.layer_norm if family == "M2M100" else decoder.layers[-1].final_layer_norm
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "embed_positions" not in parameter_name:
                gain = attentive if "encoder_attn" in parameter_name else 1.0
                scale = 0.3 if parameter.dim() == 1 else gain * parameter.shape[-1] ** -0.5
                parameter.normal_(float(parameter_name.endswith("norm.weight")), scale)
        last.weight.normal_(0, 1.5)
        last.bias.mul_(4 / last.bias.norm())
        for weight in (decoder.embed_tokens.weight, projection_of(model).weight):
            weight[config.eos_token_id] += 0.15 * last.bias
        if family == "Marian":
            model.final_logits_bias.normal_()
    # As OPUS-MT's do; nothing but training keeps the others from generating padding.
    model.generation_config.bad_words_ids = [[config.pad_token_id]]
    return model


def projection_of(model: Any) -> torch.nn.Linear:
    projection: torch.nn.Linear = (
        model.model.decoder.output_projection
        if model.config.model_type == "fsmt"
        else model.lm_head
    )
    return projection


@pytest.fixture(scope="module", params=list(CASES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Hugging Face's model and ours, read from what it saved; and the case's name."""
    theirs = random_model(request.param, attentive=4.0)
    directory = tmp_path_factory.mktemp("saved")
    theirs.save_pretrained(directory)
    return theirs, load_huggingface_model(directory), request.param


def sentences(model: Transformer, count: int) -> tuple[Tensor, Tensor]:
    """Random sources of 1 to 11 tokens and EOS, padded on the right, and their mask."""
    generator = torch.Generator().manual_seed(1)
    size = model.source_embedding.num_embeddings
    ids = torch.randint(4, size - 1, (count, 12), generator=generator)
    if model.pad_id < size - 1:
        ids[ids == model.pad_id] += 1
    lengths = torch.randint(1, 12, (count, 1), generator=generator)
    places = torch.arange(12)
    ids = ids.masked_fill(places == lengths, model.eos_id).masked_fill(
        places > lengths, model.pad_id
    )
    return ids, ids != model.pad_id


@pytest.mark.parametrize("name", CASES)
def test_logits_and_hidden_states_are_theirs(name: str, tmp_path: Path) -> None:
    theirs = random_model(name)
    theirs.save_pretrained(tmp_path)
    ours = load_huggingface_model(tmp_path)
    assert ours.config["tied_embeddings"] == CASES[name][2]
    source, mask = sentences(ours, 30)
    target = torch.randint(4, 59, (30, 9))
    target[:, 0] = ours.start_id
    seen = []
    handle = projection_of(theirs).register_forward_hook(
        lambda _, inputs, __: seen.append(inputs[0])
    )
    with torch.no_grad():
        expected = theirs(
            input_ids=source, attention_mask=mask.long(), decoder_input_ids=target, use_cache=False
        ).logits
        hidden = ours(source, target).hidden
        logits = ours.output_projection(hidden)
    handle.remove()
    assert (logits[..., ours.pad_id] < -9000).all()  # never to be generated: differs on purpose
    logits[..., ours.pad_id] = expected[..., ours.pad_id]
    torch.testing.assert_close(hidden, seen[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.5, "logits too flat to tell anything"


def test_cached_decoding_is_full_decoding(pair: Any) -> None:
    _, ours, _ = pair
    source, _ = sentences(ours, 5)
    target = torch.randint(4, 59, (5, 9))
    with torch.no_grad():
        memory = ours.encode(source)
        cache = ours.start(memory, 1)
        steps = [ours.decode_step(tokens, cache).hidden for tokens in target.unbind(1)]
        full = ours.decode(target, memory).hidden
    torch.testing.assert_close(torch.stack(steps, 1), full, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("beam_size", "length_penalty"), [(1, 1.0), (4, 1.0), (4, 1.6)])
def test_search_finds_what_generate_finds(pair: Any, beam_size: int, length_penalty: float) -> None:
    theirs, ours, name = pair
    source, mask = sentences(ours, NUM_SENTENCES)
    prefix = [17] if CASES[name][0] == "M2M100" else []  # a language's token
    expected = generated(theirs, source, mask, beam_size, length_penalty, prefix)
    found = beam_search(
        ours,
        source,
        SoftmaxDistribution(ours.output_projection),
        start_id=ours.start_id,
        eos_id=ours.eos_id,
        beam_size=beam_size,
        max_length=MAX_LENGTH,
        length_penalty=length_penalty,
        prefix=prefix,
    )
    differing = [
        tokens
        for tokens, hypotheses in zip(expected, found, strict=True)
        if tokens != hypotheses[0].tokens and not ties(hypotheses)
    ]
    assert not differing
    assert sum(ties(hypotheses) for hypotheses in found) < 10
    assert len({tuple(tokens) for tokens in expected}) > 10, "the sources hardly matter"
    assert sum(len(tokens) < MAX_LENGTH for tokens in expected) > 20


class OurRules(transformers.LogitsProcessor):  # type: ignore[misc, name-defined, unused-ignore]
    """No padding, before normalization; at the last step EOS, at what it costs."""

    def __init__(self, pad_id: int, eos_id: int) -> None:
        self.pad_id, self.eos_id = pad_id, eos_id

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        if (scores > float("-inf")).sum() > len(scores):  # else the language's token is forced
            scores[:, self.pad_id] = float("-inf")
            scores = scores.log_softmax(-1)
        if input_ids.shape[1] == MAX_LENGTH:
            end = scores[:, self.eos_id].clone()
            scores[:] = float("-inf")
            scores[:, self.eos_id] = end
        return scores


def ties(hypotheses: list[Hypothesis]) -> bool:
    scores = [hypothesis.normalized_score for hypothesis in hypotheses[:2]]
    return len(scores) == 2 and scores[0] - scores[1] < 1e-5


def generated(
    model: Any,
    source: Tensor,
    mask: Tensor,
    beam_size: int,
    length_penalty: float,
    prefix: list[int],
) -> list[list[int]]:
    eos = model.config.eos_token_id
    output = model.generate(
        input_ids=source,
        attention_mask=mask.long(),
        num_beams=beam_size,
        do_sample=False,
        max_length=MAX_LENGTH + 1,
        length_penalty=length_penalty,
        early_stopping=beam_size > 1,
        forced_eos_token_id=None,
        forced_bos_token_id=prefix[0] if prefix else None,
        bad_words_ids=None,
        logits_processor=transformers.LogitsProcessorList(
            [OurRules(model.config.pad_token_id, eos)]
        ),
    )
    rows = output[:, 1:].tolist()
    return [row[: row.index(eos) + 1] for row in rows]


@pytest.mark.parametrize("form", ["sharded", "pickle"])
def test_other_files_hold_the_same_weights(form: str, tmp_path: Path) -> None:
    theirs = random_model("m2m")
    theirs.save_pretrained(tmp_path / "whole")
    if form == "sharded":
        theirs.save_pretrained(tmp_path / form, max_shard_size="4KB")
        assert len(list((tmp_path / form).glob("*.safetensors"))) > 2
    else:
        theirs.config.save_pretrained(tmp_path / form)
        theirs.generation_config.save_pretrained(tmp_path / form)
        torch.save(theirs.state_dict(), tmp_path / form / "pytorch_model.bin")
    whole, other = (load_huggingface_model(tmp_path / each) for each in ("whole", form))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_tables_of_positions_count_as_they_stand(tmp_path: Path) -> None:
    """Old OPUS-MT files hold the table that the model was trained with, in Marian's own waves."""
    theirs = random_model("marian")
    own_table: Callable[..., Tensor] = torch.randn
    for kind, table in {
        "learned": own_table(40, 12),
        "sinusoidal_paper": theirs.model.encoder.embed_positions.weight.clone(),
    }.items():
        for side in (theirs.model.encoder, theirs.model.decoder):
            side.embed_positions.weight.data.copy_(table)
        theirs.config.save_pretrained(tmp_path / kind)
        theirs.generation_config.save_pretrained(tmp_path / kind)
        torch.save(theirs.state_dict(), tmp_path / kind / "pytorch_model.bin")
        ours = load_huggingface_model(tmp_path / kind)
        assert ours.config["positions"] == kind
        source, mask = sentences(ours, 4)
        target = torch.randint(4, 59, (4, 9))
        expected = theirs(source, mask.long(), decoder_input_ids=target, use_cache=False).logits
        logits = ours.output_projection(ours(source, target).hidden)
        logits[..., ours.pad_id] = expected[..., ours.pad_id]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


LINES = ["a casa azul da praia", "  um dia   de sol", "uma praia azul, casa!", "sol€ ção"]


@pytest.fixture(scope="module")
def piece_models() -> list[bytes]:
    models = []
    for text in (["uma casa azul", "a casa da praia", "um dia de sol azul"], LINES):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(text * 9),
            model_writer=model,
            vocab_size=45,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        models.append(model.getvalue())
    return models


def piece_names(model: bytes) -> list[str]:
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    return [processor.IdToPiece(i) for i in range(3, processor.GetPieceSize())]


# It would make a normalizer for whoever calls it; encoding does not.
@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
def test_opus_tokenizers_give_their_ids(piece_models: list[bytes], tmp_path: Path) -> None:
    names = ["</s>", "<unk>", *dict.fromkeys(p for m in piece_models for p in piece_names(m))]
    names.append("<pad>")
    (tmp_path / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    for side, model in zip(("source", "target"), piece_models, strict=True):
        (tmp_path / f"{side}.spm").write_bytes(model)
    pad = len(names) - 1
    settings = MARIAN | {"vocab_size": pad + 1, "pad_token_id": pad, "decoder_start_token_id": pad}
    transformers.MarianMTModel(transformers.MarianConfig(**settings)).save_pretrained(tmp_path)
    theirs = transformers.MarianTokenizer(
        *(str(tmp_path / name) for name in ("source.spm", "target.spm", "vocab.json"))
    )
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path).tokenizer
    assert ours.encode_source(LINES) == theirs(LINES).input_ids
    targets = theirs(text_target=LINES).input_ids
    assert ours.encode_target(LINES) == targets
    for ids in targets[:3]:
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_m2m_tokenizers_give_their_ids(piece_models: list[bytes], tmp_path: Path) -> None:
    names = ["<s>", "<pad>", "</s>", "<unk>", *piece_names(piece_models[0])]
    (tmp_path / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (tmp_path / "sentencepiece.bpe.model").write_bytes(piece_models[0])
    config = transformers.M2M100Config(**SMALL | {"vocab_size": len(names) + 108})
    transformers.M2M100ForConditionalGeneration(config).save_pretrained(tmp_path)
    theirs = transformers.M2M100Tokenizer(
        str(tmp_path / "vocab.json"),
        str(tmp_path / "sentencepiece.bpe.model"),
        src_lang="pt",
        tgt_lang="zu",
    )
    theirs.save_pretrained(tmp_path)  # both languages stand in tokenizer_config.json
    ours = load_pretrained(tmp_path).tokenizer
    assert ours.encode_source(LINES) == theirs(LINES).input_ids
    targets = theirs(text_target=LINES).input_ids
    assert ours.encode_target(LINES) == targets
    assert ours.vocabulary.target_prefix == (theirs.get_lang_id("zu"),)
    for ids in targets[:2]:
        # transformers 5.23 leaves the language's token in the text, where 4 skipped it.
        assert ours.decode(ids) == theirs.decode(ids[1:], skip_special_tokens=True)


def test_fsmts_tokenizer_gives_the_same_ids_and_text(tmp_path: Path) -> None:
    """Merges chosen so that words, escapes and dashes are cut in many ways."""
    pytest.importorskip("sacremoses")
    lines = [
        "Die Türen – „alt“ und neu - kosten 3.000,50 € (z.B. in St. Gallen)!",
        "It's a well-known \"fact\", isn't it? <b>A & B</b> 50% | [x]",
        "Das geht’s … und　weiter：ＡＢ 12 。 Ende\u200b",
        "",
    ]
    pieces = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces += sorted({c + end for line in lines for c in line for end in ("", "</w>")} - {" "})
    pieces += ["Die</w>", "Di", "kos", "ten</w>", "ht", "&apos;</w>", "&quot;</w>", "@-@</w>"]
    merges = ["D i", "Di e</w>", "k o", "ko s", "e n</w>", "t en</w>", "h t", "& a", "&a p"]
    merges += ["&ap o", "&apo s", "&apos ;</w>", "- @</w>", "@ -@</w>"]
    table = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    config = transformers.FSMTConfig(
        **SMALL, langs=["de", "en"], src_vocab_size=len(table), tgt_vocab_size=len(table)
    )
    transformers.FSMTForConditionalGeneration(config).save_pretrained(tmp_path)
    for name in ("vocab-src.json", "vocab-tgt.json"):
        (tmp_path / name).write_text(json.dumps(table))
    (tmp_path / "merges.txt").write_text("".join(f"{merge} 1\n" for merge in merges))
    theirs = transformers.FSMTTokenizer(
        langs=["de", "en"],
        src_vocab_file=str(tmp_path / "vocab-src.json"),
        tgt_vocab_file=str(tmp_path / "vocab-tgt.json"),
        merges_file=str(tmp_path / "merges.txt"),
    )
    _, ours = load_pretrained(tmp_path)
    encoded = ours.encode_source(lines)
    assert encoded == [theirs(line).input_ids for line in lines]
    assert len({*encoded[0]}) > 20
    for ids in encoded:
        ids = [i for i in ids if i != table["<unk>"]]  # which they count among the special ones
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
