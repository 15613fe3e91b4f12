"""What Python callers give by mistake: one line that names it, never torch's own error nor a result."""

import numpy as np
import pytest
import torch

import scfg
from scfg import CFG, SCFG, Guidance, Region
from scfg.prompting import encode

TEXT, X, PICTURE = "a red car on grass", torch.randn(1, 4, 16, 16), torch.rand(1, 3, 64, 64)
NAN = float("nan")

WRONG = {  # argument -> values that it cannot have
    "guidance": [scfg.APG(), "cfg", 7.5, CFG("x"), CFG(NAN), SCFG(None), scfg.ByRegion(CFG(2.0), 3)]
    + [scfg.ByRegion(3, (Region("car", scale=2.0),)), scfg.Rescale(0.5), scfg.PAG(1.0)]
    + [Guidance(scale=CFG(2.0), direction=CFG(2.0))]
    + [Guidance(scale=CFG(2.0), perturb=scfg.PAG(3.0, ("nowhere",)))],
    "prompt": [None, 3, [None], [], b"a", {"a": 1}, [b"a"], np.array(["a"])],
    "steps": [0, -1, 1001, 2.5, "3", None, torch.ones(2)],
    "sampler": ["x", None, 3],
    "size": [64, (64,), (64, 64, 64), (64.0, 64), "64x64", (0, 64), (-8, 64), (65, 64), (17, 15), NAN],
    "seeds": [2**64, -1, 1.5, "x", [1.5], [], None, np.float64(1.5), [[1]]],
    "sigmas": [[5.0, "x"], [5, 3, 4], [], [1.0], [float("inf"), 0], [NAN, 0], [5, -1], "ab", 3, [1e154, 0], [1e38, 1]],
    "latent": [X[:, :3], X[0], X[..., :0], X.long(), "x", X[:0], X.to("meta"), X.to_sparse(), [[1.0]], object()],
}
LOADED = {
    "path": ["", [], 3, b"x", ["", ""], "\0", "absent", {}],
    "vae": ["", 3, "absent"],
    "tokenizer": ["", 3, "absent"],
    "dtype": ["float32", torch.int8, torch.complex64, torch.float8_e4m3fn, float],
    "device": [None, "tpu", 3.5, "meta", "cuda:99"],
    "prediction": ["x", 3],
}
CALLS = {
    "prompt, negative": lambda model: model.prompt(TEXT, 3),
    "prompt, no layer": lambda model: model.prompt(TEXT, layer_from_end=0),
    "prompt, layer of text": lambda model: model.prompt(TEXT, layer_from_end="x"),
    "encode a text": lambda model: encode(model, 3),
    "encode a negative": lambda model: encode(model, TEXT, 3),
    "denoiser, 3 axes": lambda model: model.denoiser(TEXT)(X[0], 5.0),
    "denoiser, 3 channels": lambda model: model.denoiser(TEXT)(X[:, :3], 5.0),
    "denoiser, numpy": lambda model: model.denoiser(TEXT)(X.numpy(), 5.0),
    "denoiser, whole numbers": lambda model: model.denoiser(TEXT)(X.long(), 5.0),
    **{f"sigma {s!r}": lambda model, s=s: model.denoiser(TEXT)(X, s) for s in (None, "x", -1.0, NAN, [5.0])},
    "sigma beyond float32": lambda model: model.denoiser(TEXT)(X, 1e154),
    "sigma of each": lambda model: model.denoiser(TEXT)(X, torch.ones(1)),
    "run without sigmas": lambda model: scfg.run(model.denoiser(TEXT), "euler", X, None, None),
    "run without x": lambda model: list(scfg.run(model.denoiser(TEXT), "euler", None, [5.0, 0.0], None)),
    "spacing": lambda model: model.sigmas(3, spacing="bad"),
    "noise of one number": lambda model: model.noise(3, (64, 64)),
    **{f"encode {i}": lambda model, p=p: model.encode(p) for i, p in enumerate(
        [(PICTURE * 255).byte(), PICTURE[0], PICTURE[:, :1], "x", PICTURE[..., :17, :15], PICTURE[..., :0], None]
    )},
    **{f"decode {i}": lambda model, z=z: model.decode(z) for i, z in enumerate(
        [X[0], X[:, :3], X.long(), "x", X[..., :0], X[:0], None]
    )},
    "encode 8 bits": lambda model: model.encode(255 * PICTURE + 2),
    "encode no numbers": lambda model: model.encode(PICTURE * NAN),
    "a lone surrogate": lambda model: model.prompt("a \ud800 car"),
    "emphasis as the WebUI spells it": lambda model: encode(model, TEXT, emphasis="No norm"),
    "steps of a prompt": lambda model: encode(model, "[a:b:0.5]", sigmas=3),
    "rising steps of a prompt": lambda model: encode(model, "[a:b:0.5]", sigmas=[0, 1, 2]),
    "a sampler of one value": lambda model: list(model.sample(TEXT, sampler=lambda *given: 1)),
    "a size beside a latent": lambda model: list(model.sample(TEXT, latent=X, size=(128, 128))),
    "sent back": lambda model: (steps := model.sample(TEXT, steps=2), next(steps), steps.send("x")),
    "a region's start": lambda model: Region("red car", scale=5, start="0"),
    "a part's base": lambda model: scfg.Part("red car", model.prompt(TEXT), "x"),
    "one part": lambda model: scfg.RegionalPrompt(model.prompt(TEXT), scfg.Part("car", model.prompt(TEXT))),
    "contexts of another width": lambda model: model.denoiser(
        scfg.Prompt({"uncond": torch.ones(1, 16, 9), "cond": torch.ones(1, 16, 9)})
    ),
    "contexts of numpy": lambda model: model.denoiser(
        scfg.Prompt({"uncond": np.ones((1, 16, 128)), "cond": np.ones((1, 16, 128))})
    ),
    "capture": lambda model: model.denoiser(TEXT, capture="all"),
    "segment": lambda model: model.denoiser(TEXT, segment="paper"),
    "save elsewhere": lambda model: scfg.save(model, "/nowhere/x.safetensors"),
    "save to a number": lambda model: scfg.save(model, 3),
    "save a text": lambda model: scfg.save("x", "x.safetensors"),
    "a direction as perturbation": lambda model: Guidance(scale=CFG(2.0), perturb=scfg.APG()),
    "a perturbation as interval": lambda model: Guidance(scale=CFG(2.0), when=scfg.PAG(1.0)),
    "area of a number": lambda model: scfg.parse_area(3),
}  # fmt: skip


@pytest.mark.parametrize("name, value", [(name, value) for name, values in WRONG.items() for value in values], ids=str)
def test_what_sample_cannot_use_is_one_line(flat, name, value):
    given = {"prompt": TEXT, "steps": 1} | {name: value}
    if name == "guidance":
        with pytest.raises(scfg.BadInput) as caught:
            list(flat.sample(given.pop("prompt"), given.pop("guidance"), **given))
    else:
        with pytest.raises(scfg.BadInput) as caught:
            list(flat.sample(**given))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("name, value", [(name, value) for name, values in LOADED.items() for value in values], ids=str)
def test_what_load_cannot_use_is_one_line(name, value):
    with pytest.raises(scfg.BadInput) as caught:
        scfg.load(**{name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_what_other_calls_cannot_use_is_one_line(flat, call):
    with pytest.raises(scfg.BadInput) as caught:
        call(flat)
    assert "\n" not in str(caught.value)


def latent(model, **options):
    *_, step = model.sample(TEXT, CFG(2.0), steps=2, **options)
    return step.latent


def test_numbers_of_other_packages_are_numbers(flat):
    expected = latent(flat, seeds=3)
    for seeds in (np.int64(3), np.uint8(3), torch.tensor(3), [3], np.array([3]), torch.tensor([3]), (np.int32(3),)):
        assert torch.equal(latent(flat, seeds=seeds), expected), seeds
    for size in ((np.int64(64), 64), np.array([64, 64]), torch.tensor([64, 64]), [64, 64]):
        assert torch.equal(latent(flat, seeds=3, size=size), expected), size
    sigmas = flat.sigmas(2)
    for levels in (np.array(sigmas), torch.tensor(sigmas, dtype=torch.float64), tuple(sigmas)):
        assert torch.equal(latent(flat, seeds=3, sigmas=levels), expected)
    start = flat.noise([3], (64, 64))()
    assert torch.equal(latent(flat, seeds=3, latent=start.numpy()), expected)
    assert torch.equal(flat.decode(expected.numpy()), flat.decode(expected))
    assert torch.equal(flat.encode(PICTURE.numpy()), flat.encode(PICTURE))


def test_numbers_that_are_not_finite_are_named_where_they_appear(flat):
    with pytest.raises(FloatingPointError, match="the latent is not finite after step 1 of 2"):
        latent(flat, latent=X * NAN)
    with pytest.raises(FloatingPointError, match="the latent is not finite, so that there is no picture"):
        flat.decode(X * NAN)
