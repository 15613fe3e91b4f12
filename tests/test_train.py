import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import scfg
from scfg.evaluate.judge import Judge

sys.path.insert(0, str(Path(__file__).parent.parent / "weights"))
import train  # noqa: E402


def test_the_training_makes_a_checkpoint_from_nothing_and_resumes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "RUN", tmp_path / "run")
    monkeypatch.setattr(train, "HERE", tmp_path)
    monkeypatch.setattr(train, "UNSEEN_SCENES", 8)
    def phase(name: str, *words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["train.py", name, "--scenes", "8", "--batch", "4", "--device", "cpu", *words])
        train.main()
    with pytest.raises(SystemExit) as caught:
        phase("unet", "--steps", "1")
    assert caught.value.code == 2 and "run that phase first" in capsys.readouterr().err
    for name in ("vae", "judge", "unet"):
        phase(name, "--steps", "2")
    before = torch.load(tmp_path / "run" / "unet.pt", weights_only=True)
    phase("unet", "--steps", "3")
    after = torch.load(tmp_path / "run" / "unet.pt", weights_only=True)
    assert (before["step"], after["step"]) == (2, 3) and not torch.equal(before["model"]["unet.out.2.bias"], after["model"]["unet.out.2.bias"])
    phase("export")
    model = scfg.load(tmp_path / "flatland.safetensors")
    *_, step = model.sample(model.prompt("a red car on grass"), scfg.SCFG(2.0), steps=2)
    assert model.config.size == (64, 64) and step.latent.isfinite().all()
    for name, value in torch.load(tmp_path / "run" / "unet.pt", weights_only=True)["average"].items():
        if name.startswith("unet."):
            assert torch.equal(model.unet.state_dict()[name.removeprefix("unet.")], value.half().float())
    assert set(load_file(tmp_path / "judge.safetensors")) == set(Judge().state_dict())


def test_orthogonalised_matrices_have_singular_values_near_one():
    for shape in ((20, 50), (50, 20), (30, 30)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        inner = u.mT @ train.orthogonalised(matrix) @ v.mT
        assert (inner - inner.diag().diag()).abs().max() < 1e-4 and 0.5 < inner.diag().min() and inner.diag().max() < 1.3
