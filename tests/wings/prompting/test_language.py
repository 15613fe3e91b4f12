"""Texts that change from step to step, AND, tags, literal prompts, and the two kinds of emphasis."""

import gzip
import json
import time
import warnings
from dataclasses import replace

import families
import pytest
import torch
from conftest import DATA, error, seeded
from families import FAMILIES
from safetensors.torch import save_file

import scfg
from scfg import CFG, SCFG, BadInput, Guidance
from scfg.prompting import ComposedPrompt, encode, schedule, sub_prompts
from scfg.prompting.language import parse
from scfg.prompting.weights import parse_weights

STEPS = 6


@pytest.fixture(scope="module")
def sigmas(flat) -> list[float]:
    return flat.sigmas(STEPS, "euler")


def sampled(model, prompt, sigmas, guidance=None, **options) -> torch.Tensor:
    *_, step = model.sample(prompt, guidance or CFG(3.0), sampler="euler", sigmas=sigmas, **options)
    return step.latent


def switched(model, denoisers, sigmas, seed: int = 0) -> torch.Tensor:
    """A run whose denoise step is taken by hand from one a step."""
    noise = model.noise([seed], model.config.size)
    x = noise() * (sigmas[0] ** 2 + 1) ** 0.5

    def denoise(x, sigma, previous):
        return denoisers[sigmas.index(sigma)](x, sigma, previous)

    *_, step = scfg.run(denoise, "euler", x, sigmas, noise)
    return step.latent


def test_schedules_and_sub_prompts_are_those_of_the_webuis_parser():
    """2,000 generated prompts and what its parser makes of them, see tests/data/README.md."""
    cases = json.loads(gzip.decompress((DATA / "prompt_schedules.json.gz").read_bytes()))
    assert len(cases) == 2000
    for prompt, steps, scheduled, split in cases:
        assert [[last, text] for last, text in schedule(prompt, steps)] == scheduled, prompt
        assert [[text, weight] for text, weight in sub_prompts(prompt)] == split, prompt


@pytest.mark.parametrize("text", ["(a" * 20000, "[a:" * 20000, ":" + "1" * 20000, "[" * 20000 + "]" * 20000])
def test_long_broken_prompts_are_read_in_linear_time(text):
    started = time.perf_counter()
    assert schedule(text, 30) and sub_prompts(text)
    assert time.perf_counter() - started < 5  # a quadratic parser takes minutes


@pytest.mark.parametrize("rule", [CFG(3.0), SCFG(5.0)])
def test_a_text_that_changes_is_a_run_that_switches_its_prompt(flat, sigmas, rule):
    car, star = encode(flat, "a red car on grass"), encode(flat, "a blue star on grass")
    prompt = encode(flat, "a [red car:blue star:0.5] on grass", sigmas=sigmas)
    found = sampled(flat, prompt, sigmas, rule)
    first, second = flat.denoiser(car, rule), flat.denoiser(star, rule)
    assert torch.equal(found, switched(flat, [first] * 3 + [second] * 3, sigmas))
    for alone in (car, star):
        assert error(found, sampled(flat, alone, sigmas, rule)) > 0.1


def test_alternatives_take_turns_also_in_the_negative(flat, sigmas):
    prompt = encode(flat, "a [red|blue|green] car", "a [star|ball]", sigmas=sigmas)
    pairs = [
        (f"a {colour} car", f"a {thing}") for colour, thing in zip(["red", "blue", "green"] * 2, ["star", "ball"] * 3)
    ]
    expected = switched(flat, [flat.denoiser(encode(flat, *pair), CFG(3.0)) for pair in pairs], sigmas)
    assert torch.equal(sampled(flat, prompt, sigmas), expected)


def test_texts_that_recur_are_encoded_once(flat, sigmas, monkeypatch):
    encoded, real = [], flat.text.encode
    monkeypatch.setattr(flat.text, "encode", lambda ids, *rest: encoded.append(len(ids)) or real(ids, *rest))
    encode(flat, "a [red|blue] car [on grass::4]", sigmas=sigmas)
    assert sum(encoded) == 5  # red and blue, each with and without grass; and the negative


def test_a_text_that_changes_needs_the_runs_noise_levels(flat):
    with pytest.raises(BadInput, match=r"'a \[red\|blue\] car' changes from step to step: give .*sigmas=model.sigmas"):
        encode(flat, "a [red|blue] car")
    with pytest.raises(BadInput, match="changes from step to step"):
        encode(flat, "a car", "a [ball:star:2]")


@pytest.mark.parametrize(
    "text", ["a red car", "a (red:1.3) car", "a [red] car", "a car " * 40, "a red car BREAK on grass"]
)
def test_a_prompt_without_steps_and_and_is_a_plain_one_to_the_bit(flat, sigmas, text):
    found, plain = encode(flat, text, sigmas=sigmas), encode(flat, text)
    assert isinstance(found, scfg.Prompt) and not isinstance(found, ComposedPrompt)
    assert torch.equal(found.context["cond"], plain.context["cond"])


@pytest.mark.parametrize(
    "guidance",
    [
        Guidance(scale=CFG(3.0)),
        Guidance(scale=CFG(3.0), perturb=scfg.PAG(2.0)),
        Guidance(scale=CFG(3.0), when=scfg.Interval(0.5, 2.0)),
    ],
)
@pytest.mark.parametrize("weights", [(1.0, -0.5, 0.75), (0.25, 0.5, 0.25)])
def test_and_is_its_formula_in_float64(flat, guidance, weights):
    """guided = uncond + sum_i w_i g (cond_i - uncond), each row alone; g = 1 outside the interval."""
    texts, x = ["a red car", "a blue star", "a green ball on grass"], seeded(2, 4, 16, 16)
    text = " AND ".join(f"{text} :{weight}" for text, weight in zip(texts, weights))
    for sigma in (3.0, 1.0):
        found = flat.denoiser(encode(flat, text), guidance)(x * sigma, sigma)
        alone = [flat.denoiser(encode(flat, one), CFG(3.0))(x * sigma, sigma).outputs for one in texts]
        uncond, *conds = (one.double() for one in (alone[0].uncond, *(one.cond for one in alone)))
        strength = guidance.strength(flat.config.schedule.moment(sigma))
        g = 3.0 if strength else 1.0
        guided = uncond + sum(w * g * (cond - uncond) for w, cond in zip(weights, conds))
        if guidance.perturb and strength:
            row = [replace(guidance, scale=CFG(1.0), perturb=scfg.PAG(1.0))] * len(texts)
            away = [flat.denoiser(encode(flat, one), g)(x * sigma, sigma).outputs for one, g in zip(texts, row)]
            guided = guided + 2.0 * sum(w * (o.cond - o.perturbed).double() for w, o in zip(weights, away))
        expected = flat.config.schedule.moment(sigma).to_x0((x * sigma).double(), guided)
        assert error(found.x0.double(), expected) < 1e-5
        assert (found.outputs.uncond is None) == (strength == 0)


def test_one_prompt_by_and_is_that_prompt(flat, sigmas):
    plain = sampled(flat, encode(flat, "a red car"), sigmas)
    assert error(sampled(flat, encode(flat, "a red car :0.5 AND a red car :0.5"), sigmas), plain) < 1e-4
    with pytest.warns(UserWarning, match="the number after the prompt's last colon is its weight, 0.5: .*--literal"):
        weighed = encode(flat, "a red car :0.5")
    scale = Guidance(scale=CFG(1.5))
    assert error(sampled(flat, weighed, sigmas), sampled(flat, encode(flat, "a red car"), sigmas, scale)) < 1e-4


def test_every_prompt_of_and_has_regions_of_its_words(flat):
    prompt, x = encode(flat, "a red car AND a blue star"), seeded(1, 4, 16, 16) * 3
    found = flat.denoiser(prompt, SCFG(5.0))(x, 3.0)
    assert [word.text for word in found.regions.words[0]] == ["a", "red", "car", "a", "blue", "star"]
    length = flat.text.length
    assert found.regions.scores.shape[1] == 2 * length and found.regions.words[0][3].start == length + 1
    for i, text in enumerate(("a red car", "a blue star")):
        alone = flat.denoiser(encode(flat, text), SCFG(5.0))(x, 3.0).regions.scores
        own = found.regions.scores[:, i * length : (i + 1) * length]
        assert error(own[:, 1:], alone[:, 1:]) < 1e-4  # of the start tokens only the first may own pixels


def test_pictures_of_a_batch_are_each_of_their_prompt(flat, sigmas):
    """Whatever the others are: one that changes, one of two prompts, a long one and a plain one."""
    texts = [
        "a [red|blue] car",
        "a red car AND a blue star :0.5",
        ", ".join(["a green ball on grass"] * 20),
        "a red car",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the world has no commas
        together = sampled(flat, encode(flat, texts, "a key", sigmas=sigmas), sigmas, SCFG(3.0), seeds=range(4))
        for i, text in enumerate(texts):
            alone = sampled(flat, encode(flat, text, "a key", sigmas=sigmas), sigmas, SCFG(3.0), seeds=i)
            assert error(together[i : i + 1], alone) < 1e-3


def test_a_region_of_a_word_acts_while_the_text_has_it(flat, sigmas):
    prompt = encode(flat, "a [red car:blue star:3] on grass", sigmas=sigmas)
    guidance = Guidance(scale=scfg.ByRegion(CFG(3.0), (scfg.Region("star", scale=9.0),)))
    scales = [
        step.denoised.scale.max().item() for step in flat.sample(prompt, guidance, sampler="euler", sigmas=sigmas)
    ]
    assert scales[:3] == [3.0] * 3 and max(scales[3:]) == 9.0
    absent = Guidance(scale=scfg.ByRegion(CFG(3.0), (scfg.Region("key", scale=9.0),)))
    with pytest.raises(BadInput, match="'key' is not in the prompt, whose words are: a red car on grass a blue star"):
        next(flat.sample(prompt, absent, sampler="euler", sigmas=sigmas))


def test_regions_of_prompts_that_change(flat, sigmas):
    whole, part = encode(flat, "a [red|blue] car", sigmas=sigmas), encode(flat, "a [star:ball:3]", sigmas=sigmas)
    mask = torch.zeros(16, 16)
    mask[:, 8:] = 1
    found = sampled(flat, scfg.RegionalPrompt(whole, (scfg.Part(scfg.mask(mask), part),)), sigmas)
    made = [
        scfg.RegionalPrompt(encode(flat, f"a {colour} car"), (scfg.Part(scfg.mask(mask), encode(flat, f"a {thing}")),))
        for colour, thing in zip(["red", "blue"] * 3, ["star"] * 3 + ["ball"] * 3)
    ]
    assert torch.equal(found, switched(flat, [flat.denoiser(one, CFG(3.0)) for one in made], sigmas))
    joined = scfg.RegionalPrompt(encode(flat, "a car AND a key"), (scfg.Part(scfg.mask(mask), part),))
    assert error(sampled(flat, joined, sigmas), sampled(flat, encode(flat, "a car AND a key"), sigmas)) > 0.01
    refused = scfg.RegionalPrompt(whole, (scfg.Part(scfg.mask(mask), encode(flat, "a star AND a ball")),))
    with pytest.raises(BadInput, match="AND .* for the whole picture's prompt, not for a region's"):
        sampled(flat, refused, sigmas)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.slow
def test_every_family(tmp_path, name):
    """With the pooled text of XL: a text that changes switches it too, and AND has one for every prompt."""
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>")]
    config = families.small(FAMILIES[name], len(families.vocabulary(merges)))
    save_file(families.original(config), tmp_path / "a.safetensors", families.tokenizer_metadata(merges))
    model = scfg.load(tmp_path / "a.safetensors", prediction=config.schedule.prediction)
    sigmas, x = model.sigmas(2, "euler"), seeded(1, 4, 8, 8)
    changing = model.denoiser(encode(model, "a [cat:dog:1]", sigmas=sigmas), CFG(3.0))
    joined = model.denoiser(encode(model, "a cat AND a dog :0.5"), CFG(3.0))(x, sigmas[1])
    found = []
    for i, text in enumerate(("a cat", "a dog")):
        alone = model.denoiser(encode(model, text), CFG(3.0))
        assert torch.equal(changing(x, sigmas[i]).x0, alone(x, sigmas[i]).x0)
        found.append(alone(x, sigmas[1]).outputs)
    uncond, (cat, dog) = found[0].uncond, (one.cond for one in found)
    expected = uncond + (cat - uncond) + 0.5 * (dog - uncond)
    assert error(joined.outputs.cond, expected) < 1e-5


def test_what_cannot_act_is_said(flat):
    with pytest.warns(UserWarning, match="<lora:style:0.8>, <lyco:x> does not act, .*: taken out of the prompt"):
        found = encode(flat, "a red <lora:style:0.8>car<lyco:x>")
    assert torch.equal(found.context["cond"], flat.prompt("a red car").context["cond"])
    with pytest.warns(UserWarning, match="no embedding is known here: 'embedding:easy-negative.v2' is read as words"):
        encode(flat, "a car", "embedding:easy-negative.v2")


def test_literal_texts_are_taken_as_they_are(flat):
    text = "(car:2) AND [a|b]"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = encode(flat, text, literal=True)
    assert [str(one.message).startswith("this model never saw") for one in said] == [True]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(found.context["cond"], flat.prompt(text).context["cond"])


HEAVY = "a (green car:1.1) on grass"


def test_emphasis_is_the_families_or_as_asked(flat):
    """no-norm multiplies the words' states; original then divides by what that does to the mean, here -0.42 times."""
    plain = flat.prompt("a green car on grass").context["cond"]
    states = encode(flat, HEAVY).context["cond"]
    changed = (states != plain).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [2, 3] and torch.equal(states[0, 2:4], plain[0, 2:4] * 1.1)
    assert torch.equal(states, encode(flat, HEAVY, emphasis="no-norm").context["cond"])
    with pytest.warns(UserWarning, match=r"bringing back the mean multiplies this prompt's encoding by -0\.4.*no-norm"):
        brought = encode(flat, HEAVY, emphasis="original").context["cond"]
    assert torch.allclose(brought, states * (plain.mean() / states.mean()), rtol=1e-4)
    expected = {"sd1": "original", "sd2": "original", "sdxl": "no-norm", "sdxl_refiner": "no-norm"}
    assert {name: family.emphasis for name, family in FAMILIES.items()} == expected
    assert flat.config.emphasis == "no-norm"


@pytest.mark.slow
def test_a_weight_leaves_the_picture_its_car(flat):
    """8 of 8 pictures with no-norm, none of them with a context of the other sign."""
    from scfg.evaluate.judge import load_judge

    judge = load_judge()

    def cars(emphasis: str) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prompt = encode(flat, HEAVY, emphasis=emphasis)
        *_, step = flat.sample(prompt, CFG(2.0), steps=20, seeds=range(8))
        readings = judge.read(flat.decode(step.latent))
        return sum(any((one.colour, one.name) == ("green", "car") for one in reading.things) for reading in readings)

    assert cars("no-norm") == 8 and cars("original") == 0


@pytest.mark.parametrize(
    "text",
    ["(a" * 20_000, ":" + "1" * 20_000, "(a:1" * 8_000, "(a" * 10_000 + ")" * 10_000, "[a:" * 3_000 + "b" + ":0.5]" * 3_000],
    ids=["open", "digits", "open numbers", "nested", "schedules"],
)  # fmt: skip
def test_thousands_of_brackets_do_not_hang(text):
    """No speed is measured: the first took fifteen seconds where every bracket touched every piece in it."""
    started = time.process_time()
    parse(text)
    assert parse_weights(text) and time.process_time() - started < 10
