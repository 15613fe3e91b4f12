"""Packed weights give what plain ones give; kept memory can be seen by the pages that a process is given."""

import copy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import error, seeded
from torch import nn

import scfg
import scfg.cpu

ROOT = Path(scfg.__file__).parent.parent
FAULTS = """
import resource, sys, torch
from scfg import cpu
kept = cpu.keep_freed_memory() if "keep" in sys.argv else None
torch.ones(16, 2 ** 20).sum()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(16, 2 ** 20).sum()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*words: str) -> tuple[str, int]:
    """What keep_freed_memory said, and the pages that ten large tensors were given after it."""
    command = [sys.executable, "-c", FAULTS, *words]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return said[0], int(said[1])


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is changed")
@pytest.mark.slow
def test_freed_memory_is_used_again():
    (_, plain), (kept, with_it) = faults(), faults("keep")
    if kept == "False":
        pytest.skip("no glibc")
    assert plain > 10 * 16 * 2**20 * 4 // 4096 // 20 and with_it < plain / 10


def test_without_glibc_nothing_is_done_and_it_says_so(monkeypatch):
    def absent(name):
        raise OSError

    for library in (absent, lambda name: object()):
        monkeypatch.setattr("scfg.cpu.ctypes.CDLL", library)
        assert scfg.cpu.keep_freed_memory() is False


@pytest.mark.slow
def test_it_acts_only_where_it_is_asked_for():
    """Importing the package does not change how a process that embeds it allocates memory."""
    code = "import sys, scfg; print('scfg.cpu' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"


@pytest.fixture(scope="module")
def packed() -> scfg.Diffusion:
    """The embedded model, packed."""
    model = scfg.load()
    assert scfg.cpu.pack(model) is True
    return model


def layers(module: nn.Module) -> Counter:
    return Counter(type(layer).__name__ for layer in module.modules())


CAPTION = "a red car left of a blue star on grass"


def test_all_layers_are_packed_but_those_of_few_channels(flat, packed):
    for plain, fast in ((flat.unet, packed.unet), (flat.vae, packed.vae)):
        own = [m for m in plain.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        many = [m for m in own if len(m.weight) >= 32]
        found = layers(fast)
        assert found["Packed"] == len(many) > 20
        assert found["Linear"] + found["Conv2d"] == len(own) - len(many)
    assert (packed.device, packed.dtype) == (flat.device, flat.dtype)


@pytest.mark.parametrize("b, h, w", [(2, 16, 16), (1, 13, 19), (2, 1, 3), (4, 8, 40)])
def test_packed_networks_give_what_plain_ones_give(flat, packed, b, h, w):
    """On a prompt that the model knows; on random contexts its plain float32 is 2e-5 from float64."""
    context = torch.cat([*flat.prompt(CAPTION).context.values()]).repeat_interleave(b, 0)
    x, t = seeded(b, 4, h, w), torch.full((b,), 500)
    captured = [model.unet(x, t, scfg.Conditioning(context), capture=scfg.Capture(64)) for model in (flat, packed)]
    (plain, of_plain), (fast, of_fast) = captured
    assert error(fast, plain) < 1e-5 and of_fast.keys() == of_plain.keys()
    assert all(error(of_fast[name].cross, of_plain[name].cross) < 1e-5 for name in of_plain)


def test_packed_autoencoders_decode_and_encode_alike_whole_and_in_bands(flat, packed, monkeypatch):
    *_, step = flat.sample([CAPTION] * 2, steps=4, size=(80, 48))
    whole = flat.decode(step.latent)
    assert whole.std() > 0.05 and (packed.decode(step.latent) - whole).abs().max() < 1e-5
    assert error(packed.encode(whole), flat.encode(whole)) < 1e-5
    monkeypatch.setattr("scfg.memory.WHOLE", 100)
    assert (packed.decode(step.latent) - whole).abs().max() < 1e-5


def test_a_run_on_a_packed_model_makes_the_same_picture(flat, packed):
    *_, plain = flat.sample(CAPTION, scfg.SCFG(2.0), steps=8)
    *_, fast = packed.sample(CAPTION, scfg.SCFG(2.0), steps=8)
    assert error(fast.latent, plain.latent) < 1e-4 and plain.denoised.scale.std() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Linear(48, 64), (2, 5, 48)),
        (nn.Linear(48, 64, bias=False), (7, 48)),
        (nn.Conv2d(48, 64, 3, padding=1), (2, 48, 9, 6)),
        (nn.Conv2d(48, 64, 3, padding=1), (1, 48, 1, 1)),
        (nn.Conv2d(48, 64, 3, padding=1, bias=False), (1, 48, 64, 50)),
        (nn.Conv2d(48, 64, 3, stride=2, padding=1), (2, 48, 9, 6)),
        (nn.Conv2d(48, 64, 3, stride=2), (2, 48, 9, 6)),
        (nn.Conv2d(48, 64, 1), (2, 48, 9, 6)),
    ],
    ids=str,
)
def test_a_packed_layer_against_float64(layer, shape, dtype, monkeypatch):
    """Also where a convolution's tiles are computed band by band."""
    layer, x = layer.to(dtype), seeded(*shape).to(dtype)
    expected = copy.deepcopy(layer).double()(x.double())
    for band in (scfg.cpu.BAND, 1):
        monkeypatch.setattr("scfg.cpu.BAND", band)
        found = scfg.cpu.Packed(layer)(x)
        assert found.dtype == dtype and error(found.double(), expected) < 20 * torch.finfo(dtype).eps


def test_winograd_s_rounding_is_below_a_millionth_of_the_largest_value():
    layer, x = nn.Conv2d(320, 320, 3, padding=1), seeded(1, 320, 16, 16)
    expected = copy.deepcopy(layer).double()(x.double())
    with torch.no_grad():
        assert error(scfg.cpu.winograd(layer)(x).double(), expected) < 1e-6


def test_gradients_through_packed_weights_are_refused(packed):
    x = seeded(1, 4, 16, 16).requires_grad_()
    denoise = packed.denoiser("a red car", scfg.CFG(2.0))
    with pytest.raises(scfg.BadInput, match="packed weights have no gradients"):
        denoise(x, 3.0)
    with torch.no_grad():
        denoise(x, 3.0)


def test_packing_that_is_not_possible_changes_nothing(monkeypatch):
    model, before = scfg.load(), layers(scfg.load().unet)

    def absent(*given):
        raise AttributeError("no such operator")

    def wrong(weight, bias):
        return lambda x: torch.nn.functional.linear(x, weight, bias) + 1

    for broken in (absent, wrong):
        monkeypatch.setattr("scfg.cpu.packed_linear", broken)
        assert scfg.cpu.pack(model) is False and layers(model.unet) == before


def test_packing_leaves_the_random_numbers_of_its_caller():
    torch.manual_seed(3)
    expected = torch.randn(3)
    torch.manual_seed(3)
    scfg.cpu.pack(scfg.load())
    assert torch.equal(torch.randn(3), expected)
