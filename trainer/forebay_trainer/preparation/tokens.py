"""Texts as numbers of tokens and back: characters, or pieces that the library tokenizers learns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

from forebay_wire.errors import InvalidRequest

if TYPE_CHECKING:
    import tokenizers

UNKNOWN_CHARACTER: Final = "\N{REPLACEMENT CHARACTER}"

SPECIAL: Final = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""The first numbers of `WordPieces`, from 0 (Devlin et al. 2018, section 3)."""

PADDING: Final = SPECIAL.index("[PAD]")
FIRST: Final = SPECIAL.index("[CLS]")
LAST: Final = SPECIAL.index("[SEP]")
MASK: Final = SPECIAL.index("[MASK]")


class Tokens(Protocol):
    """How a text becomes tokens and back."""

    @property
    def size(self) -> int:
        """Of the vocabulary."""

    def about(self) -> dict[str, Any]:
        """JSON of which `tokens_of` makes it again."""

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """The number of each token, and how many characters of the text it stands for."""

    def decode(self, numbers: Sequence[int]) -> str: ...


def tokens_of(about: Mapping[str, Any]) -> Tokens:
    """That of a dataset's metadata."""
    if "characters" in about:
        return Characters(about["characters"])
    if "tokenizer" in about:
        return Pieces(loaded(about["tokenizer"]))
    raise InvalidRequest(
        "the dataset's metadata have no vocabulary; make it by `forebay_trainer prepare`"
    )


class Characters:
    """Number 0 is every character that the vocabulary lacks."""

    def __init__(self, characters: str) -> None:
        self._characters = characters
        self._numbers = {character: number for number, character in enumerate(characters, start=1)}

    @classmethod
    def learn(cls, texts: Iterable[str]) -> Self:
        return cls("".join(sorted({character for text in texts for character in text})))

    @property
    def size(self) -> int:
        return len(self._characters) + 1

    def about(self) -> dict[str, Any]:
        return {"characters": self._characters}

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        return [self._numbers.get(character, 0) for character in text], [1] * len(text)

    def decode(self, numbers: Sequence[int]) -> str:
        return "".join((UNKNOWN_CHARACTER + self._characters)[number] for number in numbers)


class Pieces:
    """Of a tokenizer of the library."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def learn_bytes(cls, texts: Iterable[str], size: int) -> Self:
        """Pairs of bytes, put together in the order of how frequent they are (Sennrich et al. 2016,
        section 3.2; of bytes: Radford et al. 2019, section 2.2). Nothing is unknown to it."""
        library = imported()
        tokenizer = library.Tokenizer(library.models.BPE())
        pieces = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.pre_tokenizer = pieces
        tokenizer.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=size, show_progress=False, initial_alphabet=pieces.alphabet()
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def learn_words(cls, texts: Iterable[str], size: int) -> Self:
        """Words in lower case and parts of them (WordPiece), after the numbers of `SPECIAL`."""
        library = imported()
        tokenizer = library.Tokenizer(library.models.WordPiece(unk_token=SPECIAL[1]))
        tokenizer.normalizer = library.normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = library.decoders.WordPiece()
        trainer = library.trainers.WordPieceTrainer(
            vocab_size=size, show_progress=False, special_tokens=list(SPECIAL)
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @property
    def size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def about(self) -> dict[str, Any]:
        return {"tokenizer": self._tokenizer.to_str()}

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, [end - start for start, end in encoding.offsets]

    def decode(self, numbers: Sequence[int]) -> str:
        return self._tokenizer.decode(list(numbers), skip_special_tokens=False)


def loaded(text: str) -> tokenizers.Tokenizer:
    """A tokenizer of the JSON that the library made of it."""
    return imported().Tokenizer.from_str(text)


def imported() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.normalizers
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as error:
        raise InvalidRequest(
            "learning a vocabulary of pieces needs the package tokenizers: "
            "pip install 'forebay[text]'"
        ) from error
    return tokenizers
