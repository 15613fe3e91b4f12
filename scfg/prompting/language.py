"""The WebUI's rules for what a prompt says at every step: `[from:to:when]`, `[a|b]`, AND, and tags."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

Piece: TypeAlias = "str | Group | Switch | Alternation"
TOKEN = re.compile(r"\\[^\n]|[^\\()\[\]:|]+|.", re.DOTALL)
WHEN = re.compile(r"\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*")
WEIGHT = re.compile(r"\s*([+-]?(?:\d+\.?|\d*\.\d+))\s*")
CLOSING = {"(": ")", "[": "]"}
TAG = re.compile(r"<\w+:[^<>]+>")


@dataclass
class Group:
    """Brackets that stay in the text, and what is in them."""

    pieces: list[Piece]

    def chosen(self, step: int, steps: int) -> list[Piece]:
        return self.pieces


@dataclass
class Switch:
    """`[from:to:when]`."""

    before: list[Piece]
    after: list[Piece]
    when: str

    def last(self, steps: int) -> int:
        """The last step at which the former text counts: a number of steps or, with a point, a share of them."""
        share = steps if "." in self.when else 1
        return int(max(-1.0, min(float(self.when) * share, steps)))

    def chosen(self, step: int, steps: int) -> list[Piece]:
        return self.before if step <= self.last(steps) else self.after


@dataclass
class Alternation:
    """`[a|b|c]`."""

    items: list[list[Piece]]

    def chosen(self, step: int, steps: int) -> list[Piece]:
        return self.items[(step - 1) % len(self.items)]


@dataclass
class Open:
    """A bracket that is not closed yet, with what follows it, between the marks : and |."""

    bracket: str
    fields: list[list[Piece]] = field(default_factory=lambda: [[]])
    marks: list[str] = field(default_factory=list)

    def as_text(self) -> list[Piece]:
        found: list[Piece] = [self.bracket, *self.fields[0]]
        for mark, pieces in zip(self.marks, self.fields[1:]):
            found += [mark, *pieces]
        return found

    def closed(self) -> Piece | None:
        """What it is with its closing bracket; None: only text."""
        kinds, last = set(self.marks), self.fields[-1]
        if not kinds or (self.bracket == "(" and self.marks == [":"]):
            return Group([*self.as_text(), CLOSING[self.bracket]])
        if self.bracket == "[" and kinds == {"|"}:
            return Alternation(self.fields)
        timed = all(isinstance(piece, str) for piece in last) and WHEN.fullmatch("".join(map(str, last)))
        if self.bracket == "[" and kinds == {":"} and len(self.fields) <= 3 and timed:
            *before, after = self.fields[:-1]
            return Switch(before[0] if before else [], after, timed[1])
        return None


def parse(text: str) -> list[Piece]:
    """The pieces of a text, in one pass.

    Brackets that do not parse are text, and so are all that they are in; a | outside an alternation makes all text.
    """
    stack = [Open("")]

    def give_up(more: str) -> None:
        """What is open is text, since what is in it does not parse."""
        for one in stack[1:]:
            stack[0].fields[0] += one.as_text()
            stack[0].marks += [mark for mark in one.marks if mark == "|"]
        del stack[1:]
        stack[0].fields[0].append(more)

    for found in TOKEN.finditer(text):
        token, top = found[0], stack[-1]
        if token == "\\" or (token == "|" and len(stack) == 1):
            return [text]
        if token in CLOSING:
            stack.append(Open(token))
        elif token in (":", "|") and len(stack) > 1:
            top.marks.append(token)
            top.fields.append([])
        elif token in CLOSING.values():
            closed = top.closed() if CLOSING.get(top.bracket) == token else None
            if closed is None:
                give_up(token)
            else:
                stack.pop()
                stack[-1].fields[-1].append(closed)
        else:
            top.fields[-1].append(token)
    give_up("")
    return [text] if stack[0].marks else stack[0].fields[0]


def dynamic(pieces: Sequence[Piece]) -> tuple[list[Switch], bool]:
    """Every switch in them, however deep, and whether there is an alternation."""
    todo, switches, alternates = [*pieces], [], False
    while todo:
        piece = todo.pop()
        if isinstance(piece, Switch):
            switches.append(piece)
            todo += piece.before + piece.after
        elif isinstance(piece, Alternation):
            alternates = True
            todo += [inner for item in piece.items for inner in item]
        elif isinstance(piece, Group):
            todo += piece.pieces
    return switches, alternates


def changes(text: str) -> bool:
    """Whether a text is another from step to step."""
    switches, alternates = dynamic(parse(text))
    return bool(switches) or alternates


def text_at(pieces: Sequence[Piece], step: int, steps: int) -> str:
    """What pieces say at a step, 1 to steps."""
    todo, texts = [*reversed(pieces)], []
    while todo:
        piece = todo.pop()
        if isinstance(piece, str):
            texts.append(piece)
        else:
            todo += reversed(piece.chosen(step, steps))
    return "".join(texts)


def schedule(text: str, steps: int) -> list[tuple[int, str]]:
    """The texts of a run in order, each with the last of its steps, 1 to steps."""
    pieces = parse(text)
    switches, alternates = dynamic(pieces)
    lasts = {switch.last(steps) for switch in switches} | {steps} | (set(range(1, steps)) if alternates else set())
    return [(last, text_at(pieces, last, steps)) for last in sorted(lasts) if last > 0]


def sub_prompts(text: str) -> list[tuple[str, float]]:
    """The prompts that AND joins, and their weights, which follow a last colon."""
    found = []
    for piece in re.split(r"\bAND\b", text):
        own, _, last = piece.rpartition(":")
        weight = WEIGHT.fullmatch(last) if own or piece.startswith(":") else None
        found.append((own.rstrip(), float(weight[1])) if weight else (piece.rstrip(), 1.0))
    return found


def without_tags(text: str) -> tuple[str, list[str]]:
    """A text without its tags such as `<lora:name:0.8>`, and these."""
    return TAG.sub("", text), TAG.findall(text)
