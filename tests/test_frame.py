"""The promises about the code itself."""
import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import scfg

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
OURS = [*sorted((ROOT / "scfg").rglob("*.py")), ROOT / "sample.py", ROOT / "weights" / "train.py"]


def test_a_denoise_step_visits_few_files_and_functions():
    from calls import calls_of_a_step
    found = calls_of_a_step()
    assert set(found) == {"diffusion.py", "unet.py", "segment.py", "guidance.py", "noise.py", "layers.py"}
    assert found.total() <= 400


def test_no_function_is_over_40_lines():
    functions = [(path.name, node.name, node.end_lineno - node.lineno + 1) for path in OURS
                 for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    assert len(functions) > 80 and not [found for found in functions if found[2] > 40]


def test_the_core_stays_small():
    def code_lines(path: Path) -> int:
        """Lines that are not blank, comments or docstrings."""
        text = path.read_text()
        code = {i for i, line in enumerate(text.splitlines(), 1) if line.strip() and not line.strip().startswith("#")}
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                code -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        return len(code)
    core = [path for path in OURS if path.parent.name == "scfg" and path.stem not in ("flatland", "report")]
    assert sum(map(code_lines, core)) < 1700


def test_an_installed_wheel_makes_the_same_picture_away_from_the_source(tmp_path, flat):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(".*", "run", "tests", "build", "*.egg-info"))
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source], check=True)
    wheel, = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "installed", wheel], check=True)
    shutil.rmtree(source)
    program = """if True:
        import scfg, torch
        model = scfg.load()
        *_, step = model.sample(model.prompt("a red car on grass"), scfg.SCFG(5.0), steps=3)
        torch.save((scfg.__file__, step.latent), "made.pt")"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")}, check=True)
    where, latent = torch.load(tmp_path / "made.pt")
    *_, step = flat.sample(flat.prompt("a red car on grass"), scfg.SCFG(5.0), steps=3)
    assert str(tmp_path) in where and (latent - step.latent).abs().max() < 1e-5
