"""Words as the pieces that a published BERT knows, with labels for the first piece of each.

What a tokenizer of WordPieces cannot take apart becomes one unknown token, however long: here such
a part is taken character by character, and characters that the tokenizer lacks may be added to it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tokenizers import Tokenizer

from forebay_wire.errors import InvalidRequest

NO_LABEL: Final = -1
"""Of a piece that has none: all but the first of a word, and the tokens around a sentence."""

CONTINUES: Final = "##"


@dataclass(frozen=True)
class Encoded:
    """A sentence, or a part of one, between ``[CLS]`` and ``[SEP]``."""

    tokens: list[int]
    labels: list[int]
    """As many."""


class WordPieces:
    """A tokenizer with added characters, which get the numbers behind its own vocabulary."""

    def __init__(self, tokenizer: str, characters: Sequence[str] = ()) -> None:
        """*tokenizer*: JSON, as the package ``tokenizers`` writes it."""
        self._tokenizer: Any = Tokenizer.from_str(tokenizer)
        self._known: Mapping[str, int] = self._tokenizer.get_vocab()
        self.vocabulary_size = max(self._known.values()) + 1
        """Without the added characters."""
        self._added = {each: self.vocabulary_size + n for n, each in enumerate(characters)}
        self.unknown = self._known["[UNK]"]
        self.first = self._known["[CLS]"]
        self.last = self._known["[SEP]"]

    def pieces(self, word: str) -> list[int]:
        """At least one: a word of which the tokenizer's spelling leaves nothing is unknown."""
        found: list[int] = []
        for part in self._parts(word):
            tokens = [token.id for token in self._tokenizer.model.tokenize(part)]
            if tokens == [self.unknown]:
                tokens = [self._character(each, place) for place, each in enumerate(part)]
            found += tokens
        return found or [self.unknown]

    def unknown_characters(self, words: Iterable[str]) -> Counter[str]:
        """How often each character occurs that is an unknown token."""
        found: Counter[str] = Counter()
        for word, number in Counter(words).items():
            for part in self._parts(word):
                tokens = [token.id for token in self._tokenizer.model.tokenize(part)]
                if tokens == [self.unknown]:
                    for place, each in enumerate(part):
                        if self._character(each, place) == self.unknown:
                            found[each] += number
        return found

    def encode(self, words: Sequence[str], labels: Sequence[int], limit: int) -> Encoded:
        """*limit*: pieces, the two around the sentence included; a single word that has more
        loses its last ones."""
        tokens, found = [self.first], [NO_LABEL]
        for word, label in zip(words, labels, strict=True):
            pieces = self.pieces(word)[: limit - 2]
            tokens += pieces
            found += [label] + [NO_LABEL] * (len(pieces) - 1)
        return Encoded([*tokens, self.last], [*found, NO_LABEL])

    def _parts(self, word: str) -> list[str]:
        """The word in the tokenizer's spelling, at its punctuation and ideographs."""
        spelled = self._tokenizer.normalizer.normalize_str(word)
        return [part for part, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(spelled)]

    def _character(self, character: str, place: int) -> int:
        continued = self._known.get(CONTINUES + character) if place else None
        if continued is not None:
            return continued
        alone = self._known.get(character, self._known.get(CONTINUES + character))
        return self._added.get(character, self.unknown) if alone is None else alone


def cut(sizes: Sequence[int], tags: Sequence[str], limit: int) -> list[range]:
    """A sentence as consecutive ranges of words, each of at most *limit* pieces, as few as can be.

    *sizes*: pieces of each word; *tags*: in IOB2. It is cut between words and never within an
    entity: InvalidRequest for an entity of several words that is longer than the limit.
    """
    found: list[range] = []
    start, size = 0, 0
    for unit in _units(tags):
        own = sum(min(sizes[word], limit) for word in unit)
        if own > limit:
            raise InvalidRequest(
                f"an entity of {len(unit)} words has {own} pieces, and a sample {limit} at most: "
                "raise prepare.max_tokens"
            )
        if size + own > limit:
            found.append(range(start, unit.start))
            start, size = unit.start, 0
        size += own
    return [*found, range(start, len(tags))] if start < len(tags) else found


def _units(tags: Sequence[str]) -> list[range]:
    """Entities, and words outside of them."""
    starts = [place for place, tag in enumerate(tags) if not tag.startswith("I-")]
    return [range(start, stop) for start, stop in itertools.pairwise([*starts, len(tags)])]
