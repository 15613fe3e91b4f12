"""Write docs/api.md from the signatures and docstrings of the public names: python docs/make_api.py."""

import ast
import inspect
import textwrap
from pathlib import Path
from types import FunctionType
from typing import Any

import scfg
import scfg.cpu
import scfg.edit
import scfg.prompting

PAGE = Path(__file__).with_name("api.md")
GROUPS = {
    "Load and sample": "load save Diffusion Prompt Step run BadInput SAMPLERS Schedule Moment",
    "One step": "Denoiser Denoised Outputs Row",
    "Guidance": "Guidance CFG SCFG Energy Product APG FDG OptimizedScale TCFG PAG SEG Rescale Interval Ramp euler_cfg_pp distilled lcm",
    "Guidance as data": "to_dict from_dict",
    "Regions by word, mask and prompt": "Area words mask foreground parse_area Region ByRegion Part RegionalPrompt",
    "Attention maps and segmentation": "Maps Capture Site Conditioning attention Recipe OFFICIAL PAPER Tokens Word Regions "
    "segment_maps",
}
ELSEWHERE = {
    "scfg.prompting.encode": scfg.prompting.encode,
    "scfg.cpu.pack": scfg.cpu.pack,
    "scfg.cpu.keep_freed_memory": scfg.cpu.keep_freed_memory,
    **{f"scfg.edit.{name}": getattr(scfg.edit, name) for name in sorted(scfg.edit.__all__)},
}
VALUES = {  # names that have no docstring
    "SAMPLERS": f"Samplers by name: {', '.join(scfg.SAMPLERS)}.",
    "OFFICIAL": "The Recipe of the authors' program.",
    "PAPER": "The Recipe of the paper.",
}


def fields(kind: type) -> list[str]:
    """The fields of a class as they stand in its source, with their comments."""
    lines = inspect.getsource(kind).splitlines()
    (node,) = ast.parse("\n".join(lines)).body
    found = [statement for statement in node.body if isinstance(statement, ast.AnnAssign)]
    return [lines[i].strip() for one in found for i in range(one.lineno - 1, one.end_lineno)]


def signature(function: FunctionType) -> str:
    """As it stands in the source."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    node.args.args = [argument for argument in node.args.args if argument.arg not in ("self", "cls")]
    return f"{node.name}({ast.unparse(node.args)}) -> {ast.unparse(node.returns)}"


def methods(kind: type) -> list[FunctionType]:
    own = [value for value in vars(kind).values() if isinstance(value, FunctionType | classmethod)]
    own = [getattr(value, "__func__", value) for value in own]
    return [f for f in own if inspect.getdoc(f) and (f.__name__ == "__call__" or not f.__name__.startswith("_"))]


def entry(name: str, value: Any, level: str = "###") -> list[str]:
    """The lines of one name."""
    if name in VALUES:
        return [f"{level} {name}", "", VALUES[name], ""]
    found = [f"{level} {name}", ""]
    if isinstance(value, FunctionType):
        found += ["```python", signature(value), "```", ""]
    found += [inspect.getdoc(value) or "", ""]
    if isinstance(value, type):
        if lines := fields(value):
            found += ["```python", *lines, "```", ""]
        for method in methods(value):
            found += entry(f"{name}.{method.__name__}", method, "####")
    return found


def page() -> str:
    lines = [
        "# API",
        "",
        "Made from the docstrings by `docs/make_api.py`. All names without a module are `scfg.NAME`.",
        "",
    ]
    for title, names in GROUPS.items():
        lines += [f"## {title}", ""]
        for name in names.split():
            lines += entry(name, getattr(scfg, name))
    lines += ["## In modules", ""]
    for name, value in ELSEWHERE.items():
        lines += entry(name, value)
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
