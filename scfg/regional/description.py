"""Areas as text."""

import re
from dataclasses import dataclass

from ..errors import BadInput
from .area import Area, Words, foreground, is_picture, mask, words

TOKENS = re.compile(
    r"""'(?:\\.|[^\\'])*'|"(?:\\.|[^\\"])*"|[|&~(),]|[^\s|&~(),'"][^\s|&~(),]*(?:\s+[^\s|&~(),'"][^\s|&~(),]*)*|\s+"""
)
SIGNS, END = set("|&~(),"), "the end"
LONGEST, MOST_TIMES = 10_000, 1000  # characters of a description; times that an area is feathered


def parse_area(text: str) -> Area:
    """The area of a description: words of the prompt, a picture file or foreground, and what | & ~ ( ) make of them.

    | binds loosest, ~ tightest. Quotes hold what contains such signs. Calls say the rest: words(PHRASE, soft,
    against_all), with either flag or both, mask(FILE) and feathered(AREA, TIMES).
    """
    if not isinstance(text, str):
        raise BadInput(f"an area's description is text, not {text!r}")
    tokens = TOKENS.findall(text[: LONGEST + 1])
    if "".join(tokens) != text or len(text) > LONGEST:
        raise BadInput(f"{shortened(text)} is no area: a quote is not closed, or it is too long")
    reader = Reader([token for token in tokens if token.strip()], text)
    try:
        area = reader.union()
        reader.expect(END)
    except RecursionError:
        raise BadInput(f"{shortened(text)} is no area: it is nested too deep") from None
    return area


def shortened(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:80] + "...")


def unquoted(token: str) -> str:
    return re.sub(r"\\(.)", r"\1", token[1:-1]) if token[0] in "'\"" else token


@dataclass
class Reader:
    """Reads a description's tokens from left to right."""

    tokens: list[str]
    text: str

    def next(self, ahead: int = 0) -> str:
        return self.tokens[ahead] if ahead < len(self.tokens) else END

    def take(self) -> str:
        return self.tokens.pop(0) if self.tokens else END

    def wrong(self, what: str) -> BadInput:
        return BadInput(f"{shortened(self.text)} is no area: {what}")

    def expect(self, token: str) -> None:
        found = self.take()
        if found != token:
            hint = "; put a phrase with commas in quotes" if found == "," else ""
            raise self.wrong(f"{found} stands where {token} should{hint}")

    def union(self) -> Area:
        area = self.intersection()
        while self.next() == "|":
            self.take()
            area = area | self.intersection()
        return area

    def intersection(self) -> Area:
        area = self.single()
        while self.next() == "&":
            self.take()
            area = area & self.single()
        return area

    def single(self) -> Area:
        call = {"words": self.words, "mask": self.mask, "feathered": self.feathered}.get(self.next())
        token = self.take()
        if token == "~":
            return ~self.single()
        if token == "(":
            area = self.union()
        elif call and self.next() == "(":
            self.take()
            area = call()
        else:
            name = self.name(token)
            return mask(name) if is_picture(name) else foreground() if token == "foreground" else words(name)
        self.expect(")")
        return area

    def name(self, token: str) -> str:
        """A phrase or a file's name."""
        if token in SIGNS or token == END:
            what = "it is made of words of the prompt, picture files or foreground, and of | & ~ ( )"
            raise self.wrong(f"{what}; one is missing before {token}")
        return unquoted(token)

    def words(self) -> Words:
        phrase, flags = self.name(self.take()), set()
        while self.next() == ",":
            self.take()
            flags.add(self.take())
        if not flags <= {"soft", "against_all"}:
            raise self.wrong("words(PHRASE) may have soft and against_all after the phrase")
        return words(phrase, "soft" in flags, "against_all" in flags)

    def mask(self) -> Area:
        return mask(self.name(self.take()))

    def feathered(self) -> Area:
        area = self.union()
        self.expect(",")
        times = self.take()
        if not (times.isascii() and times.isdigit() and int(times) <= MOST_TIMES):
            raise self.wrong(f"it is feathered(AREA, TIMES), up to {MOST_TIMES} times")
        return area.feathered(int(times))
