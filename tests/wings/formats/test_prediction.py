"""What a file says of its noise schedule is obeyed; else its network is asked."""

import logging
import math
import warnings
from dataclasses import replace

import families
import pytest
import torch
from conftest import error
from families import FAMILIES
from safetensors.torch import save_file

import scfg
from scfg import CFG, Schedule
from scfg.formats import predicts, with_zero_terminal_snr

MERGES = [("c", "a"), ("ca", "t</w>")]
EMPTY = torch.zeros(0)
V, EPS = {"modelspec.prediction_type": "v"}, {"modelspec.prediction_type": "epsilon"}


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """A family's file with these markers and this header."""
    folder = tmp_path_factory.mktemp("prediction")

    def write(name: str, markers: tuple[str, ...] = (), header: dict[str, str] | None = None):
        config = families.small(FAMILIES[name], len(families.vocabulary(MERGES)))
        tensors = families.original(config) | dict.fromkeys(markers, EMPTY)
        path = folder / f"{name}-{len(list(folder.iterdir()))}.safetensors"
        save_file(
            {k: v.clone() for k, v in tensors.items()}, path, families.tokenizer_metadata(MERGES) | (header or {})
        )
        return path

    return write


def quietly(path, **options) -> scfg.Diffusion:
    """Loaded without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return scfg.load(path, **options)


@pytest.mark.filterwarnings("ignore:the SDXL refiner finishes")
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.slow
def test_a_file_is_taken_at_its_word(write, name):
    """By markers, then by its header; the same weights give another picture."""
    said = {
        "v": [
            write(name, ("v_pred",)),
            write(name, (), V),
            write(name, (), {"modelspec.prediction_type": "v_prediction"}),
        ],
        "eps": [write(name, (), EPS)],
    }
    latents = {}
    for prediction, paths in said.items():
        for path in paths:
            model = quietly(path)
            assert model.config.schedule == Schedule(prediction)
            latents[prediction] = last(model.sample("a cat", CFG(3.0), sampler="euler", steps=2, size=(64, 64)))
    assert error(latents["v"], latents["eps"]) > 0.01
    model = quietly(write(name, ("v_pred",), EPS))  # a marker counts before the header
    assert model.config.schedule.prediction == "v"


def last(steps) -> torch.Tensor:
    *_, step = steps
    return step.latent


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
@pytest.mark.slow
def test_zero_terminal_snr_by_marker_and_on_request(write, name):
    model = quietly(write(name, ("v_pred", "ztsnr")))
    assert model.config.schedule == Schedule("v", terminal_alpha=4.8973451890853435e-08)
    assert model.config.spacing == "trailing" and model.sigmas(4, "euler")[0] == pytest.approx(4518.7, rel=1e-3)
    asked = with_zero_terminal_snr(quietly(write(name, ("v_pred",))))
    assert asked.config == model.config
    with pytest.warns(UserWarning, match="predicts eps, which says nothing at pure noise"):
        with_zero_terminal_snr(quietly(write(name, (), EPS)))
    latent = last(model.sample("a cat", CFG(3.0), sampler="dpmpp_2m", steps=4, size=(64, 64)))
    assert latent.isfinite().all() and latent.std() < 20


def test_zero_terminal_snr_is_algorithm_1():
    """2305.08891, written out in float64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    s = (1 - betas).cumprod(0).sqrt()
    first, end = s[0].clone(), s[-1].clone()
    a = ((s - end) * first / (first - end)) ** 2
    sigmas = torch.from_numpy(Schedule("v", terminal_alpha=1e-8).sigmas)
    assert torch.allclose(sigmas[:-1], ((1 - a) / a).sqrt()[:-1], rtol=1e-9) and sigmas[-1] == pytest.approx(1e4)
    assert (Schedule("v").sigmas[0] - sigmas[0]).abs() < 1e-9 and sigmas[500] > Schedule("v").sigmas[500]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.slow
def test_random_weights_are_unsure_which_is_said_and_the_families_usual_is_taken(write, name):
    usual = FAMILIES[name].schedule.prediction
    with pytest.warns(UserWarning, match=f"does not say what it predicts, .* unsure: taken as {usual}, as is usual"):
        model = scfg.load(write(name))
    assert model.config.schedule.prediction == usual and predicts(model) is None


def test_a_request_counts_above_all_and_a_contradiction_is_said(write):
    path = write("sd1", ("v_pred",))
    with pytest.warns(UserWarning, match="prediction eps was asked for, but this checkpoint says v"):
        assert scfg.load(path, prediction="eps").config.schedule.prediction == "eps"
    assert quietly(path, prediction="v").config.schedule.prediction == "v"
    assert quietly(write("sd1"), prediction="v").config.schedule.prediction == "v"


class Eps(torch.nn.Module):
    """A v-network as an eps-network: eps = (sigma v + x) / sqrt(sigma^2 + 1), x the noisy latent."""

    def __init__(self, model: scfg.Diffusion):
        super().__init__()
        self.config, self.out, self.v, self.schedule = (
            model.config.unet,
            model.unet.out,
            model.unet,
            model.config.schedule,
        )

    def forward(self, x, t, conditioning, **rest):
        out, captured = self.v(x, t, conditioning, **rest)
        sigma = torch.tensor([self.schedule.sigmas[int(one)] for one in t], dtype=x.dtype)[:, None, None, None]
        return out / (sigma**2 + 1).sqrt() + x * sigma / (sigma**2 + 1).sqrt(), captured


def test_a_trained_network_tells_by_its_answer_to_noise(flat):
    """The one trained model there is, as it is and turned into an eps-network."""
    eps = replace(flat, unet=Eps(flat))
    moment = flat.config.schedule.moment(2.0)
    x, conditioning = torch.randn(1, 4, 16, 16), scfg.Conditioning(torch.zeros(1, 1, flat.config.unet.context_dim))
    outs = [model.unet(x, torch.tensor([0.0]) + round(moment.t), conditioning)[0] for model in (flat, eps)]
    sigma = flat.config.schedule.sigmas[round(moment.t)]
    noisy = x * math.sqrt(sigma**2 + 1)
    by_v, by_eps = (Schedule(kind).moment(sigma).to_x0(noisy, out) for kind, out in zip(("v", "eps"), outs))
    assert error(by_v, by_eps) < 1e-4  # the same network, said in another way
    assert predicts(flat) == "v" and predicts(eps) == "eps"


def test_what_is_not_said_is_taken_by_the_networks_answer(flat, caplog):
    model = replace(flat, config=replace(flat.config, schedule=Schedule("eps")))
    with pytest.warns(UserWarning, match="does not say what it predicts: taken as v, by its answer to noise"):
        assert scfg.formats.ask_prediction(model).config.schedule.prediction == "v"
    with caplog.at_level(logging.INFO, "scfg"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scfg.formats.ask_prediction(flat).config.schedule.prediction == "v"
    assert "taken as v, by its answer to noise" in caplog.text


def test_what_is_asked_for_against_the_networks_answer_is_said(flat):
    with pytest.warns(UserWarning, match="prediction eps was asked for, but this network answers noise as one of v"):
        scfg.formats.check_prediction(flat, "eps")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scfg.formats.check_prediction(flat, "v")
