"""The comparison that owners of published checkpoints run, on small files of every family."""

import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")

sys.path.insert(0, str(Path(__file__).parent.parent))
import real_weights  # noqa: E402
import torch  # noqa: E402
from small import reference  # noqa: E402

pytestmark = pytest.mark.slow


def figures(out: Path) -> dict[str, float]:
    """The differences that the report names."""
    rows = (line.split("|")[1:3] for line in (out / "report.md").read_text().splitlines())
    return {what.strip(): float(value) for what, value in rows if re.fullmatch(r" \d\.\de[+-]\d\d ", value)}


def run(monkeypatch, tmp_path: Path, *words: str) -> dict[str, float]:
    monkeypatch.setattr(sys, "argv", ["real_weights.py", *words, "--out", str(tmp_path), "--device", "cpu"])
    real_weights.main()
    return figures(tmp_path)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_small_file_agrees_and_the_report_says_so(monkeypatch, tmp_path, capsys, family):
    files = reference(family)
    words = [str(files.checkpoint), "--tokenizer", str(files.tokenizer), "--steps", "4", "--size", "128x104"]
    found = run(monkeypatch, tmp_path, *words)
    assert len(found) == 6 and max(found.values()) < 1e-4, found
    report = (tmp_path / "report.md").read_text()
    assert "pixels within 1/255 | 100.00%" in report and report.count("S-CFG at step") == 3
    assert {path.name for path in tmp_path.glob("*.png")} == {"scfg-cfg.png", "diffusers-cfg.png", "scfg-regions.png"}


def test_a_difference_is_reported(monkeypatch, tmp_path):
    """A U-Net of diffusers' with one other bias."""
    built = real_weights.their_unet

    def other(model):
        unet = built(model)
        unet.conv_out.bias = torch.nn.Parameter(unet.conv_out.bias + 0.1)
        return unet

    monkeypatch.setattr(real_weights, "their_unet", other)
    files = reference("sd1")
    found = run(
        monkeypatch,
        tmp_path,
        str(files.checkpoint),
        "--tokenizer",
        str(files.tokenizer),
        "--steps",
        "2",
        "--size",
        "64x64",
    )
    assert all(value > 1e-3 for what, value in found.items() if "VAE" not in what), found


def test_bad_input_is_one_line(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, tmp_path, "absent.safetensors")
    assert caught.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
