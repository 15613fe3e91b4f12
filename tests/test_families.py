"""What sets the families apart, on small models of random weights in their original layout."""
import copy
import itertools
import math
import warnings
from dataclasses import replace

import families
import pytest
import torch
from conftest import error, seeded
from counting import Bytes
from einops import rearrange
from PIL import Image
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode

import sample
import scfg
from scfg import CFG, OFFICIAL, PAPER, SCFG, Prompt, Refiner
from scfg.config import SD1, SD2_BASE, SD2_V, SDXL, SDXL_REFINER
from scfg.diffusion import seems_to_predict
from scfg.segment import CONDITIONAL
from scfg.text import Text, vocabulary
from scfg.unet import UNet

ALL = {"sd1": SD1, "sd2": SD2_V, "sdxl": SDXL, "sdxl_refiner": SDXL_REFINER}
MERGES = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>")]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small file of every family, and the tokenizer for all of them."""
    from transformers import CLIPTokenizer
    folder = tmp_path_factory.mktemp("families")
    CLIPTokenizer(vocab=vocabulary(MERGES), merges=MERGES).save_pretrained(folder / "tokenizer")
    for name, family in ALL.items():
        save_file(families.original(families.small(family, len(vocabulary(MERGES)))), folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def load(files):
    def load(name: str, **options) -> scfg.Diffusion:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return scfg.load(files / f"{name}.safetensors", tokenizer=files / "tokenizer", **options)
    return load


def last(steps):
    *_, step = steps
    return step


@pytest.mark.filterwarnings("ignore:the SDXL refiner finishes")
@pytest.mark.parametrize("name", ALL)
def test_text_to_latent(load, name):
    """Contexts of the family's width, regions of its words, and another latent for another negative prompt."""
    model, latents = load(name), []
    for negative in (None, "", "dog"):
        prompt = model.prompt(["cat dog", "dog"], negative)
        assert prompt.context["cond"].shape == (2, 77, model.config.unet.context_dim)
        assert [word.text for word in prompt.words[0]] == ["cat", "dog"]
        step = last(model.sample(prompt, SCFG(), "euler", steps=2, size=(104, 72)))
        assert step.latent.shape == (2, 4, 9, 13) and step.denoised.regions.tokens.shape == (2, 77, 3, 4)
        latents.append(step.latent)
    zeros = name == "sdxl"
    assert torch.equal(latents[0], latents[1]) != zeros and error(latents[1], latents[2]) > 1e-5
    assert model.decode(latents[0]).shape == (2, 3, 72, 104)


@pytest.mark.parametrize("name", ["sdxl", "sdxl_refiner"])
def test_the_vector_is_pooled_text_and_sinusoids_of_sizes_or_score(load, name):
    model = load(name)
    prompt = model.prompt("cat")
    vector = model.vector(prompt, ("uncond", "cond"), 832, 1216)
    assert torch.equal(vector[:, :48], torch.cat([prompt.pooled["uncond"], prompt.pooled["cond"]]))
    for row, score in zip(vector[:, 48:], (2.5, 6.0)):
        numbers = (832, 1216, 0, 0, score) if name == "sdxl_refiner" else (832, 1216, 0, 0, 832, 1216)
        for number, sinusoids in zip(numbers, row.split(256), strict=True):
            for i in (0, 1, 64, 127):
                angle = number * 10000 ** (-i / 128)
                assert sinusoids[i].item() == pytest.approx(math.cos(angle), abs=2e-4)
                assert sinusoids[128 + i].item() == pytest.approx(math.sin(angle), abs=2e-4)
    with pytest.raises(scfg.BadInput, match=r"SDXL.* give Prompt\(context=..., pooled=...\)"):
        last(model.sample(Prompt(context=prompt.context), steps=1, size=(64, 64), latent=seeded(1, 4, 8, 8)))


def test_an_all_zero_unconditional_context_takes_its_foreground_from_the_other_half(load):
    model, x = load("sdxl"), seeded(2, 4, 16, 16)
    words = model.prompt(["cat dog", "dog"])
    zeros = model.placed(words, 2)
    assert not zeros.context["uncond"].any() and not zeros.pooled["uncond"].any()
    found = model.denoiser(zeros, SCFG(5.0), maps=True)(x, 3.0, None)
    assert "all zeros" in found.notes[-1].what
    expected = CONDITIONAL.assign([OFFICIAL.complete(block) for block in found.maps])
    assert torch.equal(found.regions.foreground, expected.foreground) and 0 < expected.foreground.mean() < 1
    assert torch.equal(found.regions.tokens, expected.tokens)
    for prompt, rule in ((model.prompt(["cat dog", "dog"], ""), SCFG(5.0, contrast=0)), (zeros, replace(SCFG.paper(5.0), contrast=0))):
        assert model.denoiser(prompt, rule)(x, 3.0, None).notes == ()
    mixed = replace(zeros, context=zeros.context | {"uncond": torch.stack([zeros.context["uncond"][0], seeded(77, 192)])})
    foreground = model.denoiser(mixed, SCFG(5.0))(x, 3.0, None).regions.foreground
    assert torch.equal(foreground[0], expected.foreground[0]) and not torch.equal(foreground[1], expected.foreground[1])


def test_the_refiner_takes_over_at_its_share_of_the_timesteps(load):
    base, refiner = load("sdxl"), load("sdxl_refiner")
    hand = Refiner(refiner, refiner.prompt("cat"), 0.6)
    steps = list(base.sample(base.prompt("cat"), CFG(5.0), "euler", steps=5, size=(64, 64), seeds=3, refiner=hand))
    alone = list(base.sample(base.prompt("cat"), CFG(5.0), "euler", steps=5, size=(64, 64), seeds=3))
    same = [torch.equal(a.latent, b.latent) for a, b in zip(steps, alone)]
    assert same == [True, True, True, False, False]                           # timesteps 999, 799, 599 | 399, 199
    x = alone[2].latent * math.sqrt(alone[3].sigma ** 2 + 1)
    expected = refiner.denoiser(hand.prompt, CFG(5.0))(x, alone[3].sigma, None)
    assert error(steps[3].denoised.x0, expected.x0) < 1e-5
    with pytest.raises(scfg.BadInput, match="SD 1.x cannot refine what SDXL began"):
        next(base.sample(base.prompt("cat"), steps=1, size=(64, 64), refiner=Refiner(load("sd1"), load("sd1").prompt("cat"))))
    with pytest.raises(scfg.BadInput, match="3 prompts for 1 pictures"):
        next(base.sample(base.prompt("cat"), steps=9, size=(64, 64), refiner=Refiner(refiner, refiner.prompt(["cat"] * 3))))


def test_a_refiner_s_share_ends_where_diffusers_ends_it():
    taken = scfg.diffusion.handed_over(lambda *_: "base", lambda *_: "refiner", 0.8)
    assert [taken(None, scfg.noise.SIGMAS[t], None) for t in (999, 200, 199, 0)] == ["base", "base", "refiner", "refiner"]


def test_runs_that_cannot_mean_what_was_asked_for_say_so(load):
    base, refiner = load("sdxl"), load("sdxl_refiner")
    with pytest.warns(UserWarning, match="the refiner never takes over: none of the 4 steps"):
        base.sigmas("euler", None, 4, Refiner(refiner, refiner.prompt("cat")))
    with pytest.warns(UserWarning, match="1 such steps start at sigma 0.0"):
        load("sd1").sigmas("euler", None, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        base.sigmas("euler", None, 5, Refiner(refiner, refiner.prompt("cat")))


def test_one_prompt_serves_any_number_of_pictures_also_in_a_bare_step(load):
    for name in ("sd1", "sdxl"):
        model, x = load(name), seeded(2, 4, 8, 8)
        one, two = model.prompt("cat", "dog"), model.prompt(["cat", "cat"], "dog")
        assert error(model.denoiser(one, CFG(5.0))(x, 3.0, None).x0, model.denoiser(two, CFG(5.0))(x, 3.0, None).x0) < 1e-5
        with pytest.raises(scfg.BadInput, match="2 prompts for 3 pictures"):
            model.denoiser(two, CFG(5.0))(seeded(3, 4, 8, 8), 3.0, None)


@pytest.mark.parametrize("tower, activation, pad, skip, norm, pooled", [
    (SD1.text[0], "quick_gelu", 49407, 1, True, False), (SD2_V.text[0], "gelu", 0, 2, True, False),
    (SDXL.text[0], "quick_gelu", 49407, 2, False, False), (SDXL.text[1], "gelu", 0, 2, False, True),
    (SDXL_REFINER.text[0], "gelu", 0, 2, False, True)])
def test_what_towers_are_asked_for_is_what_their_families_were_trained_on(tower, activation, pad, skip, norm, pooled):
    """Each family's facts written out, and its states computed from them with transformers' own module."""
    torch.manual_seed(0)
    text = Text([replace(tower, width=64, heads=1, layers=3, pooled=32 * bool(tower.pooled))]).eval()
    clip, ids = text.towers[0].transformer, torch.tensor([[49406, 320, 2368, 49407] + [pad] * 73])
    states, whole = text.encode([[49406, 320, 2368, 49407]], torch.device("cpu"))
    assert clip.config.hidden_act == activation
    found = clip(ids, output_hidden_states=True)
    expected = found.hidden_states[3 - skip + 1]
    assert torch.equal(states, clip.final_layer_norm(expected) if norm else expected)
    assert (whole is not None) == pooled
    if pooled:
        assert torch.allclose(whole, found.last_hidden_state[:, 3] @ text.towers[0].text_projection.weight.T, atol=1e-5)


def test_the_script_runs_base_and_refiner_and_says_what_it_runs(files, tmp_path, capsys):
    words = ["cat dog", "--checkpoint", str(files / "sdxl.safetensors"), "--tokenizer", str(files / "tokenizer"), "--steps", "3",
             "--size", "64x96", "--out", str(tmp_path)]
    alone = sample.run(sample.parse(words))
    assert "SDXL: 64x96, scfg at scale 5, 3 steps of DPM++ 2M over trailing noise levels, 1 from seed 0\n" in capsys.readouterr().out
    refined = sample.run(sample.parse([*words, "--refiner", str(files / "sdxl_refiner.safetensors"), "--refiner-from", "0.5"]))
    said = capsys.readouterr().out
    assert "1 from seed 0, SDXL refiner from 0.5 on\n" in said
    assert "note, in 2 of 3 steps, 1 of 1 pictures (seed 0): the unconditional context is all zeros" in said                # the refiner's is not
    others = [sample.run(sample.parse([*words, *more])) for more in (
        ["--clip-skip", "1"], ["--negative", "dog"], ["--sampler", "euler_ancestral"], ["--sampler", "euler_ancestral", "--eta", "0.5"])]
    facts = [Image.open(path).text["parameters"] for path in sorted(tmp_path.glob("*-0.png"))]
    assert "Refiner: sdxl_refiner, Refiner switch at: 0.5" in facts[1] and "Clip skip: 1" in facts[2] and "Eta: 0.5" in facts[5]
    pictures = [alone, refined, *others]
    assert all(error(a, b) > 1e-5 for a, b in itertools.combinations(pictures, 2)) and alone.shape == (1, 4, 12, 8)


def test_unusual_uses_are_named(load, files):
    refiner, base = load("sdxl_refiner"), load("sdxl")
    with pytest.warns(UserWarning, match="the SDXL refiner finishes what SDXL began"):
        next(refiner.sample(refiner.prompt("cat"), CFG(5.0), steps=1, size=(64, 64)))
    with pytest.warns(UserWarning, match="SDXL is no refiner"):
        next(base.sample(base.prompt("cat"), CFG(5.0), steps=9, size=(64, 64), refiner=Refiner(base, base.prompt("cat"))))
    with pytest.warns(UserWarning, match="does not say what it predicts: taken as v"):
        assert scfg.load(files / "sd2.safetensors").config.prediction == "v"
    with pytest.warns(UserWarning, match="prediction eps was asked for, but .* as one of v"):
        config = scfg.load(files / "sd2.safetensors", prediction="eps").config
    assert (config.prediction, config.name, config.size) == ("eps", "SD 2.x base", (512, 512))
    with pytest.raises(scfg.BadInput, match="prediction is eps or v, not 'x0'"):
        scfg.load(files / "sd2.safetensors", prediction="x0")
    with pytest.warns(UserWarning, match="SDXL's VAE overflows in float16: it runs in float32"):
        model = scfg.load(files / "sdxl.safetensors", dtype=torch.float16)
    assert model.dtype == torch.float16 and model.vae.quant_conv.weight.dtype == torch.float32


def test_an_eps_network_is_told_from_a_v_network_by_its_answer_to_noise(flat):
    """On the one trained model there is: as it is, and with its output turned into eps = sigma out + x, both over sqrt(sigma^2 + 1)."""
    class Eps(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config, self.out = flat.config.unet, flat.unet.out

        def forward(self, x, t, context):
            sigma = scfg.noise.SIGMAS[int(t[0])]
            out, kept = flat.unet(x, t, context)
            return (out / sigma + x) * sigma / math.sqrt(sigma ** 2 + 1), kept
    assert seems_to_predict(flat.unet) == "v" and seems_to_predict(Eps()) == "eps"


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
def test_attention_logits_beyond_fp16_stay_finite(load, name, dtype):
    model = enlarged(enlarged(load(name, dtype=dtype), "to_q", 400), "to_k", 400)
    step = last(model.sample(model.prompt("cat dog", ""), SCFG(5.0), "euler", steps=2, size=(64, 64), seeds=1))
    assert step.latent.isfinite().all() and step.denoised.regions.scores.isfinite().all()
    attention, x = model.unet.middle_block[1].transformer_blocks[0].attn1, seeded(2, 64, 256).to(dtype)
    q, k, v = (rearrange(to(x), "b n (h d) -> b h n d", d=64) for to in (attention.to_q, attention.to_k, attention.to_v))
    plain = (q.half() @ k.half().mT).softmax(-1)
    assert not plain.isfinite().all()                                         # what fp16 makes of them without care
    exact = (q.double() @ k.double().mT / 8).softmax(-1)
    out, found = attention(x, x, (len(x), x.shape[1]))
    expected = attention.to_out(rearrange((exact @ v.double()).to(dtype), "b h n d -> b n (h d)"))
    assert error(out.float(), expected.float()) < 0.02 and torch.allclose(found.double(), exact.mean(1), atol=1e-3)


def test_xl_s_vae_with_activations_beyond_fp16_decodes_in_an_fp16_run(load):
    latent = seeded(1, 4, 8, 8)
    half, whole = (enlarged(load("sdxl", dtype=dtype), "decoder.conv_in", 1e6) for dtype in (torch.float16, torch.float32))
    assert error(half.decode(latent), whole.decode(latent)) < 1e-5
    plain = replace(half, vae=copy.deepcopy(half.vae).half())
    with pytest.raises(FloatingPointError, match="not finite in torch.float16"):
        plain.decode(latent)
    assert enlarged(load("sdxl", dtype=torch.bfloat16), "decoder.conv_in", 1e6).decode(latent).isfinite().all()


def test_with_offload_the_towers_are_not_moved(load):
    model = load("sdxl", offload=True)
    away = replace(model, unet=UNet(model.config.unet).to("meta"))            # a device that holds no numbers
    assert away.prompt("cat").context["cond"].is_meta
    assert all(parameter.device.type == "cpu" for parameter in away.text.parameters())


@torch.no_grad()
@pytest.mark.parametrize("size", ["full", "a fifth"])
def test_maps_of_xl_s_sixty_blocks_at_1024_take_little_memory(size):
    """At full size the tensors are of the CPU but hold no numbers, so that attention is the fused one there too."""
    config = SDXL.unet if size == "full" else families.small(SDXL).unet
    peaks = []
    with FakeTensorMode(allow_non_fake_inputs=True) if size == "full" else torch.no_grad():
        unet = UNet(config).requires_grad_(False)
        inputs = torch.randn(1, 4, 128, 128), torch.ones(1), torch.randn(2, 77, config.context_dim), torch.randn(2, config.vector_dim)
        for pixels in (0, 32 * 32):
            with Bytes() as counted:
                _, kept = unet(*inputs, map_pixels=pixels, keep=OFFICIAL.complete)
            peaks.append(counted.peak)
        assert len(kept) == 60 and {completed.shape for completed in kept} == {(2, 77, 32, 32)}
        with Bytes() as counted:
            OFFICIAL.assign(kept)
    assert peaks[1] - peaks[0] < 50e6 and counted.peak < 50e6                 # the limit is 256 MB in all


@pytest.mark.parametrize("family, size, scale, spacing", [
    (SD1, (512, 512), 7.5, "linspace"), (SD2_BASE, (512, 512), 7.5, "linspace"), (SD2_V, (768, 768), 7.5, "linspace"),
    (SDXL, (1024, 1024), 5.0, "trailing"), (SDXL_REFINER, (1024, 1024), 5.0, "trailing")])
def test_native_defaults(tiny, family, size, scale, spacing):
    model = replace(tiny, config=family)
    assert (family.size, family.scale, model.spacing("dpmpp_2m")) == (size, scale, spacing)
    assert model.spacing("ddim") == (family.spacing or "leading")


def test_recipes_differ_in_where_the_foreground_comes_from():
    completed = [seeded(2, 5, 6, 6).exp()]
    found = [replace(recipe, foreground=where).assign(completed).foreground
             for recipe, where in ((OFFICIAL, "uncond"), (OFFICIAL, "cond"), (OFFICIAL, "assigned"))]
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])
    assert PAPER.foreground == "assigned" and OFFICIAL.foreground == "uncond"
    swapped = [torch.cat(completed[0].chunk(2)[::-1])]
    assert torch.equal(replace(OFFICIAL, foreground="uncond").assign(swapped).foreground, found[1])
