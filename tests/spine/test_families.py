"""What sets the families apart, on small models of random weights in their original layout."""

import copy
import math
import warnings
from dataclasses import replace

import families
import pytest
import torch
from conftest import error, seeded
from counting import Bytes
from families import FAMILIES
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode

import scfg
from scfg import CFG, OFFICIAL, PAPER, SCFG, Capture, Conditioning, Prompt, Tokens
from scfg.config import SD1, SD2_BASE, SD2_V, SDXL, SDXL_REFINER
from scfg.data import config_to_json
from scfg.segment import CONDITIONAL
from scfg.text import Text, Tower
from scfg.unet import UNet

MERGES = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>")]
ZEROS = "the unconditional context is all zeros: the foreground is the conditional row's"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small file of every family, which carries its tokenizer and says what it is."""
    folder, metadata = tmp_path_factory.mktemp("families"), families.tokenizer_metadata(MERGES)
    for name, family in FAMILIES.items():
        config = families.small(family, len(families.vocabulary(MERGES)))
        said = metadata | {"scfg.config": config_to_json(config)}
        save_file(families.original(config), folder / f"{name}.safetensors", said)
    return folder


@pytest.fixture(scope="module")
def load(files):
    def load(name: str, **options) -> scfg.Diffusion:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return scfg.load(files / f"{name}.safetensors", **options)

    return load


def last(steps):
    *_, step = steps
    return step


@pytest.mark.filterwarnings("ignore:the SDXL refiner finishes")
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.slow
def test_text_to_latent(load, name):
    """Contexts of the family's width, regions of its words, and another latent for another negative prompt."""
    model, latents = load(name), []
    for negative in (None, "", "dog"):
        prompt = model.prompt(["cat dog", "dog"], negative)
        assert prompt.context["cond"].shape == (2, 77, model.config.unet.context_dim)
        assert [word.text for word in prompt.words[0]] == ["cat", "dog"]
        step = last(model.sample(prompt, SCFG(7.5), sampler="euler", steps=2, size=(104, 72)))
        assert step.latent.shape == (2, 4, 9, 13) and step.denoised.regions.tokens.shape == (2, 77, 3, 4)
        varied = step.denoised.scale.flatten(1).std(1) > 0.1  # where the maps' regions act
        assert varied[0] and (varied[1] or negative == "dog")  # "dog" less "dog" is nothing
        latents.append(step.latent)
    zeros = name == "sdxl"
    assert torch.equal(latents[0], latents[1]) != zeros and error(latents[1], latents[2]) > 1e-5
    assert model.decode(latents[0]).shape == (2, 3, 72, 104)


@pytest.mark.parametrize("name", ["sdxl", "sdxl_refiner"])
@pytest.mark.slow
def test_the_vector_is_pooled_text_and_sinusoids_of_sizes_or_score(load, name):
    model = load(name)
    prompt = model.prompt("cat")
    placed = prompt.conditioner(model.config, model.device, model.dtype)
    vector = placed.vector(("uncond", "cond"), (1, 4, 104, 152))  # 832 x 1216 pixels
    assert torch.equal(vector[:, :48], torch.cat([prompt.pooled["uncond"], prompt.pooled["cond"]]))
    for row, score in zip(vector[:, 48:], (2.5, 6.0), strict=True):
        numbers = (832, 1216, 0, 0, score) if name == "sdxl_refiner" else (832, 1216, 0, 0, 832, 1216)
        for number, sinusoids in zip(numbers, row.split(256), strict=True):
            for i in (0, 1, 64, 127):
                angle = number * 10000 ** (-i / 128)
                assert sinusoids[i].item() == pytest.approx(math.cos(angle), abs=2e-4)
                assert sinusoids[128 + i].item() == pytest.approx(math.sin(angle), abs=2e-4)
    with pytest.raises(scfg.BadInput, match=r"SDXL.* give Prompt\(context=..., pooled=...\)"):
        last(model.sample(Prompt(context=prompt.context), steps=1, size=(64, 64), latent=seeded(1, 4, 8, 8)))


def test_a_steps_vector_and_context_go_row_by_row_for_the_whole_batch(load):
    model = load("sdxl")
    prompt, x = model.prompt(["cat", "dog"], "cat dog"), seeded(2, 4, 8, 8)
    denoiser = model.denoiser(prompt, CFG(5.0))
    moment = model.config.schedule.moment(3.0)
    found = denoiser.prompt.condition(denoiser.guidance.rows(moment), moment, None, x.shape)
    for i, (text, picture) in enumerate([("uncond", 0), ("uncond", 1), ("cond", 0), ("cond", 1)]):
        assert torch.equal(found.tokens[i], prompt.context[text][picture])
        assert torch.equal(found.vector[i, :48], prompt.pooled[text][picture])
    assert found.weight is None and not torch.equal(found.tokens[2], found.tokens[3])


def test_an_all_zero_unconditional_context_takes_its_foreground_from_the_other_half(load):
    model, x = load("sdxl"), seeded(2, 4, 16, 16)
    zeros = model.prompt(["cat dog", "dog"])
    assert not zeros.context["uncond"].any() and not zeros.pooled["uncond"].any()
    found = model.denoiser(zeros, SCFG(5.0), capture=Capture(16))(x, 3.0)
    assert found.flags[ZEROS].tolist() == [1, 1]
    blocks = [OFFICIAL.complete(block) for block in found.maps.values()]
    expected = CONDITIONAL.assign([block[2:] for block in blocks], None, Tokens(77))
    assert torch.equal(found.regions.foreground, expected.foreground) and 0 < expected.foreground.mean() < 1
    assert torch.equal(found.regions.tokens, expected.tokens)
    assert model.denoiser(zeros, SCFG(5.0))(x, 3.0, found).flags[ZEROS].tolist() == [2, 2]
    for prompt, rule in (
        (model.prompt(["cat dog", "dog"], ""), SCFG(5.0)),
        (zeros, SCFG.paper(5.0)),
        (zeros, CFG(5.0)),
    ):
        assert ZEROS not in model.denoiser(prompt, rule)(x, 3.0).flags
    uncond = torch.stack([zeros.context["uncond"][0], seeded(77, 192)])
    found = model.denoiser(replace(zeros, context=zeros.context | {"uncond": uncond}), SCFG(5.0))(x, 3.0)
    foreground = found.regions.foreground
    assert torch.equal(foreground[0], expected.foreground[0]) and not torch.equal(foreground[1], expected.foreground[1])
    assert found.flags[ZEROS].tolist() == [1, 0]


def test_runs_that_start_far_from_noise_say_so(load):
    with pytest.warns(UserWarning, match="1 such steps start at sigma 0.0"):
        load("sd1").sigmas(1, "euler")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load("sdxl").sigmas(5, "euler")
        load("sdxl").sigmas(1, "euler")  # trailing


def test_one_prompt_serves_any_number_of_pictures_also_in_a_bare_step(load):
    for name in ("sd1", "sdxl"):
        model, x = load(name), seeded(2, 4, 8, 8)
        one, two = model.prompt("cat", "dog"), model.prompt(["cat", "cat"], "dog")
        a, b = (model.denoiser(prompt, CFG(5.0))(x, 3.0).x0 for prompt in (one, two))
        assert error(a, b) < 1e-5
        with pytest.raises(scfg.BadInput, match="2 prompts for 3 pictures"):
            model.denoiser(two, CFG(5.0))(seeded(3, 4, 8, 8), 3.0)


@pytest.mark.parametrize(
    "tower, activation, pad, from_end, norm, pooled",
    [
        (SD1.text[0], "quick_gelu", 49407, 1, True, False),
        (SD2_V.text[0], "gelu", 0, 2, True, False),
        (SDXL.text[0], "quick_gelu", 49407, 2, False, False),
        (SDXL.text[1], "gelu", 0, 2, False, True),
        (SDXL_REFINER.text[0], "gelu", 0, 2, False, True),
    ],
)
def test_towers_give_what_their_families_were_trained_on(tower, activation, pad, from_end, norm, pooled):
    """Each family's facts written out, and its states computed from them with transformers' own module."""
    torch.manual_seed(0)
    text = Text([Tower(replace(tower, width=64, heads=1, layers=3, pooled=32 * bool(tower.pooled)))]).eval()
    clip, ids = text.towers[0].transformer, torch.tensor([[49406, 320, 2368, 49407] + [pad] * 73])
    (states,), whole = text.encode([[49406, 320, 2368, 49407]], torch.device("cpu"))
    assert clip.config.hidden_act == activation
    found = clip(ids, output_hidden_states=True)
    expected = found.hidden_states[3 - from_end + 1]
    assert torch.equal(states, clip.final_layer_norm(expected) if norm else expected)
    assert (whole is not None) == pooled
    if pooled:
        projected = found.last_hidden_state[:, 3] @ text.towers[0].text_projection.weight.T
        assert torch.allclose(whole, projected, atol=1e-5)


def test_xls_two_towers_lie_side_by_side(load):
    model = load("sdxl")
    ids, _ = model.text.tokenize("cat dog")
    (first, second), pooled = model.text.encode([ids], model.device)
    assert first.shape == (1, 77, 64) and second.shape == (1, 77, 128)
    prompt = model.prompt("cat dog")
    assert torch.equal(prompt.context["cond"], torch.cat([first, second], -1))
    assert torch.equal(prompt.pooled["cond"], pooled)


def test_unusual_uses_are_named(load, files):
    refiner = load("sdxl_refiner")
    with pytest.warns(UserWarning, match="the SDXL refiner finishes what SDXL began"):
        next(refiner.sample(refiner.prompt("cat"), CFG(5.0), steps=1, size=(64, 64)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        next(refiner.sample(refiner.prompt("cat"), CFG(5.0), steps=1, latent=seeded(1, 4, 8, 8)))
    config = load("sd2", prediction="eps").config
    assert (config.schedule.prediction, config.name, config.size) == ("eps", "SD 2.x base", (512, 512))
    with pytest.raises(scfg.BadInput, match="prediction is eps or v, not 'x0'"):
        scfg.load(files / "sd2.safetensors", prediction="x0")
    with pytest.warns(UserWarning, match="SDXL's VAE overflows in float16: it runs in float32"):
        model = scfg.load(files / "sdxl.safetensors", dtype=torch.float16, prediction="eps")
    assert model.dtype == torch.float16 and model.vae.quant_conv.weight.dtype == torch.float32


def enlarged(model: scfg.Diffusion, layer: str, factor: float) -> scfg.Diffusion:
    """The same model with some of its matrices multiplied."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for part in (model.unet, model.vae):
            for name, parameter in part.named_parameters():
                parameter.mul_(factor if layer in name and parameter.ndim > 1 else 1)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd2", "sdxl"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.slow
def test_attention_logits_beyond_fp16_stay_finite(load, name, dtype):
    model = enlarged(enlarged(load(name, dtype=dtype), "to_q", 400), "to_k", 400)
    prompt = model.prompt("cat dog", "")
    step = last(model.sample(prompt, SCFG(5.0), sampler="euler", steps=2, size=(64, 64), seeds=1))
    assert step.latent.isfinite().all() and step.denoised.regions.scores.isfinite().all()
    block, calls = "middle_block.1.transformer_blocks.0", []

    def attend(q, k, v, site):
        out = scfg.attention(q, k, v, site)
        if (site.block, site.kind) == (block, "self"):
            calls.append((q, k, v, out))
        return out

    x, t = seeded(1, 4, 32, 32).to(dtype), torch.tensor([500.0])
    vector = seeded(1, model.config.unet.vector_dim).to(dtype) if name == "sdxl" else None
    conditioning = Conditioning(seeded(1, 77, model.config.unet.context_dim).to(dtype), vector)
    alone, maps = model.unet(x, t, conditioning, capture=Capture(blocks=(block,)))
    again, _ = model.unet(x, t, conditioning, attend=attend)
    assert torch.equal(alone, again)  # what is called here is what the network calls
    ((q, k, v, out),) = calls
    plain = (q.half() @ k.half().mT).softmax(-1)
    assert not plain.isfinite().all()  # what fp16 makes of them without care
    exact = (q.double() @ k.double().mT / q.shape[-1] ** 0.5).softmax(-1)
    assert error(out.float(), (exact @ v.double()).float()) < 0.02
    assert torch.allclose(maps[block].self.double(), exact.mean(1), atol=1e-3)


@pytest.mark.slow
def test_a_vae_with_activations_beyond_fp16_decodes_in_float32(load):
    """XL's always does, as its usual VAE needs; others where they overflow, which is said once."""
    latent = seeded(1, 4, 8, 8)
    half, whole = (
        enlarged(load("sdxl", dtype=dtype), "decoder.conv_in", 3e5) for dtype in (torch.float16, torch.float32)
    )
    assert error(half.decode(latent), whole.decode(latent)) < 1e-5
    plain = replace(half, vae=copy.deepcopy(half.vae).half())
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        pictures = [plain.decode(latent) for _ in range(3)]
    assert ["the VAE overflows in float16: it decodes in float32"] == [str(one.message) for one in caught]
    assert all(error(picture, whole.decode(latent)) < 1e-2 for picture in pictures)  # of weights in float16
    assert plain.vae.quant_conv.weight.dtype == torch.float16
    broken = enlarged(load("sdxl", dtype=torch.float32), "decoder.conv_in", float("inf"))
    with pytest.raises(FloatingPointError, match="decoding is not finite: try another file's VAE"):
        broken.decode(latent)
    assert enlarged(load("sdxl", dtype=torch.bfloat16), "decoder.conv_in", 3e5).decode(latent).isfinite().all()


def test_with_offload_the_towers_are_not_moved(load):
    model = load("sdxl", offload=True)
    away = replace(model, unet=UNet(model.config.unet).to("meta"))  # a device that holds no numbers
    assert away.prompt("cat").context["cond"].is_meta
    assert all(parameter.device.type == "cpu" for parameter in away.text.parameters())


@torch.no_grad()
@pytest.mark.parametrize("size", ["full", "a fifth"])
@pytest.mark.slow
def test_maps_of_xls_sixty_blocks_at_1024_take_little_memory(size):
    """At full size the tensors are of the CPU but hold no numbers, so that attention is the fused one there too."""
    config = SDXL.unet if size == "full" else families.small(SDXL).unet
    peaks = []
    with FakeTensorMode(allow_non_fake_inputs=True) if size == "full" else torch.no_grad():
        unet = UNet(config).requires_grad_(False)
        conditioning = Conditioning(torch.randn(2, 77, config.context_dim), torch.randn(2, config.vector_dim))
        x, t = torch.randn(1, 4, 128, 128), torch.ones(1)
        for pixels in (0, 32 * 32):
            with Bytes() as counted:
                _, captured = unet(x, t, conditioning, capture=Capture(pixels, make=OFFICIAL.complete))
            peaks.append(counted.peak)
        blocks = list(captured.values())
        assert len(blocks) == 60 and {completed.shape for completed in blocks} == {(2, 77, 32, 32)}
        with Bytes() as counted:
            OFFICIAL.assign([block[1:] for block in blocks], [block[:1] for block in blocks], Tokens(77))
    assert peaks[1] - peaks[0] < 50e6 and counted.peak < 50e6  # 256 MB in all would do


@pytest.mark.parametrize(
    "family, size, scale, spacing",
    [
        (SD1, (512, 512), 7.5, "linspace"),
        (SD2_BASE, (512, 512), 7.5, "linspace"),
        (SD2_V, (768, 768), 7.5, "linspace"),
        (SDXL, (1024, 1024), 5.0, "trailing"),
        (SDXL_REFINER, (1024, 1024), 5.0, "trailing"),
    ],
)
def test_native_defaults(tiny, family, size, scale, spacing):
    model = replace(tiny, config=family)
    assert (family.size, family.scale, model.spacing("dpmpp_2m")) == (size, scale, spacing)
    assert model.spacing("ddim") == (family.spacing or "leading")


def test_recipes_differ_in_where_the_foreground_comes_from():
    uncond, cond = [seeded(1, 5, 6, 6).exp()], [seeded(1, 5, 6, 6, seed=1).exp()]
    found = [
        replace(OFFICIAL, foreground=where).assign(cond, uncond, Tokens(5)).foreground
        for where in ("uncond", "cond", "assigned")
    ]
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])
    assert PAPER.foreground == "assigned" and OFFICIAL.foreground == "uncond" and CONDITIONAL.foreground == "cond"
    assert torch.equal(replace(OFFICIAL, foreground="uncond").assign(uncond, cond, Tokens(5)).foreground, found[1])
