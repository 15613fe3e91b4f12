"""README.md: short, and what it shows works."""

import contextlib
import io
import re
from pathlib import Path

import scfg

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_has_at_most_a_thousand_words():
    assert len(README.split()) <= 1000


def test_its_ten_lines_of_python_run():
    code, _ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    shown, names = io.StringIO(), {}
    with contextlib.redirect_stdout(shown):
        exec(code.replace("steps=30", "steps=2"), names)
    assert len(code.strip().splitlines()) <= 11 and len(shown.getvalue().splitlines()) == 2 + 10
    assert names["pictures"].shape == (2, 3, 64, 64)


def test_the_step_that_it_quotes_is_the_one_in_the_source():
    """Every expression of the quoted lines stands in denoise.py."""
    _, code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    source = (ROOT / "scfg" / "denoise.py").read_text(encoding="utf-8")
    lines = [line.strip() for line in code.strip().splitlines()[1:]]
    assert len(lines) == 8
    exact = [line for line in lines if line in source]
    assert len(exact) >= 3
    for line in lines:
        assert all(f"{called}(" in source for called in re.findall(r"([\w.]+)\(", line)), line


def test_files_and_names_that_it_links_exist():
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
    for file, text in re.findall(r"\[(\w+\.py)\]\(scfg/\w+\.py\) \| ([^|]+) \|", README):
        source = (ROOT / "scfg" / file).read_text(encoding="utf-8")
        for name in re.findall(r"`([\w.]+)`", text):
            assert all(re.search(rf"(class|def) {part}\b", source) for part in name.split(".")), name
    for name in re.findall(r"`([A-Z]\w+)`", README.split("## Guidance")[1].split("## Regions")[0]):
        assert hasattr(scfg, name), name
