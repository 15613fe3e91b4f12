"""The promises about the code itself: its size, its layout, its wings."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import scfg

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "scfg"
sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
BESIDE = ("checks", "cpu", "data", "memory", "resize")  # modules that the spine hands on to, as it does to wings
SPINE = [path for path in sorted(PACKAGE.glob("*.py")) if path.stem not in BESIDE]
WINGS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
OURS = [*sorted(PACKAGE.rglob("*.py")), ROOT / "sample.py", *sorted((ROOT / "weights").glob("*.py"))]

# What a wing may import of other wings: the command puts all together, the evaluation measures the others.
ALLOWED = {"cli": set(WINGS), "evaluate": {"flatland", "formats", "methods", "regional"}}
# Where the spine hands something on to a wing, inside a function and only when it is met.
HANDED_ON = {("checkpoint", "data"), ("checkpoint", "formats"), ("diffusion", "data")}
HANDED_ON |= {("diffusion", "gpu"), ("diffusion", "memory"), ("diffusion", "methods"), ("text", "formats")}
HANDED_ON |= {(module, "checks") for module in ("diffusion", "guidance", "text")} | {("unet", "resize")}


def code_lines(path: Path) -> int:
    """Lines that are not blank, comments or docstrings."""
    text = path.read_text()
    code = {i for i, line in enumerate(text.splitlines(), 1) if line.strip() and not line.strip().startswith("#")}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            code -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(code)


def test_files_are_as_ruff_formats_them_at_120_columns():
    """So that lines can be counted as they are."""
    assert "line-length = 120" in (ROOT / "pyproject.toml").read_text()
    assert subprocess.run([sys.executable, "-m", "ruff", "format", "--check", *OURS], cwd=ROOT).returncode == 0
    wide = [
        f"{path}:{i}" for path in OURS for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 120
    ]
    assert not wide


def test_the_spine_can_be_held_in_mind():
    """At most 1,570 code lines."""
    assert len(SPINE) == 13 and sum(map(code_lines, SPINE)) <= 1570
    assert len((ROOT / "sample.py").read_text().splitlines()) <= 90


def test_no_file_of_a_wing_is_over_300_code_lines():
    files = [path for path in PACKAGE.rglob("*.py") if path not in SPINE]
    assert len(files) > 30 and not [path for path in files if code_lines(path) > 300]


def test_functions_are_of_one_thought():
    """At most 40 lines and 8 parameters, self not counted."""
    found = []
    for path in OURS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                count = len([name for name in arguments if name not in ("self", "cls")])
                found.append((path.name, node.name, node.end_lineno - node.lineno + 1, count, node.args.kwarg))
    assert len(found) > 200
    assert not [one for one in found if one[2] > 40 or one[3] > 8 or one[4]]


def imports(path: Path) -> set[tuple[str, bool]]:
    """The spine modules and wings that a file of the package imports; and whether at the top of the file."""
    found, tree = set(), ast.parse(path.read_text())
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    here = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level]
            names = [".".join([*base, node.module])] if node.module else [".".join([*base, n.name]) for n in node.names]
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
        else:
            continue
        found |= {(name.split(".")[1], id(node) not in inside) for name in names if name.startswith("scfg.")}
    return found


def test_the_spine_imports_no_wing_but_where_it_hands_something_on():
    for path in SPINE:
        wings = {(name, top) for name, top in imports(path) if name in (*WINGS, *BESIDE)}
        if path.stem != "__init__":
            assert not [name for name, top in wings if top], path
        assert path.stem == "__init__" or {(path.stem, name) for name, _ in wings} <= HANDED_ON
    handed = {(path.stem, name) for path in SPINE for name, top in imports(path) if not top}
    assert handed == HANDED_ON


def test_wings_import_the_spine_and_no_other_wing():
    assert {"cli", "edit", "evaluate", "flatland", "formats", "methods", "prompting", "regional", "report"} <= set(
        WINGS
    )
    for wing in WINGS:
        others = {name for path in (PACKAGE / wing).rglob("*.py") for name, _ in imports(path) if name in WINGS}
        assert others - {wing} <= ALLOWED.get(wing, set()), wing


def without(wings: list[str], folder: Path) -> Path:
    """A copy of the package without these wings and their lines in scfg/__init__.py, with the tests of the spine."""
    skipped = shutil.ignore_patterns("__pycache__", "run", "parity", "wings", "benchmarks")
    for name in ("scfg", "tests", "weights"):
        shutil.copytree(ROOT / name, folder / name, ignore=skipped)
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    for wing in wings:
        shutil.rmtree(folder / "scfg" / wing)
    spine, marked = (folder / "scfg" / "__init__.py").read_text().split("# wings\n")
    kept = [line for line in marked.splitlines() if not any(re.search(rf"\b{wing}\b", line) for wing in wings)]
    (folder / "scfg" / "__init__.py").write_text(spine + "\n".join(kept) + "\n")
    return folder


def run_in(folder: Path, *words: str) -> subprocess.CompletedProcess:
    # an editable install would find the wings that were deleted
    program = f"""if True:
        import runpy, sys
        sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
        sys.argv = {list(words)!r}
        sys.path.insert(0, {str(folder)!r})
        runpy.run_module({words[0]!r}, run_name="__main__", alter_sys=True)"""
    return subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("wing", WINGS)
@pytest.mark.slow
def test_without_a_wing_the_rest_can_be_imported_and_makes_a_picture(wing, tmp_path):
    folder = without([wing], tmp_path / "copy")
    program = tmp_path / "copy" / "program.py"
    program.write_text(
        "import scfg; print(scfg.__file__, [*scfg.load().sample('a red car on grass', steps=1)][0].index)\n"
    )
    done = run_in(folder, "program")
    assert done.returncode == 0 and str(folder) in done.stdout, done.stderr
    done = run_in(folder, "pytest", "tests/spine", "--collect-only", "-q")
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_without_any_wing_the_tests_of_the_spine_pass(tmp_path):
    folder = without(WINGS, tmp_path / "copy")
    (folder / "scfg" / "cpu.py").unlink()
    done = run_in(folder, "pytest", "tests/spine", "-q", "-x")
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_denoise_step_visits_few_files_and_functions():
    from calls import calls_of_a_step

    found, depth = calls_of_a_step()
    assert set(found) == {"denoise.py", "unet.py", "segment.py", "guidance.py", "schedule.py", "text.py"}
    assert found.total() <= 250 and depth <= 8


def test_modules_are_not_hidden_by_functions_of_their_names():
    for path in SPINE:
        if path.stem != "__init__":
            assert sys.modules[f"scfg.{path.stem}"] is getattr(scfg, path.stem)


@pytest.mark.slow
def test_an_installed_wheel_makes_the_same_picture_away_from_the_source(tmp_path, flat):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    ignored = shutil.ignore_patterns(".*", "run", "tests", "build", "*.egg-info")
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=ignored)
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "installed", wheel], check=True)
    shutil.rmtree(source)
    for wing in WINGS:
        assert (tmp_path / "installed" / "scfg" / wing / "__init__.py").exists()
    program = """if True:
        import scfg, torch
        model = scfg.load()
        *_, step = model.sample(model.prompt("a red car on grass"), scfg.SCFG(5.0), steps=3)
        torch.save((scfg.__file__, step.latent), "made.pt")"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)
    shutil.copy(ROOT / "sample.py", tmp_path)
    command = [sys.executable, "sample.py", "a red car on grass", "--steps", "2"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    where, latent = torch.load(tmp_path / "made.pt")
    *_, step = flat.sample(flat.prompt("a red car on grass"), scfg.SCFG(5.0), steps=3)
    assert str(tmp_path) in where and (latent - step.latent).abs().max() < 1e-5
