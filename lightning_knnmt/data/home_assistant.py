"""Parallel text from the translations of Home Assistant's interface.

Strings are paired by component and key. White space collapses to single spaces. Strings with
``{placeholders}`` or Markdown emphasis are kept, since a translator must copy them. Dropped are
strings that are empty on one side, the same on both, contain ``<tags>`` or a web address, or have
letters for less than half of their characters. A hash of its name assigns a whole component to one
split, so that near-identical strings of a component do not leak from train to test. Valid and test
take only a few lines of each component, because one large component would otherwise be a third of
them; the rest of these components is not used. Pairs whose source, ignoring case, is in valid or
test are removed from train, and those in test from valid.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

HELD_OUT = 1_000  # lines of valid and of test
HELD_OUT_SHARE = 0.08  # of the components, for valid and for test
MOST_OF_A_COMPONENT = 50  # lines in valid or test
_TAG = re.compile(r"<[^>]*>")
_WEB_ADDRESS = re.compile(r"https?://|www\.", re.IGNORECASE)

Pair = tuple[str, str]


def component_pairs(
    archive: zipfile.ZipFile, source_lang: str, target_lang: str
) -> dict[str, list[Pair]]:
    """The usable pairs of each component, in the order of its source file."""
    names = set(archive.namelist())
    components = {}
    for member in sorted(names):
        path = PurePosixPath(member)
        target = str(path.with_name(f"{target_lang}.json"))
        if not path.match(f"homeassistant/components/*/translations/{source_lang}.json"):
            continue
        if target in names:
            targets = dict(_strings(json.loads(archive.read(target))))
            pairs = (
                (" ".join(source.split()), " ".join(targets[key].split()))
                for key, source in _strings(json.loads(archive.read(member)))
                if key in targets
            )
            components[path.parts[2]] = [pair for pair in pairs if _is_usable(*pair)]
    return components


def _strings(node: Any, key: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(node, dict):
        for name, child in node.items():
            yield from _strings(child, (*key, name))
    elif isinstance(node, str):
        yield key, node


def _is_usable(source: str, target: str) -> bool:
    if not source or not target or source == target:
        return False
    both = f"{source}\n{target}"
    if _TAG.search(both) or _WEB_ADDRESS.search(both):
        return False
    return all(2 * sum(map(str.isalpha, side)) >= len(side) for side in (source, target))


def split_by_component(components: dict[str, list[Pair]]) -> dict[str, list[Pair]]:
    """The pairs of test, valid and train; no component is in two of them."""
    buckets: dict[str, list[str]] = {"test": [], "valid": [], "train": []}
    for name in sorted(components, key=_hash):
        share = int.from_bytes(_hash(name)[:4], "big") / 2**32
        held_out = "test" if share < HELD_OUT_SHARE else "valid"
        buckets[held_out if share < 2 * HELD_OUT_SHARE else "train"].append(name)
    taken: set[str] = set()
    splits = {}
    for split in ("test", "valid"):
        pairs = _draw([components[name] for name in buckets[split]], taken)
        splits[split] = pairs
        taken.update(source.casefold() for source, _ in pairs)
    remaining = (pair for name in buckets["train"] for pair in components[name])
    splits["train"] = list(dict.fromkeys(p for p in remaining if p[0].casefold() not in taken))
    return splits


def _draw(components: list[list[Pair]], taken: set[str]) -> list[Pair]:
    """Held-out lines of some components: a few of each, in hash order, one per source."""
    drawn: dict[str, Pair] = {}
    for pairs in components:
        fresh = {
            pair[0].casefold(): pair
            for pair in sorted(pairs, key=lambda pair: _hash(pair[0]), reverse=True)
            if pair[0].casefold() not in taken and pair[0].casefold() not in drawn
        }
        drawn.update(list(fresh.items())[:MOST_OF_A_COMPONENT])
    return sorted(drawn.values(), key=lambda pair: _hash(pair[0]))[:HELD_OUT]


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
