"""An explanation in a terminal, readable without colours too."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lightning_knnmt.explanation import Explanation, Token

SHOWN_PAIRS = 2  # of each group of words
BAR = 10  # characters
CHANGED, SUPPORTED = "black on green", "black on yellow"


@dataclass(frozen=True)
class Words:
    """A word of a translation, or several that one pair of sentences decided.

    Attributes:
        text: What they are.
        tokens: Their tokens.
    """

    text: str
    tokens: tuple[Token, ...]

    @property
    def knn_share(self) -> float:
        """The datastore's part of their probability: the mean over the tokens."""
        return sum(each.knn_share for each in self.tokens) / len(self.tokens)

    @property
    def is_retrieved(self) -> bool:
        """Whether retrieval decided: whether the model alone would have chosen another token."""
        return any(token.instead_of is not None and token.neighbours for token in self.tokens)

    @property
    def decided_by(self) -> list[tuple[int, float]]:
        """The pairs of sentences that had a part in them, by the size of that part."""
        parts: Counter[int] = Counter()
        for neighbour in chain.from_iterable(token.neighbours for token in self.tokens):
            parts[neighbour.sentence] += neighbour.share / len(self.tokens)  # type: ignore[assignment]
        return [(sentence, part) for sentence, part in parts.most_common() if part > 0.0]


def words_of(explanation: Explanation) -> list[Words]:
    """The words of a translation; in scripts without spaces, its tokens."""
    text = explanation.text
    wide = [unicodedata.east_asian_width(character) in "WF" for character in text]
    first = [
        i == 0 or text[i - 1].isspace() or wide[i] or wide[i - 1] for i in range(len(text))
    ]  # whether a word begins here
    groups: list[list[Token]] = [[]]
    for token in explanation.tokens:
        start, end = token.span
        if start == end:  # the end of the sentence
            continue
        # A space that is a token of its own belongs to the word after it.
        begins = next((first[i] for i in range(start, end) if not text[i].isspace()), True)
        if begins and _text_of(text, groups[-1]):
            groups.append([])
        groups[-1].append(token)
    return [_words(text, group) for group in groups if _text_of(text, group)]


def _text_of(text: str, tokens: Sequence[Token]) -> str:
    return text[tokens[0].span[0] : tokens[-1].span[1]].strip() if tokens else ""


def _words(text: str, tokens: Sequence[Token]) -> Words:
    return Words(_text_of(text, tokens), tuple(tokens))


def view(source: str, explanation: Explanation) -> RenderableType:
    """For people: what decided each word, then the training text behind retrieval's words."""
    words = words_of(explanation)
    shaded, place = Text(explanation.text), 0
    for word in words:
        place = explanation.text.index(word.text, place)
        style = CHANGED if word.is_retrieved else SUPPORTED if word.knn_share > 0.5 else ""
        shaded.stylize(style, place, place + len(word.text))
        place += len(word.text)
    decided = [
        _words(explanation.text, [token for word in group for token in word.tokens])
        for pair, group in groupby(words, _decisive_pair)
        if pair is not None
    ]
    parts: list[RenderableType] = [Text(source, "bold"), shaded, "", _table_of(words)]
    if decided:
        parts += ["", Text("Words that retrieval changed, and the training text they come from:")]
        parts += [_pairs_of(each, explanation) for each in decided]
    elif explanation.pairs:
        parts += ["", Text("The model alone would have chosen the same words.")]
    return Group(*parts)


def _decisive_pair(word: Words) -> int | None:
    """The pair of sentences that decided a word, if retrieval did."""
    return word.decided_by[0][0] if word.is_retrieved and word.decided_by else None


def _table_of(words: Iterable[Words]) -> Table:
    """A row for each word: products of its tokens' probabilities, means of λ and of the shares."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("word", no_wrap=True, max_width=30)
    for name in ("p_NMT", "λ", "p_kNN", "retrieval"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for word in words:
        nmt = math.prod(token.nmt_prob for token in word.tokens)
        knn = math.prod(token.knn_prob for token in word.tokens)
        weight = sum(token.knn_weight for token in word.tokens) / len(word.tokens)
        share = word.knn_share
        table.add_row(
            Text(word.text),
            *(f"{nmt:.3f}", f"{weight:.2f}", f"{knn:.3f}", f"{100 * share:.0f} %"),
            "█" * round(BAR * share),
        )
    return table


def _pairs_of(words: Words, explanation: Explanation) -> RenderableType:
    """Some words and the pairs of sentences that they come from."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(justify="right", no_wrap=True, min_width=7)
    grid.add_column()
    ranked = words.decided_by
    for sentence, part in ranked[:SHOWN_PAIRS]:
        source, target = explanation.pairs[sentence]
        grid.add_row(f"{100 * part:.0f} %", Text(source))
        grid.add_row("", _marked(target, words, sentence))
    others = ranked[SHOWN_PAIRS:]
    if others:
        part = sum(part for _, part in others)
        grid.add_row(
            f"{100 * part:.0f} %",
            f"{len(others)} more pairs" if len(others) > 1 else "one more pair",
        )
    replaced = [token.instead_of for token in words.tokens if token.instead_of]
    instead = f"   (the model alone: {', '.join(replaced)})" if replaced else ""
    return Group("", Text.assemble((words.text, "bold"), instead), grid)


def _marked(target: str, words: Words, sentence: int) -> Text:
    """A pair's target with the words in brackets that decided."""
    spans = sorted(
        neighbour.span
        for token in words.tokens
        for neighbour in token.neighbours
        if neighbour.sentence == sentence and neighbour.share > 0.0 and neighbour.span
    )
    merged: list[tuple[int, int]] = []
    for start, end in spans:
        if merged and not target[merged[-1][1] : start].strip():
            start, end = merged[-1][0], max(merged.pop()[1], end)
        merged.append((start, end))
    marked, place = Text(), 0
    for start, end in merged:
        marked.append(target[place:start])
        marked.append(f"[{target[start:end]}]", "bold")
        place = end
    return marked.append(target[place:])
