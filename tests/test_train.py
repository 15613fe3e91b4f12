"""The training of the embedded checkpoint, a few steps of it; and the sheet of pictures that it paints."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import seeded
from PIL import Image
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import scfg
from scfg.evaluate.judge import Judge

sys.path.insert(0, str(Path(__file__).parent.parent / "weights"))
import loop
import second
import sheet
import train


@pytest.mark.slow
def test_the_training_makes_a_checkpoint_from_nothing_and_resumes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "RUN", tmp_path / "run")
    monkeypatch.setattr(train, "HERE", tmp_path)
    monkeypatch.setattr(train, "UNSEEN_SCENES", 8)

    def phase(name: str, *words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["train.py", name, "--scenes", "8", "--batch", "4", "--device", "cpu", *words])
        train.main()

    def kept(name: str) -> dict:
        return torch.load(tmp_path / "run" / f"{name}.pt", weights_only=True)

    with pytest.raises(SystemExit) as caught:
        phase("unet", "--steps", "1")
    assert caught.value.code == 2 and "run that phase first" in capsys.readouterr().err
    for name in ("vae", "judge", "unet"):
        phase(name, "--steps", "2")
    before = kept("unet")
    phase("unet", "--steps", "3")
    after = kept("unet")
    assert (before["step"], after["step"]) == (2, 3)
    for name in ("unet.out.2.bias", "text.towers.0.transformer.final_layer_norm.weight", "layout.out.weight"):
        assert not torch.equal(before["model"][name], after["model"][name]), name
    phase("export")
    model = scfg.load(tmp_path / "flatland.safetensors")
    *_, step = model.sample(model.prompt("a red car on grass"), scfg.SCFG(2.0), steps=2)
    assert model.config.size == (64, 64) and step.latent.isfinite().all()
    assert model.config.schedule.prediction == "v" and model.config.min_contrast == scfg.load().config.min_contrast
    exported = {f"unet.{name}": value for name, value in model.unet.state_dict().items()}
    exported |= {f"text.{name}": value for name, value in model.text.state_dict().items()}
    for name, value in kept("unet")["average"].items():
        if not name.startswith("layout."):
            assert torch.equal(exported.pop(name), value.half().float())
    assert not exported
    judge = load_file(tmp_path / "judge.safetensors")
    assert {name: value.shape for name, value in judge.items()} == {
        name: value.shape for name, value in Judge().state_dict().items()
    }


def test_a_vae_under_trained_networks_is_not_trained_anew(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "RUN", tmp_path)
    (tmp_path / "unet.pt").touch()
    monkeypatch.setattr(sys, "argv", ["train.py", "vae", "--scenes", "8"])
    with pytest.raises(SystemExit) as caught:
        train.main()
    assert caught.value.code == 2 and "unet.pt" in capsys.readouterr().err


def test_every_word_of_the_second_world_is_one_token():
    tokenizer = second.world_tokenizer()
    assert [word for word in second.scenes.WORDS if len(tokenizer.tokenize(word)) != 1] == []
    merges = second.merges_of(["indoors", "pink"])  # in this order the first breaks the second
    assert len(second.CLIPTokenizer(vocab=second.vocabulary(merges), merges=merges).tokenize("pink")) > 1


def test_fresh_optimisers_begin_with_a_low_rate(tmp_path):
    """Where a kept state goes on without their moments, its rate rises anew, also after a further resume."""
    path, model = tmp_path / "kept.pt", torch.nn.Linear(4, 4)
    state = {"model": model.state_dict(), "optimizers": [], "average": model.state_dict(), "step": 500}
    torch.save(state, path)
    for steps in (502, 503):
        with pytest.raises(SystemExit):
            loop.train(
                path, model, lambda rng, done: model(torch.ones(2, 4)).square().mean(), 10_000, 1.0, loop.How(minutes=0)
            )
        groups = [group for kept in torch.load(path, weights_only=True)["optimizers"] for group in kept["param_groups"]]
        assert {group["lr"] for group in groups} == {(steps - 501) / 100}


def test_orthogonalised_matrices_have_singular_values_near_one():
    for shape in ((20, 50), (50, 20), (30, 30)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        inner = u.mT @ loop.orthogonalised(matrix) @ v.mT
        assert (
            (inner - inner.diag().diag()).abs().max() < 1e-4 and 0.5 < inner.diag().min() and inner.diag().max() < 1.3
        )


class Operations(TorchDispatchMode):
    """Counts operations, views aside."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def test_matrices_of_one_shape_are_updated_together_as_each_would_be():
    shapes = [(16, 8, 3, 3)] * 40 + [(8, 16)] * 40
    alone, together = ([torch.nn.Parameter(seeded(*shape, seed=i)) for i, shape in enumerate(shapes)] for _ in range(2))
    each, all_of_them, counted = [loop.Muon([parameter], 0.1) for parameter in alone], loop.Muon(together, 0.1), []
    for step in range(3):
        for i, shape in enumerate(shapes):
            alone[i].grad = together[i].grad = seeded(*shape, seed=100 * step + i)
        for optimizer in each:
            optimizer.step()
        with Operations() as operations:
            all_of_them.step()
        counted.append(operations.count)
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(alone, together))
    assert not torch.allclose(alone[0], seeded(*shapes[0]), atol=0.1) and counted[-1] < 150  # not 40 or more for each


def test_a_training_is_left_after_so_many_minutes_and_goes_on(tmp_path):
    """With the numbers of one that was not interrupted."""

    def training(path: Path, how: loop.How = loop.How()) -> dict:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4)
        loop.train(path, model, lambda rng, done: model(torch.randn(8, 4)).square().mean(), 5, 0.1, how)
        return torch.load(path, weights_only=True)

    whole = training(tmp_path / "whole.pt")
    for done in range(1, 5):
        with pytest.raises(SystemExit, match=f"over after step {done} of 5: the same command goes on$"):
            training(tmp_path / "left.pt", loop.How(minutes=0))
    left = training(tmp_path / "left.pt", loop.How(minutes=0))
    assert left["step"] == whole["step"] == 5 and torch.equal(left["average"]["weight"], whole["average"]["weight"])


def test_a_training_in_bfloat16_rounds_its_products_alone(tmp_path):
    dtypes, model = [], torch.nn.Linear(4, 4)

    def loss_of(rng, done):
        out = model(torch.ones(2, 4))
        dtypes.append(out.dtype)
        return out.square().mean()

    for half in (False, True):
        loop.train(tmp_path / f"{half}.pt", model, loss_of, 1, 0.1, loop.How(bfloat16=half))
    assert dtypes == [torch.float32, torch.bfloat16] and model.weight.dtype == torch.float32


@pytest.mark.slow
def test_the_sheet_shows_every_prompt_with_the_options_of_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sheet, "HERE", tmp_path)
    sheets = []
    for guidance in ("scfg", "cfg"):
        monkeypatch.setattr(sys, "argv", ["sheet.py", "--steps", "2", "--guidance", guidance])
        sheet.main()
        with Image.open(tmp_path / "sheet.png") as picture:
            sheets.append(picture.convert("RGB"))
    assert "sheet.png: " in capsys.readouterr().out
    cell, n = sheet.SIDE + sheet.GAP, len(sheet.PROMPTS)
    for row in range(3):
        boxes = [
            (x := sheet.GAP + i * cell, y := sheet.GAP + row * cell, x + sheet.SIDE, y + sheet.SIDE) for i in range(n)
        ]
        panels = {sheets[0].crop(box).tobytes() for box in boxes}
        assert len(panels) == n  # another one for every prompt
    scales = [made.crop((sheet.GAP, sheet.GAP + 2 * cell, cell, 3 * cell)).getcolors() for made in sheets]
    assert len(scales[0]) > 1 and len(scales[1]) == 1  # S-CFG's differ from place to place
