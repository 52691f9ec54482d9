import logging
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lightning_knnmt.data import (
    FairseqDictionary,
    FairseqTokenizer,
    LinePolicy,
    ParallelCorpus,
    PieceTokenizer,
    SentencePieceTokenizer,
    TextError,
    TextPair,
    Tokenizer,
    Vocabulary,
    encode_corpus,
    find_text_pair,
    sentencepiece_pieces,
    split_corpus,
)
from lightning_knnmt.data import corpus as corpus_module
from lightning_knnmt.data import encoding as encoding_module
from lightning_knnmt.data.fairseq.dictionary import SPECIALS
from lightning_knnmt.data.fairseq.tokenizer import BytePairEncoding, Side

WritePair = Callable[..., TextPair]


def test_pairs_offsets_and_text_agree(
    toy_root: Path, tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding_module, "_CHUNK_LINES", 7)
    text = find_text_pair(toy_root / "train", "pt", "en")
    corpus = encode_corpus(text, tokenizer, toy_root / "cache", LinePolicy(), "toy")
    assert len(corpus) == 200
    sources, targets = tokenizer.encode_source(corpus.source_lines()), corpus.target_lines()
    for i in range(200):
        source_ids, target_ids = corpus[i]
        assert source_ids.tolist() == sources[i]
        assert tokenizer.decode(target_ids) == targets[i]
        assert len(source_ids) == corpus.source_lengths[i]
        assert len(target_ids) == corpus.target_lengths[i]
    assert corpus.target_offsets[0] == 0
    assert (np.diff(corpus.target_offsets) == corpus.target_lengths).all()


def test_ids_are_small_and_memory_mapped(toy_root: Path, tokenizer: SentencePieceTokenizer) -> None:
    text = find_text_pair(toy_root / "train", "pt", "en")
    corpus = encode_corpus(text, tokenizer, toy_root / "cache", LinePolicy(), "toy")
    source_ids, _ = corpus[0]
    assert isinstance(source_ids, np.memmap)
    assert source_ids.dtype == np.uint16
    copy = pickle.loads(pickle.dumps(corpus))
    assert isinstance(copy[5][0], np.memmap)
    assert copy[5][0].tolist() == corpus[5][0].tolist()
    assert len(pickle.dumps(corpus)) < 1000


def test_a_second_run_finds_the_first(
    toy_root: Path, tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = find_text_pair(toy_root / "train", "pt", "en")
    first = encode_corpus(text, tokenizer, toy_root / "cache", LinePolicy(), "toy")
    monkeypatch.setattr("lightning_knnmt.data.corpus.write_arrays", None)  # a call would fail
    again = encode_corpus(text, tokenizer, toy_root / "cache", LinePolicy(), "toy")
    assert again.directory == first.directory


def test_a_changed_text_tokenizer_or_policy_is_another_corpus(
    toy_root: Path, tokenizer: SentencePieceTokenizer, write_pair: WritePair
) -> None:
    text = find_text_pair(toy_root / "train", "pt", "en")
    files = [text.source_path, text.target_path]
    other_tokenizer = SentencePieceTokenizer.train(files, 36, cache_dir=toy_root / "cache")
    digests = {
        encode_corpus(text, tokenizer, toy_root / "cache", LinePolicy(), "toy").digest,
        encode_corpus(text, tokenizer, toy_root / "cache", LinePolicy(99), "toy").digest,
        encode_corpus(text, other_tokenizer, toy_root / "cache", LinePolicy(), "toy").digest,
    }
    text = write_pair(["casa"], ["house"])
    digests.add(encode_corpus(text, tokenizer, toy_root / "cache", LinePolicy(), "toy").digest)
    assert len(digests) == 4


def _encode(root: Path, model: bytes) -> None:
    text = find_text_pair(root / "train", "pt", "en")
    encode_corpus(text, SentencePieceTokenizer(model), root / "cache", LinePolicy(), "toy")


@pytest.mark.slow
def test_two_processes_make_one_corpus(toy_root: Path, tokenizer: SentencePieceTokenizer) -> None:
    model = tokenizer.state()["model"].numpy().tobytes()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_encode, args=(toy_root, model)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    encoded = [p for p in (toy_root / "cache" / "encoded").iterdir() if p.is_dir()]
    assert len(encoded) == 1


def test_failed_encoding_leaves_no_corpus(
    tmp_path: Path, write_pair: WritePair, tokenizer: SentencePieceTokenizer
) -> None:
    text = write_pair(["casa", ""], ["house", "door"])
    with pytest.raises(TextError):
        encode_corpus(text, tokenizer, tmp_path / "cache", LinePolicy(), "toy")
    assert not [p for p in (tmp_path / "cache" / "encoded").iterdir() if p.is_dir()]


@pytest.mark.parametrize("side", ["pt", "en"])
def test_an_empty_line_is_an_error(
    side: str, tmp_path: Path, write_pair: WritePair, tokenizer: SentencePieceTokenizer
) -> None:
    lines = {"pt": ["casa", "porta"], "en": ["house", "door"]}
    lines[side][1] = " \t"
    text = write_pair(lines["pt"], lines["en"])
    with pytest.raises(TextError, match=rf"train\.{side}, line 2 .*empty_lines"):
        encode_corpus(text, tokenizer, tmp_path / "cache", LinePolicy(), "toy")


def _encode_hard_lines(
    write_pair: WritePair, tokenizer: SentencePieceTokenizer, tmp_path: Path, policy: LinePolicy
) -> ParallelCorpus:
    """Line 1 has an empty target, line 3 a source of 10,000 words."""
    text = write_pair(["casa", "porta", "luz " * 10_000], ["", "door", "light"])
    return encode_corpus(text, tokenizer, tmp_path / "cache", policy, "toy")


def test_skipped_lines_are_counted_and_text_stays_in_step(
    tmp_path: Path,
    write_pair: WritePair,
    tokenizer: SentencePieceTokenizer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    policy = LinePolicy(max_length=20, long_lines="skip", empty_lines="skip")
    corpus = _encode_hard_lines(write_pair, tokenizer, tmp_path, policy)
    assert len(corpus) == 1
    assert corpus.source_lines() == ["porta"]
    assert corpus.target_lines() == ["door"]
    assert tokenizer.decode(corpus[0][1]) == "door"
    long, empty = (r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
    for part in ("train: 1 of 3 ", "skipped", " 20 ", "10,001", "line 3"):
        assert part in long
    for part in ("train: 1 of 3 ", "skipped", "empty"):
        assert part in empty


def test_cut_lines_keep_their_end_and_are_counted(
    tmp_path: Path,
    write_pair: WritePair,
    tokenizer: SentencePieceTokenizer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    policy = LinePolicy(max_length=20, long_lines="cut", empty_lines="skip")
    corpus = _encode_hard_lines(write_pair, tokenizer, tmp_path, policy)
    assert len(corpus) == 2
    source_ids, target_ids = corpus[1]
    assert len(source_ids) == 20
    assert source_ids[-1] == tokenizer.vocabulary.eos_id
    assert tokenizer.decode(source_ids) == " ".join(["luz"] * 19)
    assert tokenizer.decode(target_ids) == "light"
    assert "1 of 3 pairs were cut" in caplog.text


class TestUnknown:
    """What the vocabulary lacks is said once, and as what it is."""

    @pytest.fixture(autouse=True)
    def _nothing_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(corpus_module, "_said", set())
        monkeypatch.setattr(corpus_module, "_named", {})

    def said(
        self,
        text: TextPair,
        tokenizer: Tokenizer,
        caplog: pytest.LogCaptureFixture,
    ) -> list[tuple[str, str]]:
        """What opening a text says, as levels and sentences."""
        caplog.clear()
        with caplog.at_level(logging.INFO):
            cache = text.source_path.parent / "cache"
            encode_corpus(text, tokenizer, cache, LinePolicy(), "toy")
        return [
            (record.levelname, record.getMessage())
            for record in caplog.records
            if "vocabulary lacks" in record.getMessage()
        ]

    def test_a_few_characters_are_no_other_language(
        self,
        write_pair: WritePair,
        tokenizer: SentencePieceTokenizer,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        text = write_pair(["casa {luz}", "porta"] * 9, ["house {light}", "door"] * 9)
        ((level, line),) = self.said(text, tokenizer, caplog)
        assert level == "INFO"
        assert line.startswith("toy: ")
        assert " { } " in line
        assert "source" in line
        assert "target" in line
        assert "script" not in line
        assert self.said(text, tokenizer, caplog) == []  # found again in the cache
        valid = write_pair(["luz {luz}"], ["light {light}"], "valid")
        assert self.said(valid, tokenizer, caplog) == []  # the same characters
        test = write_pair(["luz {luz}", "# # # #"], ["light {light}", "# # # #"], "test")
        ((level, line),) = self.said(test, tokenizer, caplog)
        assert " # " in line  # most of what is unknown here was not named before

    def test_many_characters_are_another_language(
        self,
        write_pair: WritePair,
        tokenizer: SentencePieceTokenizer,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        text = write_pair(["съешь ещё этих мягких французских булок", "casa"], ["house", "house"])
        ((level, line),) = self.said(text, tokenizer, caplog)
        assert level == "WARNING"
        assert str(text.source_path) in line
        assert "script" in line
        corpus_module._said.clear()  # as in another run, which finds the encoded text
        assert self.said(text, tokenizer, caplog) == [(level, line)]

    def test_other_ranks_keep_silent(
        self,
        write_pair: WritePair,
        tokenizer: SentencePieceTokenizer,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("LOCAL_RANK", "1")
        text = write_pair(["дом", "casa"], ["house", "house"])
        assert self.said(text, tokenizer, caplog) == []

    def test_rare_ones_are_not_worth_a_line(
        self,
        write_pair: WritePair,
        tokenizer: SentencePieceTokenizer,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        text = write_pair(["casa grande"] * 200 + ["{"], ["large house"] * 201)
        assert self.said(text, tokenizer, caplog) == []

    def test_each_side_has_its_own_unknown(
        self,
        write_pair: WritePair,
        tokenizer: SentencePieceTokenizer,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """Pieces with ids of another's choosing: <unk> is 0 in the source and 39 in the target."""
        model = tokenizer.state()["model"].numpy().tobytes()
        pieces = sentencepiece_pieces(model)
        source = {piece: (i - 1) % 40 for i, piece in enumerate(pieces)}
        target = {piece: (i - 2) % 40 for i, piece in enumerate(pieces)}
        del target["▁house"]
        vocabulary = Vocabulary(41, 40, 40, eos_id=target["</s>"], unk_id=39, source_size=41)
        tables = PieceTokenizer(model, model, source, target, vocabulary)
        assert tables.unk_ids == (0, 39)
        text = write_pair(["casa {luz}", "porta"], ["house", "door"])
        ((_, line),) = self.said(text, tables, caplog)
        assert " house { } " in line

    def test_fairseqs_pieces(self) -> None:
        symbols = (*SPECIALS, "a@@", "b", "b@@", "a", "ab")
        side = Side(FairseqDictionary(symbols), BytePairEncoding([]))
        other = Side(FairseqDictionary((*symbols, "c")))
        tokenizer = FairseqTokenizer(side, other)
        assert tokenizer.unknown_symbols("ab cb", "source") == ["c"]
        assert tokenizer.unknown_symbols("a c d", "target") == ["d"]
        ids = tokenizer.encode_source(["ab cb"])[0]
        assert ids.count(tokenizer.unk_ids[0]) == 1


def test_two_files_are_enough(
    tmp_path: Path,
    write_pair: WritePair,
    tokenizer: SentencePieceTokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LIGHTNING_KNNMT_CACHE", str(tmp_path / "elsewhere"))
    corpus = encode_corpus(write_pair(["casa"], ["house"]), tokenizer)
    assert corpus.name == "train.pt"
    assert corpus.directory.is_relative_to(tmp_path / "elsewhere")
    assert corpus.target_lines() == ["house"]


class TestSplit:
    @pytest.fixture
    def corpus(
        self,
        toy_root: Path,
        tmp_path: Path,
        write_pair: WritePair,
        tokenizer: SentencePieceTokenizer,
    ) -> ParallelCorpus:
        """200 pairs, and 20 more whose sources are those of others but for case, space, digits."""
        sources, targets = (
            (toy_root / f"train.{language}").read_text().splitlines() for language in ("pt", "en")
        )
        sources += [f" {line.upper()}  " for line in sources[:20]]
        sources += ["luz 12", "luz  7"]
        text = write_pair(sources, [*targets, *targets[:20], "light 12", "light 7"])
        return encode_corpus(text, tokenizer, tmp_path / "cache", LinePolicy(), "toy")

    def test_every_pair_is_on_one_side(self, corpus: ParallelCorpus) -> None:
        train, tune = split_corpus(corpus, 0.1)
        assert sorted([*train.rows, *tune.rows]) == list(range(len(corpus)))
        assert 22 <= len(tune) <= 30
        for view in (train, tune):
            assert view.source_lines() == [corpus.source_lines()[row] for row in view.rows]
            assert view.target_lines() == [corpus.target_lines()[row] for row in view.rows]
            assert view.line_numbers([0, 3]) == [view.rows[0] + 1, view.rows[3] + 1]
            assert view.target_tokens.tolist() == [
                token for row in view.rows for token in corpus[int(row)][1]
            ]
            assert view.target_offsets[-1] == len(view.target_tokens) == view.target_lengths.sum()
            assert [len(view[i][0]) for i in range(len(view))] == view.source_lengths.tolist()

    def test_like_sources_stay_together(self, corpus: ParallelCorpus) -> None:
        for seed in range(20):
            train, tune = (
                {
                    tuple(word if word.isalpha() else "#" for word in line.casefold().split())
                    for line in view.source_lines()
                }
                for view in split_corpus(corpus, 0.3, seed)
            )
            assert not train & tune

    def test_it_depends_on_text_and_seed_alone(self, corpus: ParallelCorpus) -> None:
        train, tune = split_corpus(corpus, 0.1)
        again = split_corpus(pickle.loads(pickle.dumps(corpus)), 0.1)
        assert [train.digest, tune.digest] == [view.digest for view in again]
        digests = {corpus.digest, train.digest, tune.digest}
        digests |= {view.digest for view in split_corpus(corpus, 0.1, seed=2)}
        assert len(digests) == 5
        copy = pickle.loads(pickle.dumps(tune))
        assert copy.target_tokens.tolist() == tune.target_tokens.tolist()

    @pytest.mark.parametrize("share", [0.001, 0.999])
    def test_neither_side_is_empty(self, corpus: ParallelCorpus, share: float) -> None:
        assert all(len(view) >= 1 for view in split_corpus(corpus, share))

    def test_what_cannot_be_divided(
        self,
        corpus: ParallelCorpus,
        tmp_path: Path,
        write_pair: WritePair,
        tokenizer: SentencePieceTokenizer,
    ) -> None:
        for share in (0.0, 1.0, float("nan")):
            with pytest.raises(ValueError, match=str(share)):
                split_corpus(corpus, share)
        text = write_pair(["casa", "Casa"], ["house", "house"])
        alike = encode_corpus(text, tokenizer, tmp_path / "cache", LinePolicy(), "toy")
        with pytest.raises(ValueError, match=r"train\.pt .* 2 "):
            split_corpus(alike, 0.5)


def test_text_of_which_nothing_is_left_is_refused(
    tmp_path: Path, write_pair: WritePair, tokenizer: SentencePieceTokenizer
) -> None:
    text = write_pair(["", "casa"], ["house", ""])
    with pytest.raises(TextError, match=r"train\.pt.* all 2 .*max_length"):
        encode_corpus(text, tokenizer, tmp_path, LinePolicy(empty_lines="skip"), "toy")


def test_aligned_text_loses_no_line() -> None:
    assert LinePolicy(9, "skip", "skip").aligned() == LinePolicy(9, "cut", "error")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_length": 1}, r"max_length is 1\b.* 2\b"),
        ({"long_lines": "drop"}, r"long_lines is 'drop'.*'cut' or 'skip'"),
        ({"empty_lines": "cut"}, r"empty_lines is 'cut'.*'error' or 'skip'"),
    ],
)
def test_unknown_policies_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinePolicy(**arguments)
