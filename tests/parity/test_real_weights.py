"""tests/real_weights.py on small files of random weights: what it reports, and that it can fail."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import real_weights  # noqa: E402
from compare import model, no_gradients  # noqa: E402, F401
from PIL import Image  # noqa: E402
from published import pipeline  # noqa: E402
from small import reference  # noqa: E402

pytestmark = pytest.mark.slow

KINDS = ("text states", "U-Net", "VAE, decoding", "VAE, encoding", "latent")
PARTS = {  # a weight of every part of diffusers' side, and what must differ with it
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v": {"U-Net", "latent"},
    "vae.decoder.conv_out": {"VAE, decoding"},
    "vae.encoder.conv_in": {"VAE, encoding"},
    "text_encoder.encoder.layers.0.mlp.fc1": {"text states", "latent"},
}


def command(family: str, output: Path, *options: object) -> list[str]:
    files = [reference(family).checkpoint, "--tokenizer", reference(family).tokenizer, "--output", output]
    return [str(word) for word in (*files, "--size", "64x96", "--steps", 3, "--device", "cpu", *options)]


def tables(page: str) -> list[list[list[str]]]:
    """Every table of a page, its head left out, as lines of cells."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", page, re.MULTILINE)
    return [[line.strip("| ").split(" | ") for line in block.splitlines()[2:]] for block in blocks]


@pytest.mark.parametrize(
    "family, name, tensors", [("sd1", "SD 1.x", 986), ("sdxl", "SDXL", 2034), ("sdxl_refiner", "SDXL refiner", 1522)]
)
def test_the_page(family: str, name: str, tensors: int, tmp_path: Path) -> None:
    """Both sides are equal to 1e-4, for whole runs too, and every figure is there."""
    assert real_weights.main(command(family, tmp_path / "page.md")) == 0
    page = (tmp_path / "page.md").read_text()
    facts, equality, costs, guidance, words = tables(page)
    assert [facts[0], facts[1]] == [["family", name], ["prediction", "eps"]]
    assert facts[2][1].startswith(f"{tensors},") and len(reference(family).weights) == tensors
    assert len(equality) == 3 + 3 + 2 + 1 and all(line[3] == "equal" for line in equality)
    assert all(float(line[1]) < 1e-4 for line in equality)
    assert any(float(line[1]) > 0 for line in equality)  # they are two programs
    assert "100.00 % within 1/255 and 100.00 % within 2/255" in page
    assert Image.open(tmp_path / "page.png").size == (2 * 64, 96)
    assert [line[0] for line in costs] == ["diffusers", "scfg", "scfg, S-CFG"]
    assert all(float(line[1]) > 0 for line in costs[:2]) and all(float(line[2]) > 0 for line in costs)
    assert re.search(r"seconds over diffusers': \d\.\d\d \(\d\.\d\d to \d+\.\d\d in 2 turns\)", page)
    assert len(guidance) == 3 * len(real_weights.RECIPES)
    for _, _, _, contrast, foreground, low, mean, high in (map(str, line) for line in guidance):
        assert float(contrast) >= 1 and 0 <= float(foreground) <= 1 and float(low) <= float(mean) <= float(high)
    assert [line[0].split()[-1] for line in words[2:]] == real_weights.TEXTS[0].split()
    for step in range(3):  # by the paper's recipe every pixel has one owner, by the authors' program one at least
        official, paper = (sum(float(line[1 + 2 * step + i].rstrip(" %")) for line in words) for i in (0, 1))
        assert abs(paper - 100) < 1 and official > 99


@pytest.mark.parametrize("name", PARTS)
def test_a_changed_weight_is_a_difference(name: str) -> None:
    """One tensor of diffusers' side is off by a tenth: what it acts on differs, and nothing else."""
    ours = model("sd1")
    pipe = pipeline(reference("sd1").checkpoint, ours)
    part, _, path = name.partition(".")
    module: nn.Module = getattr(pipe, part).get_submodule(path)
    module.weight.mul_(1.1)
    figures = real_weights.measure(real_weights.Sides(ours, pipe, (64, 64), 3))
    differing = [one.what for one in figures.equality if not one.equal]
    assert {kind for kind in KINDS if any(what.startswith(kind) for what in differing)} == PARTS[name]
    assert (figures.within[1] < 1) == (name != "vae.encoder.conv_in")


def test_a_difference_ends_with_status_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> object:
        pipe = pipeline(*arguments)
        pipe.unet.conv_out.bias.add_(0.01)
        return pipe

    monkeypatch.setattr(real_weights, "pipeline", broken)
    assert real_weights.main(command("sd1", tmp_path / "page.md")) == 1
    lines = [line for line in (tmp_path / "page.md").read_text().splitlines() if "DIFFERS" in line]
    assert [line.split()[1] for line in lines] == ["U-Net,"] * 3 + ["latent"]


def test_what_is_not_a_number_differs() -> None:
    sides = real_weights.Sides(model("sd1"), None, (64, 64), 3)
    assert not sides.compare("", torch.tensor([float("nan"), 1.0]), torch.ones(2)).equal


@pytest.mark.parametrize(
    "options, words",
    [
        (["--size", "100x64"], "multiple of 8"),
        (["--size", "64"], "no size"),
        (["--steps", "2"], "--steps"),
        (["--dtype", "int8"], "--dtype"),
        (["--device", "nowhere"], "not available"),
        (["--tokenizer", "/nowhere"], "no tokenizer"),
        (["--output", "/nowhere/page.md"], "folder that exists"),
        (["--output", "page.png"], "page such as"),
    ],
)
def test_bad_input_is_one_line(options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    try:
        status = real_weights.main(command("sd1", tmp_path / "page.md", "--prediction", "eps", *options))
    except SystemExit as error:
        status = error.code
    printed = capsys.readouterr()
    assert status == 2 and printed.out == "" and len(printed.err.splitlines()) == 1
    assert printed.err.startswith("real_weights.py: ") and words in printed.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [None, b"", b"no weights"])
def test_a_file_that_is_no_checkpoint_is_one_line(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "file.safetensors"
    if content is not None:
        file.write_bytes(content)
    assert real_weights.main([str(file), "--output", str(tmp_path / "page.md")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
