"""The compiled step: one graph for every set of rows, whose results are the plain step's."""

import pickle
from dataclasses import replace

import pytest
import torch
from conftest import seeded
from families import FAMILIES, small
from test_gpu import GUIDANCES, MASK, network, random_prompt, rules_of_words

import scfg
from scfg import CFG, SCFG, ByRegion, Guidance, Part, RegionalPrompt
from scfg.gpu import Compiled, compiled
from scfg.gpu.compiled import MOST_GRAPHS, reads_words
from scfg.prompting import encode

pytestmark = pytest.mark.slow  # tracing takes ten seconds a graph
CASES = {name: GUIDANCES[name] for name in ("cfg", "scfg", "paper", "mask", "pag", "apg", "ramp")}
CASES["interval"] = Guidance(scale=SCFG(5.0), when=scfg.Interval(1.0, 5.0))
CASES["words"] = rules_of_words()["words"]
GRAPHS = dict.fromkeys(CASES, 1) | {"interval": 2, "apg": 2}  # APG's first step has no running difference


class Counted:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        self.count += 1
        return graph


@torch.no_grad()
def graphs_of(model: scfg.Diffusion, prompt: object, guidance: object, x: torch.Tensor) -> int:
    """How many graphs a run of four levels has, which must be what the plain steps are."""
    torch._dynamo.reset()
    counted = Counted()
    plain, ours = model.denoiser(prompt, guidance), replace(model, step=Compiled(counted)).denoiser(prompt, guidance)
    expected = found = None
    for sigma in (9.0, 4.0, 2.0, 0.5):
        expected, found = plain(x * sigma, sigma, expected), ours(x * sigma, sigma, found)
        assert (found.x0 - expected.x0).abs().max() <= 1e-5 * expected.x0.abs().max()
        assert torch.equal(found.scale > 1, expected.scale > 1) and found.flags.keys() == expected.flags.keys()
    return counted.count


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_one_graph_for_every_set_of_rows(flat, name):
    prompt = flat.prompt("a red car left of a blue star")
    assert graphs_of(flat, prompt, CASES[name], seeded(1, 4, 8, 8)) == GRAPHS[name]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_one_graph(family):
    """With two transformer blocks where it has more, which are alike."""
    config = small(FAMILIES[family])
    depths = tuple(min(depth, 2) for depth in config.unet.transformer_depth)
    unet = replace(config.unet, transformer_depth=depths, middle_depth=min(config.unet.middle_depth, 2))
    config = replace(config, unet=unet)
    assert graphs_of(network(config), random_prompt(config, family == "sdxl"), SCFG(5.0), seeded(1, 4, 16, 24)) == 1


def test_prompts_that_change_share_a_graph_and_regions_have_their_own(flat):
    """The base of a regional prompt is a second call, which reads other rows."""
    whole, own = flat.prompt("a red car left of a blue star"), flat.prompt("a green star")
    language = encode(flat, "a red [car|star] AND a blue star:0.7", None, None, flat.sigmas(3))
    assert len({step.words for step in language.steps}) == 2
    assert graphs_of(flat, language, SCFG(5.0), seeded(1, 4, 8, 8)) == 1
    regional = RegionalPrompt(whole, (Part(scfg.mask(MASK), own, base=0.2), Part("car", own)))
    assert graphs_of(flat, regional, SCFG(5.0), seeded(1, 4, 8, 8)) == 2


def test_more_than_torchs_own_number_of_graphs_is_allowed(flat):
    """Every other size is another graph; past the limit a step would raise."""
    torch._dynamo.reset()
    counted = Counted()
    denoise = replace(flat, step=Compiled(counted)).denoiser("a red car", CFG(3.0))
    with torch._dynamo.config.patch(recompile_limit=1):
        for side in (8, 9, 10):
            denoise(seeded(1, 4, 8, side), 3.0)
    assert counted.count == 3 < MOST_GRAPHS


def test_a_rule_that_asks_for_numbers_is_one_line(flat):
    def asking(outputs: scfg.Outputs, regions: object, moment: scfg.Moment) -> float:
        return 3.0 if outputs.difference.mean() > 0 else 2.0

    torch._dynamo.reset()
    denoise = replace(flat, step=Compiled(Counted())).denoiser("a red car", asking)
    with pytest.raises(scfg.BadInput, match="^this step cannot be compiled, do without: "):
        denoise(seeded(1, 4, 8, 8), 3.0)


def test_a_compiled_model_makes_the_same_picture_and_says_what_compiling_took():
    """With torch's own compiler of C++ code."""
    torch._dynamo.reset()
    plain, model = scfg.load(), scfg.load().compiled()
    assert model.step.seconds == 0 and model.unet.get_parameter("out.2.weight").is_contiguous(
        memory_format=torch.channels_last
    )
    (*_, expected), (*_, found) = (one.sample("a red car on grass", SCFG(2.0), steps=3) for one in (plain, model))
    assert 0 < (found.latent - expected.latent).abs().max() < 1e-4 * expected.latent.abs().max()
    took = model.step.seconds
    *_, other = model.sample("two blue stars left of a red car", SCFG(2.0), steps=2, seeds=5)
    assert took > 1 and model.step.seconds == took and len(other.denoised.regions.words[0]) == 8
    list(model.sample("a red car on grass", SCFG(3.0), steps=1))
    assert model.step.seconds > took  # its scale is a constant in a graph of its own
    assert isinstance(compiled(plain).step, Compiled)
    assert pickle.loads(pickle.dumps(model)).step.seconds == 0


def test_rules_that_read_no_words_share_their_graph_between_prompts():
    rules = GUIDANCES | rules_of_words() | {"a caller's": lambda outputs, regions, moment: 2.0}
    reading = {name for name, rule in rules.items() if reads_words(getattr(rule, "scale", rule))}
    assert reading == {"words"}
    own = Guidance(scale=lambda outputs, regions, moment: 2.0).scale
    own.recipe = scfg.OFFICIAL
    assert reads_words(own) and reads_words(scfg.Product(SCFG(2.0), own)) and reads_words(ByRegion(own, ()))
