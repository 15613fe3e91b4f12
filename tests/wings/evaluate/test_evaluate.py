"""The instruments: the judge, the shares of captions that come true, regions against the truth, the command."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from einops import rearrange
from torch.nn import functional as F

from scfg.diffusion import embedded_checkpoint
from scfg.evaluate import flatland as evaluation
from scfg.evaluate import segment as segmentation
from scfg.evaluate.flatland import HELD_OUT, Share, judged
from scfg.evaluate.judge import load_judge, pieces, verdict
from scfg.flatland import RELATIONS, Scene, compose, render
from scfg.guidance import named_rule
from scfg.segment import Regions

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def judge():
    return load_judge()


@pytest.fixture(scope="module")
def held_out() -> list[Scene]:
    return [compose(HELD_OUT + 10**5 + i, seen=i % 4 > 0) for i in range(512)]


def drawn(scenes: list[Scene]) -> torch.Tensor:
    return torch.stack([rearrange(torch.tensor(render(scene)[0]) / 255, "h w c -> c h w") for scene in scenes])


@pytest.mark.slow
def test_the_judge_reads_drawn_scenes(judge, held_out):
    readings = judge.read(drawn(held_out))
    verdicts = [verdict(scene, reading) for scene, reading in zip(held_out, readings)]
    for seen in (True, False):
        right = [v.whole for scene, v in zip(held_out, verdicts) if scene.seen == seen]
        assert len(right) >= 128 and sum(right) >= 0.99 * len(right)
    overlaps = []
    for scene, reading in zip(held_out, readings):
        truths = [torch.from_numpy(truth) for truth in render(scene)[1]]
        overlaps += [max(segmentation.iou(thing.mask, truth) for truth in truths) for thing in reading.things]
    assert sum(overlaps) / len(overlaps) > 0.9
    assert embedded_checkpoint().with_name("judge.safetensors").stat().st_size < 4e6


@pytest.mark.slow
def test_the_judge_reads_what_the_autoencoder_leaves(judge, held_out, flat):
    with torch.no_grad():
        decoded = torch.cat([flat.decode(flat.encode(some)) for some in drawn(held_out).split(32)])
    verdicts = judged(judge, held_out, decoded)
    for seen in (True, False):
        right = [v.whole for scene, v in zip(held_out, verdicts) if scene.seen == seen]
        assert sum(right) >= 0.98 * len(right)
    error = (decoded - drawn(held_out)).square().mean((1, 2, 3))
    assert (-10 * error.log10()).mean() > 24  # PSNR in dB


def test_a_verdict_names_what_is_wrong(judge):
    scene = next(scene for scene in map(compose, range(HELD_OUT, HELD_OUT + 50)) if scene.relation)
    (reading,) = judge.read(drawn([scene]))
    first, second = scene.things
    assert verdict(scene, reading) == ((True, True), (True, True), True, True, True, True)
    ground = "snow" if scene.background == "sand" else "sand"
    assert verdict(scene._replace(background=ground), reading)[2:] == (False, True, True, False)
    colour = next(c for c in ("red", "blue", "white") if c not in (first.colour, second.colour))
    recoloured = scene._replace(things=(first._replace(colour=colour), second))
    assert verdict(recoloured, reading) == ((True, True), (False, True), True, True, True, False)
    name = next(n for n in ("car", "star", "key") if n not in (first.name, second.name))
    renamed = scene._replace(things=(first, second._replace(name=name)))
    assert verdict(renamed, reading) == ((True, False), (True, True), True, True, True, False)
    for relation in set(RELATIONS) - {scene.relation}:
        assert verdict(scene._replace(relation=relation), reading)[3:] == (False, True, False)
    alone = verdict(scene._replace(things=(first,), relation=None), reading)
    assert alone == ((True,), (True,), True, None, False, False)  # a thing too many
    empty = verdict(scene, reading._replace(things=()))
    assert empty == ((False, False), (False, False), True, False, False, False)


@pytest.mark.parametrize("relation", RELATIONS)
def test_swapped_colours_are_wrong_colours_wherever_the_things_stand(judge, relation):
    scenes = [scene for scene in map(compose, range(HELD_OUT, HELD_OUT + 500)) if scene.relation == relation]
    kinds = [({thing.colour for thing in scene.things}, {thing.name for thing in scene.things}) for scene in scenes]
    scene = next(scene for scene, (colours, names) in zip(scenes, kinds) if len(colours) == len(names) == 2)
    first, second = scene.things
    painted = scene._replace(things=(first._replace(colour=second.colour), second._replace(colour=first.colour)))
    (reading,) = judge.read(drawn([painted]))
    assert verdict(scene, reading) == ((True, True), (False, False), True, True, True, False)


def test_pieces_are_connected():
    masks = torch.rand(20, 12, 17, generator=torch.Generator().manual_seed(0)) > 0.6
    for mask, labels in zip(masks, pieces(masks)):
        assert torch.equal(labels > 0, mask)
        places = {tuple(place) for place in mask.nonzero().tolist()}
        found = []
        while places:
            border = [places.pop()]
            piece = set(border)
            while border:
                y, x = border.pop()
                near = {(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & places
                places, piece = places - near, piece | near
                border += near
            found.append(piece)
        labelled = {frozenset(map(tuple, (labels == k).nonzero().tolist())) for k in labels.unique() if k > 0}
        assert labelled == set(map(frozenset, found))


def test_intervals_are_wilsons():
    assert Share(8, 10, 10).interval == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert Share(0, 10, 10).interval == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert Share(16, 20, 10).interval == Share(8, 10, 10).interval  # two things of a picture are one trial


def test_perfect_regions_score_the_ceiling(flat):
    scene = next(scene for scene in map(compose, range(HELD_OUT, HELD_OUT + 50)) if scene.relation)
    words, truths = flat.prompt(scene.caption).words[0], torch.from_numpy(render(scene)[1])
    for thing, phrase in zip(scene.things, segmentation.phrases(scene, words)):
        assert (phrase.colour.text, phrase.noun.text) == (thing.colour, thing.name)
    grid = F.interpolate(truths[None].float(), size=(16, 16), mode="area")[0] > 0.5
    tokens = torch.zeros(16, 16, 16)
    tokens[words[-1].start] = (~grid.any(0)).float()
    for mask, phrase in zip(grid, segmentation.phrases(scene, words)):
        tokens[phrase.noun.start] = mask.float()
    regions = Regions(tokens, grid.any(0, keepdim=True).float(), tokens)
    by_rule = dict.fromkeys(("official", "paper", "conditional row"), regions)
    figures = segmentation.scene_ious(scene, words, by_rule, truths)
    ceiling = figures[segmentation.CEILING]
    assert 0.6 < ceiling < 1
    assert all(value == ceiling for name, value in figures.items() if name.startswith("regions"))
    everything, inverted = figures[segmentation.EVERYTHING], figures["foreground: official, inverted"]
    assert figures["foreground: official"] > 0.6 > everything > inverted


@pytest.mark.parametrize("t", [100, 500, 900])
def test_attention_is_compared_at_any_noise_level(flat, t):
    scenes = [compose(HELD_OUT + i) for i in range(3)]
    figures, again = segmentation.ious(flat, scenes, t), segmentation.ious(flat, scenes[:2], t)
    assert all(values.shape == (3,) and ((0 <= values) & (values <= 1)).all() for values in figures.values())
    assert all((abs(figures[name][:2] - again[name]) < 0.05).all() for name in figures)


def command(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "scfg.evaluate", *words], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_the_command_writes_a_table_figures_and_a_sheet_and_goes_on(tmp_path):
    words = "flatland", "--count", "3", "--steps", "2", "--scale", "3", "--output", str(tmp_path)
    first = command(*words)
    assert first.returncode == 0, first.stderr
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    assert len(made) == 2 and "whole captions" in first.stdout
    assert len(list(tmp_path.glob("*-cpu-cfg-3.0-2-dpmpp_2m-3.png"))) == 1
    (written,) = tmp_path.glob("*.json")
    figures = json.loads(written.read_text())
    assert figures["settings"]["scale"] == 3 and figures["seen"]["backgrounds"]["of"] == 3
    assert len(figures["unseen"]["captions"]) == 3
    assert command(*words).stdout == first.stdout
    assert made == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}


@pytest.mark.slow
def test_regions_are_judged(tmp_path):
    """Of few pictures: what is asked for inside a mask appears there, and was not there before."""
    found = command("regions", "--count", "6", "--output", str(tmp_path))
    assert found.returncode == 0, found.stderr
    figures = json.loads((tmp_path / "regions.json").read_text())["figures"]
    shares = {name: Share(**share) for name, share in figures.items()}
    before, after = (shares[f"asked colour inside the mask{when}"] for when in (", before it is asked for", ""))
    assert before.right == 0 and after.right >= 4 and after.of == 6 and (tmp_path / "regions.png").exists()
    assert all(0 <= share.right <= share.of for share in shares.values())
    assert all(name in found.stdout for name in shares)


WRONG = {
    "no pictures": (["flatland", "--count", "0"], "'0' is no whole number from 1 up"),
    "no scale": (["flatland", "--scale", "much"], "'much' is no number from 0 to 1000"),
    "not a number": (["flatland", "--scale", "nan"], "'nan' is no number from 0 to 1000"),
    "no guidance": (["flatland", "--guidance", "magic"], "invalid choice: 'magic'"),
    "no kind": (["shapes"], "invalid choice: 'shapes'"),
    "no device": (["segment", "--device", "toaster"], "not available"),
    "no folder": (["segment", "--output", str(ROOT / "setup.cfg")], "setup.cfg"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.slow
def test_bad_input_is_one_line(case):
    words, message = WRONG[case]
    found = command(*words)
    assert found.returncode == 2 and found.stderr.count("\n") == 1 and message in found.stderr, found.stderr
    assert not found.stdout


def test_scales_are_chosen_on_other_captions():
    scored = {scene.caption for scenes in evaluation.scored_scenes(512).values() for scene in scenes}
    chosen = {scene.caption for scene in evaluation.others(scored)}
    drawn = {scene.caption for scene in map(compose, range(evaluation.CHOICE, evaluation.CHOICE + 128))}
    assert not chosen & scored and chosen & drawn and drawn & scored  # without care some would be scored


@pytest.mark.parametrize("guidance", ["scfg", "scfg-paper", "cfg"])
@pytest.mark.slow
def test_what_is_judged_is_what_the_named_rule_paints(flat, tmp_path, guidance):
    """Every scene's caption from its own seed; pictures are kept by what they depend on."""
    scenes = [compose(HELD_OUT + i) for i in (3, 1)]
    settings = evaluation.Settings("0", "cpu", guidance, 3.0, 2, "euler")
    found = evaluation.sampled(flat, scenes, settings, tmp_path, "seen")
    for scene, picture in zip(scenes, found):
        rule = named_rule(guidance, 3.0, flat.config)
        *_, step = flat.sample(scene.caption, rule, sampler="euler", steps=2, seeds=[scene.seed])
        assert (flat.decode(step.latent)[0] - picture).abs().max() < 1.5 / 255
    assert (found[0] - found[1]).abs().max() > 0.1
    others = evaluation.sampled(flat, scenes, settings._replace(scale=1.0), tmp_path, "seen")
    assert (others - found).abs().max() > 0.1 and len(list(tmp_path.rglob("*.npy"))) == 2


def test_what_is_judged_falls_back_to_plain_guidance_as_the_model_asks_for(flat, tmp_path):
    scenes, made = [compose(HELD_OUT + 3)], {}
    for contrast in (0.0, 99.0):
        model = replace(flat, config=replace(flat.config, min_contrast=(contrast, contrast)))
        for guidance in ("scfg", "scfg-paper", "cfg"):
            settings = evaluation.Settings(str(contrast), "cpu", guidance, 3.0, 2, "euler")
            made[contrast, guidance] = evaluation.sampled(model, scenes, settings, tmp_path, "seen")
    for guidance in ("scfg", "scfg-paper"):
        assert torch.equal(made[99.0, guidance], made[99.0, "cfg"])
        assert (made[0.0, guidance] - made[0.0, "cfg"]).abs().max() > 0.01
