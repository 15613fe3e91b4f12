"""docs/api.md says what the docstrings say now, of every public name."""

import importlib.util
import inspect
from pathlib import Path

import scfg

DOCS = Path(__file__).parent.parent / "docs"


def test_the_page_is_what_the_docstrings_say_now():
    spec = importlib.util.spec_from_file_location("make_api", DOCS / "make_api.py")
    make_api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_api)
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    assert page == make_api.page(), "run: python docs/make_api.py"
    listed = {name for names in make_api.GROUPS.values() for name in names.split()}
    assert listed == set(scfg.__all__) and all(f"### {name}\n" in page for name in listed)


def test_every_public_name_has_a_docstring_of_its_own():
    for name in scfg.__all__:
        value = getattr(scfg, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            told = value.__doc__ or ""
            assert told and not told.startswith(f"{name}("), name  # which dataclasses and NamedTuples make up
