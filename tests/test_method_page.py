"""docs/method.md: its numbers are those that docs/method_example.py prints, and its links lead somewhere."""

import ast
import contextlib
import io
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "method.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"\d+(?:\.\d+)?")


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> tuple[str, Path]:
    """What the example prints, and the picture that it draws."""
    picture = tmp_path_factory.mktemp("method") / "example.png"
    printed, script = io.StringIO(), runpy.run_path(str(DOCS / "method_example.py"))
    with contextlib.redirect_stdout(printed):
        script["main"](picture)
    return printed.getvalue(), picture


def test_the_page_shows_what_the_example_prints(example):
    """Word for word; a decimal may be off by one in its last place."""
    (shown,) = re.findall(r"```text\n(.*?)\n```", PAGE, re.DOTALL)
    printed, _ = example
    assert NUMBER.sub("#", shown).split() == NUMBER.sub("#", printed).split()
    numbers = list(zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=True))
    assert len(numbers) > 80
    for on_page, now in numbers:
        places = len(on_page.partition(".")[2])
        assert len(now.partition(".")[2]) == places
        assert abs(float(on_page) - float(now)) <= (1.01 * 10**-places if places else 0), (on_page, now)


def test_decimals_around_the_example_are_in_it():
    section = PAGE.partition("## One step of the embedded model")[2]
    before, shown, after = re.split(r"```(?:text)?\n", section)
    decimals = re.findall(r"\d+\.\d+", before + after)
    assert decimals and set(decimals) <= {"0.8", *re.findall(r"\d+\.\d+", shown)}


def test_the_picture_is_the_example_s(example):
    stored, drawn = (np.asarray(Image.open(path), float) for path in (DOCS / "method-example.png", example[1]))
    assert stored.shape == drawn.shape and abs(stored - drawn).mean() < 1  # of 255; fonts may differ a little


def test_the_page_has_six_equations_and_every_link_leads_somewhere():
    assert re.findall(r"\\qquad \((\d)\)\n\$\$", PAGE) == list("123456") and PAGE.count("$$") == 12
    links = re.findall(r"\[(`?)([^\]]*?)`?\]\(([^)#:]+)\)", PAGE)
    assert len(links) > 10
    for is_code, text, target in links:
        path = DOCS / target
        assert path.is_file(), target
        if is_code:
            names = {
                ".".join([*outer, node.name])
                for outer, body in bodies(ast.parse(path.read_text(encoding="utf-8")))
                for node in body
                if isinstance(node, ast.FunctionDef | ast.ClassDef)
            }
            assert text in names, (text, target)


def bodies(tree: ast.Module) -> list[tuple[tuple[str, ...], list[ast.stmt]]]:
    """The module's statements and those of every class in it, with the names that lead there."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return [((), tree.body), *(((node.name,), node.body) for node in classes)]
