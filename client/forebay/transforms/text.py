"""Text cleaned on its way to the trainer: case, punctuation, stop words, tags and addresses."""

from __future__ import annotations

import html
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Final, Literal

from forebay.dataset.transforms import Batch
from forebay.transforms.columns import texts_of
from forebay_wire.errors import InvalidRequest

_STOP_WORDS: Final = """
a about above after again against all also am an and any are as at be because been before being
below between both but by can cannot could did do does doing down during each few for from
further had has have having he her here hers herself him himself his how i if in into is it its
itself just may me might more most must my myself no nor not now of off on once only or other
our ours ourselves out over own same shall she should so some such than that the their theirs
them themselves then there these they this those through to too under until up upon us very was
we were what when where which while who whom whose why will with would you your yours yourself
yourselves arent cant couldnt didnt doesnt dont hadnt hasnt havent hes im ive isnt lets shes
shouldnt thats theres theyre wasnt werent wont wouldnt youre
"""

STOP_WORDS: Final = frozenset(_STOP_WORDS.split())
"""English words that say little of what a text is about."""

URL: Final = re.compile(r"\b(?:https?|ftp)://\S+|\bwww\.\S+", re.IGNORECASE)
ADDRESS: Final = re.compile(r"(?<!\S)[^\s@]+@[^\s@]+(?!\S)")
TAG: Final = re.compile(r"</?[a-zA-Z][^<>]*>|<![^<>]*>")
BLOCK_START: Final = re.compile(r"<!--|<(script|style)\b[^<>]*>", re.IGNORECASE)
APOSTROPHES: Final = "'’`\N{MODIFIER LETTER APOSTROPHE}\N{FULLWIDTH APOSTROPHE}\N{ACUTE ACCENT}"

Step = Callable[[str], str]


class CleanText:
    """See :func:`clean_text`. Thread-safe; picklable if its steps are."""

    def __init__(
        self, column: str, steps: Sequence[str | Step], stop_words: Iterable[str] | str | None
    ) -> None:
        self.column = column
        self.steps = tuple(_step(step) for step in steps)
        if isinstance(stop_words, str):
            if stop_words != "english":
                raise InvalidRequest(f'stop_words={stop_words!r}: "english", or the words')
            stop_words = STOP_WORDS
        self.stop_words = frozenset(_plain(word) for word in stop_words or ())

    def __call__(self, batch: Batch) -> Batch:
        texts = texts_of(batch, self.column, "clean_text")
        cleaned = [None if text is None else self.clean(text) for text in texts]
        return {**batch, self.column: cleaned}

    def clean(self, text: str) -> str:
        """One text."""
        for step in self.steps:
            text = step(text)
        if self.stop_words:
            words = [word for word in text.split() if _plain(word) not in self.stop_words]
            text = " ".join(words)
        return text


def clean_text(
    column: str,
    steps: Sequence[str | Step] = ("html", "urls", "unicode", "case", "punctuation", "whitespace"),
    *,
    stop_words: Iterable[str] | Literal["english"] | None = None,
) -> CleanText:
    """A ``transform=`` that cleans the text in *column*, by *steps* in the given order:

    "html" (tags, comments, scripts and styles become spaces, ``&amp;`` a ``&``), "urls" (web and
    mail addresses go), "unicode" (NFKC), "accents" (accents go: é is e), "case" (lower, as of
    ``str.casefold``), "punctuation" (punctuation and symbols become spaces, apostrophes go),
    "digits" (each number becomes 0), "whitespace" (one space each, none at the ends), or any
    function of a text. In the end the *stop_words* go, whatever their case: "english" is
    ``forebay.transforms.STOP_WORDS``; words are then one space apart.
    """
    return CleanText(column, steps, stop_words)


def _step(step: str | Step) -> Step:
    if callable(step):
        return step
    if step not in STEPS:
        raise InvalidRequest(f"step {step!r}: a function, or one of {', '.join(STEPS)}")
    return STEPS[step]


def strip_html(text: str) -> str:
    """Without tags, comments, scripts and styles; entities as what they stand for."""
    if "<" in text:
        text = TAG.sub(" ", _without_blocks(text))
    return html.unescape(text)


def _without_blocks(text: str) -> str:
    """Without comments, scripts and styles. One that does not end is left alone. O(length)."""
    kept = []
    position = 0
    unclosed: set[str] = set()
    for start in BLOCK_START.finditer(text):
        name = (start[1] or "").lower()
        if start.start() < position or name in unclosed:
            continue
        end = _END[name].search(text, start.end())
        if end is None:
            unclosed.add(name)
            continue
        kept += [text[position : start.start()], " "]
        position = end.end()
    return "".join((*kept, text[position:]))


_END: Final = {
    "": re.compile("-->"),
    "script": re.compile(r"</script\s*>", re.IGNORECASE),
    "style": re.compile(r"</style\s*>", re.IGNORECASE),
}


def strip_urls(text: str) -> str:
    """Without web and mail addresses."""
    return ADDRESS.sub(" ", URL.sub(" ", text))


def normalize_unicode(text: str) -> str:
    """In normal form KC: one way to write what looks alike."""
    return unicodedata.normalize("NFKC", text)


def strip_accents(text: str) -> str:
    """Without marks on letters."""
    apart = unicodedata.normalize("NFD", text)
    return unicodedata.normalize(
        "NFC", "".join(c for c in apart if unicodedata.category(c) != "Mn")
    )


def strip_punctuation(text: str) -> str:
    """Spaces for punctuation and symbols; nothing for apostrophes."""
    return text.translate(_punctuation())


@cache
def _punctuation() -> dict[int, str]:
    table = {
        code: " "
        for code in range(sys.maxunicode + 1)
        if unicodedata.category(chr(code))[0] in "PS"
    }
    return table | dict.fromkeys(map(ord, APOSTROPHES), "")


def mask_digits(text: str) -> str:
    """0 for each number."""
    return re.sub(r"\d+", "0", text)


def collapse_whitespace(text: str) -> str:
    """One space between words, none at the ends."""
    return " ".join(text.split())


def _plain(word: str) -> str:
    return "".join(c for c in word.casefold() if c not in APOSTROPHES)


STEPS: Final[dict[str, Step]] = {
    "html": strip_html,
    "urls": strip_urls,
    "unicode": normalize_unicode,
    "accents": strip_accents,
    "case": str.casefold,
    "punctuation": strip_punctuation,
    "digits": mask_digits,
    "whitespace": collapse_whitespace,
}
