"""The promises about the code itself."""
import ast
import sys
from pathlib import Path

import scfg

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
OURS = [*sorted((ROOT / "scfg").glob("*.py")), ROOT / "sample.py", ROOT / "weights" / "train.py"]


def test_a_denoise_step_visits_few_files_and_functions():
    from calls import calls_of_a_step
    found = calls_of_a_step()
    assert set(found) == {"diffusion.py", "unet.py", "segment.py", "guidance.py", "noise.py"}
    assert found.total() <= 400


def test_no_function_is_over_40_lines():
    functions = [(path.name, node.name, node.end_lineno - node.lineno + 1) for path in OURS
                 for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    assert len(functions) > 80 and not [found for found in functions if found[2] > 40]


def test_the_core_stays_small():
    def code_lines(path: Path) -> int:
        return sum(bool(line.strip()) and not line.strip().startswith("#") for line in path.read_text().splitlines())
    core = [path for path in OURS if path.parent.name == "scfg" and path.stem not in ("flatland", "report")]
    assert sum(map(code_lines, core)) < 1200


def test_everything_public_has_a_docstring_or_commented_fields():
    for name in scfg.__all__:
        value = getattr(scfg, name)
        assert not callable(value) or value.__doc__
