"""What a GPU is given: nothing that it refuses or that the host waits for inside a step, and few operations.

Shown on a pretend GPU (pretend.py), whose device guard is compiled here.
"""

import copy
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import seeded
from counting import Bytes
from families import FAMILIES, small
from pretend import Gpu, OnGpu

import scfg
from scfg import CFG, SCFG, ByRegion, Guidance, Part, Prompt, Region, RegionalPrompt
from scfg.config import SD1, SDXL, Config
from scfg.prompting import encode
from scfg.unet import UNet
from scfg.vae import VAE

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the pretend GPU needs g++, which .ci/run demands")

MASK = torch.zeros(8, 8).index_fill(1, torch.arange(4), 1)
GUIDANCES = {
    "cfg": CFG(5.0),
    "scfg": SCFG(5.0),
    "paper": SCFG.paper(5.0),
    "mean": SCFG.mean(5.0),
    "conditional": SCFG.conditional(5.0),
    "contrast": SCFG(5.0, min_contrast=1.1),
    "energy": scfg.Energy(),
    "product": scfg.Product(SCFG(5.0), scfg.Energy(1.5, 1.0)),
    "region": ByRegion(SCFG(5.0), (Region("foreground", times=2.0), Region(scfg.mask(MASK), scale=3.0))),
    "mask": ByRegion(CFG(5.0), (Region(scfg.mask(MASK).feathered(2), scale=3.0),)),
    "pag": Guidance(scale=SCFG(5.0), perturb=scfg.PAG()),
    "seg": Guidance(scale=CFG(5.0), perturb=scfg.SEG(sigma=2.0)),
    "apg": Guidance(scale=SCFG(5.0), direction=scfg.APG(), rescale=scfg.Rescale()),
    "tcfg": Guidance(scale=CFG(5.0), direction=scfg.TCFG()),
    "fdg": Guidance(scale=CFG(5.0), direction=scfg.FDG()),
    "zero*": Guidance(scale=CFG(5.0), direction=scfg.OptimizedScale()),
    "ramp": Guidance(scale=SCFG(5.0), when=scfg.Ramp()),
}


def rules_of_words() -> dict[str, ByRegion]:
    """Rules that need the words of a prompt."""
    both = scfg.words("car", soft=True) | (scfg.mask(MASK) & ~scfg.words("star", against_all=True))
    return {"words": ByRegion(SCFG(5.0), (Region("car", scale=7.0), Region(both.feathered(1), times=0.5)))}


def network(config: Config, dtype: torch.dtype = torch.float32) -> scfg.Diffusion:
    """A model of random weights, without text towers."""
    torch.manual_seed(0)
    parts = (UNet(config.unet), VAE(config.vae))
    return scfg.Diffusion(config, *(part.to(dtype).eval().requires_grad_(False) for part in parts), None)


def on_gpu(model: scfg.Diffusion) -> scfg.Diffusion:
    """A copy; to be called under a Gpu."""
    return replace(model, unet=copy.deepcopy(model.unet).to("cuda"), vae=copy.deepcopy(model.vae).to("cuda"))


def random_prompt(config: Config, zero: bool = False) -> Prompt:
    """For one picture; zero: without a negative text, as SDXL has it."""
    width, pooled = config.unet.context_dim, {}
    if config.unet.vector_dim:
        size = config.unet.vector_dim - 256 * (5 if config.aesthetic_scores else 6)
        pooled = {text: seeded(1, size, seed=i) for i, text in enumerate(("uncond", "cond"))}
    context = {text: seeded(1, 77, width, seed=i) for i, text in enumerate(("uncond", "cond"))}
    return Prompt(context | ({"uncond": torch.zeros(1, 77, width)} if zero else {}), pooled)


def test_the_pretend_gpu_notices_what_a_real_one_would():
    with Gpu() as gpu:
        x = torch.ones(3, device="cuda")
        assert isinstance(x, OnGpu) and str(x.device) == "cuda:0" and gpu.operations.total() == 1
        assert torch.equal((x + 1)[:2].numbers, torch.full((2,), 2.0)) and not gpu.waits and not gpu.mixes
        x + torch.tensor(1.0)
        assert not gpu.mixes
        x + torch.ones(3)
        assert gpu.mixes.total() == 1
        for wait in (
            lambda: x.sum().item(),
            lambda: bool(x.any()),
            lambda: x.tolist(),
            lambda: x.cpu(),
            lambda: torch.ones(3).to("cuda"),
            lambda: torch.tensor([1.0, 2.0], device="cuda"),
            lambda: x.nonzero(),
            lambda: x[x > 0],
            lambda: x[[0, 1]],
            lambda: x.copy_(torch.ones(3)),
        ):
            gpu.forget()
            wait()
            assert gpu.waits and not gpu.mixes
        gpu.forget()
        torch.ones(3).pin_memory().to("cuda", non_blocking=True)
        assert not gpu.waits
        with pytest.raises(RuntimeError):
            torch.nn.functional.linear(x[None], torch.ones(2, 3, dtype=torch.half, device="cuda"))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_step_waits_and_every_number_is_that_of_the_cpu(family):
    """Runs of three steps, the first included."""
    config = small(FAMILIES[family])
    plain, prompt, x = network(config), random_prompt(config, family == "sdxl"), seeded(1, 4, 24, 16)
    levels, found = plain.sigmas(3, "euler")[:3], {}
    guidances = GUIDANCES if family == "sd1" else {name: GUIDANCES[name] for name in ("cfg", "scfg", "paper", "pag")}
    for name, guidance in guidances.items():
        denoise, previous = plain.denoiser(prompt, guidance), None
        for sigma in levels:
            previous = denoise(x * sigma, sigma, previous)
        found[name] = previous
    with Gpu() as gpu:
        model, here = on_gpu(plain), x.to("cuda")
        for name, guidance in guidances.items():
            denoise, previous = model.denoiser(prompt, guidance), None
            gpu.forget()
            for i, sigma in enumerate(levels):
                previous = denoise(here * sigma, sigma, previous)
                assert not gpu.mixes and not gpu.waits, (name, i, gpu.waits)
            apart = (previous.x0.numbers - found[name].x0).abs().max() / found[name].x0.abs().max()
            assert apart < 1e-5, name
            assert gpu.operations.total() > 1000 and previous.flags.keys() == found[name].flags.keys()


@pytest.mark.parametrize("sampler", [*scfg.SAMPLERS, scfg.euler_cfg_pp, partial(scfg.samplers.ddim, eta=0.5)])
def test_a_run_waits_between_steps_at_most_for_one_number(sampler):
    """Whether the latent is finite, which is asked a step late."""
    plain = network(small(SD1))
    prompt, how = random_prompt(plain.config), {"sampler": sampler, "steps": 4, "size": (128, 192)}
    *_, expected = plain.sample(prompt, SCFG(5.0), **how)
    with Gpu() as gpu:
        model = on_gpu(plain)
        for step in (steps := model.sample(prompt, SCFG(5.0), **how)):
            assert not gpu.mixes and (step.index == 0 or len(gpu.waits) <= 1), gpu.waits
            assert all("diffusion.py" in wait for wait in gpu.waits if step.index)
            gpu.waits.clear()
        assert (step.latent.numbers - expected.latent).abs().max() < 1e-5 * expected.latent.abs().max()
        picture = model.decode(step.latent)
        steps.close()
        model.encode(torch.rand(1, 3, 64, 64))
        assert not gpu.mixes and isinstance(picture, OnGpu) and isinstance(model.decode(expected.latent), OnGpu)


def test_prompts_of_every_kind_and_bare_denoisers_mix_nothing():
    """The embedded model, by what a step can do; a latent that is on the host is moved, for which the host waits."""

    def made(model: scfg.Diffusion, gpu: Gpu | None = None) -> dict[str, torch.Tensor]:
        whole, own = model.prompt("a red car left of a blue star"), model.prompt("a green star")
        prompts = {
            "text": whole,
            "language": encode(model, "a (red:1.2) [car|star] AND a blue star:0.7", None, None, model.sigmas(3)),
            "regional": RegionalPrompt(whole, (Part(scfg.mask(MASK), own, base=0.2), Part("car", own))),
        }
        found = {}
        for name, prompt in prompts.items():
            for rule, guidance in (rules_of_words() | {"scfg": SCFG(5.0)} if name != "language" else GUIDANCES).items():
                denoise, previous = model.denoiser(prompt, guidance), None
                for sigma in (9.0, 4.0, 2.0):
                    x = (seeded(1, 4, 8, 8) * sigma).to(model.device)
                    if gpu:
                        gpu.forget()
                    previous = denoise(x, sigma, previous)
                    assert not gpu or not (gpu.mixes or gpu.waits), (name, rule, gpu.mixes, gpu.waits)
                found[f"{name} {rule}"] = previous.x0
        return found

    expected = made(scfg.load())
    with Gpu() as gpu:
        for name, x0 in made(scfg.load(device="cuda", dtype=torch.float32), gpu).items():
            assert (x0.numbers - expected[name]).abs().max() < 1e-5 * expected[name].abs().max(), name
        denoise = scfg.load(device="cuda", dtype=torch.float32).denoiser("a red car", SCFG(5.0))
        gpu.forget()
        assert isinstance(denoise(seeded(1, 4, 8, 8), 3.0).x0, OnGpu) and not gpu.mixes
        assert gpu.waits.total() == 1 and "a copy to the device at denoise.py" in str(gpu.waits)


def test_latent_consistency_and_attention_maps_stay_on_the_device():
    config = small(SD1)
    plain = network(replace(config, unet=replace(config.unet, guidance_dim=64)))
    prompt, capture = random_prompt(config), scfg.Capture(64, heads=True)
    *_, expected = plain.sample(prompt, sampler=scfg.lcm, steps=3, size=(64, 64))
    with Gpu() as gpu:
        model = on_gpu(plain)
        for step in model.sample(prompt, sampler=scfg.lcm, steps=3, size=(64, 64)):
            assert not gpu.mixes and (step.index == 0 or len(gpu.waits) <= 1), gpu.waits
            gpu.waits.clear()
        assert (step.latent.numbers - expected.latent).abs().max() < 1e-5
        denoise = on_gpu(network(config)).denoiser(prompt, SCFG(5.0), capture=capture)
        denoised = denoise(torch.ones(1, 4, 16, 16, device="cuda"), 3.0)
        gpu.forget()
        denoise(torch.ones(1, 4, 16, 16, device="cuda"), 3.0, denoised)
        assert denoised.maps and not gpu.waits and not gpu.mixes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_maps_of_half_precision_are_products_summed_in_float32(family, dtype):
    """On CUDA, where the step must be what a CPU makes of the same numbers."""
    config = small(FAMILIES[family])
    plain, prompt, x = network(config, dtype), random_prompt(config), seeded(1, 4, 16, 24)
    expected = plain.denoiser(prompt, SCFG(5.0))(x * 3, 3.0)
    with Gpu() as gpu:
        found = on_gpu(plain).denoiser(prompt, SCFG(5.0))(x * 3, 3.0)
        assert gpu.operations["bmm"] > 0 and not gpu.mixes
        assert (found.regions.scores.numbers - expected.regions.scores).abs().max() < 1e-4


def added(config: Config, side: int, guidance: SCFG, zero: bool = False) -> tuple[int, int]:
    """The operations of a step of CFG in half precision, and how many more one of this guidance has."""
    with torch.device("meta"):
        unet = UNet(config.unet).half().requires_grad_(False)
    with Gpu(empty=True) as gpu:
        model, counts = scfg.Diffusion(config, unet.to("cuda"), None, None), []
        for rule in (CFG(7.5), guidance):
            denoise = model.denoiser(random_prompt(config), rule, once=True)
            if zero:  # which empty tensors cannot say
                layout = denoise.prompt.layout._replace(all_zero=True, zero_uncond=torch.zeros(1, device="cuda") == 0)
                denoise = replace(denoise, prompt=replace(denoise.prompt, layout=layout))
            x = torch.ones(1, 4, side, side, device="cuda")
            denoise(x, 9.0)  # the first puts together what a run conditions on
            gpu.forget()
            denoise(x, 3.0)
            assert not gpu.waits and not gpu.mixes
            counts.append(gpu.operations.total())
    return counts[0], counts[1] - counts[0]


def test_a_step_is_few_operations():
    cfg, scfg_adds = added(SD1, 64, SCFG(7.5))
    assert cfg <= 650 and scfg_adds <= 240
    cfg, scfg_adds = added(SDXL, 128, SCFG(7.5))
    assert cfg <= 1560 and scfg_adds <= 1000


def test_without_a_negative_prompt_only_the_conditional_maps_are_computed():
    with_negative, without = (added(SDXL, 128, SCFG(7.5), zero)[1] for zero in (False, True))
    assert without < 0.8 * with_negative and added(SDXL, 128, SCFG.paper(7.5))[1] <= 1000


def test_sdxl_without_its_text_towers_fits_into_eight_gigabytes(monkeypatch):
    """At 1024x1024 by S-CFG, by count, without what fused attention returns; half a gigabyte is the driver's own."""
    with torch.device("meta"):
        unet, vae = UNet(SDXL.unet).half().requires_grad_(False), VAE(SDXL.vae).requires_grad_(False)
    weights = sum(parameter.nbytes for part in (unet, vae) for parameter in part.parameters())
    monkeypatch.setattr("scfg.memory.free_memory", lambda device: 7.5e9 - weights)
    with Bytes() as counted, Gpu(empty=True):
        model = scfg.Diffusion(SDXL, unet.to("cuda"), vae.to("cuda"), None)
        denoise = model.denoiser(random_prompt(SDXL), SCFG(7.5), once=True)
        x, peaks = torch.ones(1, 4, 128, 128, device="cuda"), []
        denoised = denoise(x, 9.0)
        for work in (lambda: denoise(x, 3.0, denoised), lambda: model.decoded(model.vae, denoised.x0)):
            counted.peak = counted.now
            work()
            peaks.append(counted.peak)
    print(f"weights {weights / 1e9:.2f} GB, a step's peak {peaks[0] / 1e9:.2f} GB, decoding's {peaks[1] / 1e9:.2f} GB")
    assert weights + 1e8 < min(peaks) and max(peaks) < 7.5e9
