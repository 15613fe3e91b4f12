"""The package on an NVIDIA GPU beside the CPU, by `bash tests/gpu/run.sh` on a machine with one; skipped elsewhere."""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import error, seeded
from families import FAMILIES, small
from test_gpu import GUIDANCES, MASK, network, on_gpu, random_prompt, rules_of_words

import scfg
from scfg import CFG, SCFG, Part, RegionalPrompt
from scfg.config import SD1, SDXL, Config
from scfg.large import decode_in_bands
from scfg.prompting import encode
from scfg.unet import UNet
from scfg.vae import VAE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
LIMITS = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}  # of one evaluation, of the largest value
RUNS = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.15}  # of six steps
SHARE_OF_CONTRAST = {torch.float32: 0.01, torch.float16: 0.05, torch.bfloat16: 0.2}  # of maps that are nearly flat
FLIPPED = {torch.float32: 0.005, torch.float16: 0.02, torch.bfloat16: 0.25}  # share of pixels of another token
CAPTION = "a red car left of a blue star on grass"
RULES = {"cfg": CFG(2.0), "scfg": SCFG(2.0), "paper": SCFG.paper(2.0), **rules_of_words()}


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """Without the rounding to TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module", params=LIMITS)
def on_cuda(request) -> scfg.Diffusion:
    """The embedded model."""
    return scfg.load(device="cuda", dtype=request.param)


@torch.no_grad()
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_every_family_is_that_of_the_cpu(family, dtype):
    config = small(FAMILIES[family])
    plain, prompt, x = network(config), random_prompt(config, family == "sdxl"), 3 * seeded(1, 4, 24, 16)
    model = on_gpu(replace(plain, unet=network(config, dtype).unet))
    for name, guidance in (GUIDANCES if family == "sd1" else RULES | {"pag": GUIDANCES["pag"]}).items():
        if name == "words":  # whose prompt has none
            continue
        expected, found = plain.denoiser(prompt, guidance)(x, 3.0), model.denoiser(prompt, guidance)(x, 3.0)
        assert error(found.outputs.cond.cpu(), expected.outputs.cond) < LIMITS[dtype], name
        if expected.regions:
            about_mean = expected.regions.scores - expected.regions.scores.mean((-2, -1), keepdim=True)
            apart = found.regions.scores.cpu() - expected.regions.scores
            assert apart.abs().max() < SHARE_OF_CONTRAST[dtype] * about_mean.abs().max(), name
        if dtype == torch.float32 and not expected.regions:  # random maps are nearly flat: pixels change their token
            assert error(found.x0.cpu(), expected.x0) < 10 * LIMITS[dtype], name


@pytest.mark.parametrize("name", RULES)
def test_runs_are_those_of_the_cpu(flat, on_cuda, name):
    *_, expected = flat.sample(CAPTION, RULES[name], steps=6)
    *_, found = on_cuda.sample(CAPTION, RULES[name], steps=6)
    assert error(found.latent.cpu(), expected.latent) < RUNS[on_cuda.dtype]
    if expected.denoised.regions:
        flipped = (found.denoised.regions.tokens.cpu() != expected.denoised.regions.tokens).any(1).float().mean()
        assert flipped < FLIPPED[on_cuda.dtype] * (2 if name == "paper" else 1)


@pytest.mark.parametrize("sampler", [*scfg.SAMPLERS, partial(scfg.samplers.ddim, eta=0.5)])
def test_samplers_are_those_of_the_cpu(flat, on_cuda, sampler):
    *_, expected = flat.sample(CAPTION, CFG(2.0), steps=6, sampler=sampler)
    *_, found = on_cuda.sample(CAPTION, CFG(2.0), steps=6, sampler=sampler)
    assert error(found.latent.cpu(), expected.latent) < RUNS[on_cuda.dtype]


def test_prompts_of_every_kind_are_those_of_the_cpu(flat, on_cuda):
    def last(model: scfg.Diffusion, kind: str) -> torch.Tensor:
        whole, own = model.prompt(CAPTION), model.prompt("a green moon")
        prompt = {
            "regional": lambda: RegionalPrompt(whole, (Part(scfg.mask(MASK), own), Part("car", own, base=0.2))),
            "chunks": lambda: encode(model, f"{CAPTION} BREAK a moon on sand", None, None, model.sigmas(6)),
            "language": lambda: encode(model, "a [red|blue] car AND a star:0.7", None, None, model.sigmas(6)),
        }[kind]()
        *_, step = model.sample(prompt, SCFG(2.0), steps=6)
        return step.latent

    for kind in ("regional", "chunks", "language"):
        found, expected = last(on_cuda, kind).cpu(), last(flat, kind)
        assert error(found, expected) < 2 * RUNS[on_cuda.dtype], kind


def test_pictures_are_those_of_the_cpu_whole_and_in_bands(flat, on_cuda):
    *_, step = flat.sample(CAPTION, CFG(2.0), steps=6, size=(96, 64))
    whole, limit = flat.decode(step.latent), 2 * LIMITS[on_cuda.dtype]
    found = on_cuda.decode(step.latent)
    assert error(found.cpu(), whole) < limit and error(on_cuda.encode(whole).cpu(), flat.encode(whole)) < limit
    latent = (step.latent / flat.config.latent_scale).to("cuda", on_cuda.dtype)
    banded = decode_in_bands(on_cuda.vae, latent, 8).float() / 2 + 0.5
    assert error(banded.clamp(0, 1), found) < limit


@torch.no_grad()
@pytest.mark.parametrize("name", ["cfg", "scfg", "paper", "mask", "pag", "apg", "ramp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_step_waits_for_the_device(family, name):
    config = small(FAMILIES[family])
    model, x = on_gpu(network(config, torch.float16)), seeded(1, 4, 24, 16).to("cuda")
    denoise = model.denoiser(random_prompt(config), GUIDANCES[name])
    previous = denoise(9 * x, 9.0)  # the first also allocates, and chooses algorithms
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        denoise(2 * x, 2.0, previous)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["cfg", "scfg"])
def test_a_compiled_run_is_the_plain_one(name):
    plain = scfg.load(device="cuda", dtype=torch.float32)
    (*_, expected), (*_, found) = (one.sample(CAPTION, RULES[name], steps=6) for one in (plain, plain.compiled()))
    assert 0 < error(found.latent, expected.latent) < 1e-3


def at_full_size(config: Config) -> scfg.Diffusion:
    """A family of random weights in float16, without its text towers."""

    def made(part: type, of: object, dtype: torch.dtype) -> torch.nn.Module:
        with torch.device("meta"):
            network = part(of)
        network = network.to(dtype).to_empty(device="cuda").eval().requires_grad_(False)
        for parameter in network.parameters():
            parameter.normal_(0, 0.02) if parameter.ndim > 1 else parameter.fill_(0.5)
        return network

    vae = made(VAE, config.vae, torch.float32 if config.vae.overflows else torch.float16)
    return scfg.Diffusion(config, made(UNet, config.unet, torch.float16), vae, None)


@torch.no_grad()
@pytest.mark.parametrize("gigabytes", [8, 12, 24])
@pytest.mark.parametrize("config", [SD1, SDXL], ids=["sd1", "sdxl"])
def test_a_picture_fits_into_a_card_of_so_many_gigabytes(config, gigabytes, monkeypatch):
    """At the family's own size; with the text towers beside it where they fit, as `--offload` is for smaller cards."""
    limit = gigabytes * 10**9 - 5 * 10**8  # half a gigabyte is the driver's own
    monkeypatch.setattr("scfg.memory.free_memory", lambda device: limit - torch.cuda.memory_allocated())
    if limit > torch.cuda.get_device_properties(0).total_memory:
        pytest.skip("this card has less")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    torch.cuda.reset_peak_memory_stats()
    try:
        model = at_full_size(config)
        towers = torch.empty(0 if gigabytes == 8 else 1_640_000_000, dtype=torch.uint8, device="cuda")
        side = config.size[0] // config.vae.factor
        denoised = model.denoiser(random_prompt(config), SCFG(7.5), once=True)(
            torch.randn(1, 4, side, side, device="cuda"), 3.0
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # random weights may overflow
            model.decoded(model.vae, denoised.x0.nan_to_num())
        print(
            f"peak {torch.cuda.max_memory_allocated() / 1e9:.2f} GB of {limit / 1e9:.1f}, towers {len(towers) / 1e9} GB"
        )
        assert gigabytes > 8 or torch.cuda.max_memory_allocated() < 7.2e9  # what docs/speed.md counts, and a little
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
