import json
import subprocess
import sys
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
from scfg.segment import Regions

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def judge():
    return load_judge()


@pytest.fixture(scope="module")
def held_out() -> list[Scene]:
    return [compose(HELD_OUT + 10 ** 5 + i, seen=i % 4 > 0) for i in range(512)]


def drawn(scenes: list[Scene]) -> torch.Tensor:
    return torch.stack([rearrange(torch.tensor(render(scene)[0]) / 255, "h w c -> c h w") for scene in scenes])


def test_the_judge_reads_drawn_scenes(judge, held_out):
    readings = judge.read(drawn(held_out))
    verdicts = [verdict(scene, reading) for scene, reading in zip(held_out, readings)]
    for seen in (True, False):
        right = [v.whole for scene, v in zip(held_out, verdicts) if scene.seen == seen]
        assert len(right) >= 128 and sum(right) >= 0.99 * len(right)
    overlaps = [max(segmentation.iou(thing.mask, torch.from_numpy(truth)) for truth in render(scene)[1])
                for scene, reading in zip(held_out, readings) for thing in reading.things]
    assert sum(overlaps) / len(overlaps) > 0.9 and embedded_checkpoint().with_name("judge.safetensors").stat().st_size < 4e6


def test_the_judge_reads_what_the_autoencoder_leaves(judge, held_out, flat):
    with torch.no_grad():
        decoded = torch.cat([flat.decode(flat.encode(some)) for some in drawn(held_out).split(32)])
    verdicts = judged(judge, held_out, decoded)
    for seen in (True, False):
        right = [v.whole for scene, v in zip(held_out, verdicts) if scene.seen == seen]
        assert sum(right) >= 0.98 * len(right)
    error = (decoded - drawn(held_out)).square().mean((1, 2, 3))
    assert (-10 * error.log10()).mean() > 24                                  # PSNR in dB


def test_a_verdict_names_what_is_wrong(judge):
    scene = next(scene for scene in map(compose, range(HELD_OUT, HELD_OUT + 50)) if scene.relation)
    reading, = judge.read(drawn([scene]))
    first, second = scene.things
    assert verdict(scene, reading) == ((True, True), (True, True), True, True, True, True)
    assert verdict(scene._replace(background="snow" if scene.background == "sand" else "sand"), reading)[2:] == (False, True, True, False)
    colour = next(c for c in ("red", "blue", "white") if c not in (first.colour, second.colour))
    assert verdict(scene._replace(things=(first._replace(colour=colour), second)), reading) == ((True, True), (False, True), True, True, True, False)
    name = next(n for n in ("car", "star", "key") if n not in (first.name, second.name))
    assert verdict(scene._replace(things=(first, second._replace(name=name))), reading) == ((True, False), (True, True), True, True, True, False)
    for relation in set(RELATIONS) - {scene.relation}:
        assert verdict(scene._replace(relation=relation), reading)[3:] == (False, True, False)
    alone = verdict(scene._replace(things=(first,), relation=None), reading)
    assert alone == ((True,), (True,), True, None, False, False)              # a thing too many
    empty = verdict(scene, reading._replace(things=()))
    assert empty == ((False, False), (False, False), True, False, False, False)


@pytest.mark.parametrize("relation", RELATIONS)
def test_swapped_colours_are_wrong_colours_wherever_the_things_stand(judge, relation):
    scene = next(scene for scene in map(compose, range(HELD_OUT, HELD_OUT + 500)) if scene.relation == relation
                 and len({thing.colour for thing in scene.things}) == len({thing.name for thing in scene.things}) == 2)
    first, second = scene.things
    painted = scene._replace(things=(first._replace(colour=second.colour), second._replace(colour=first.colour)))
    reading, = judge.read(drawn([painted]))
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
        assert {frozenset(map(tuple, (labels == k).nonzero().tolist())) for k in labels.unique() if k > 0} == set(map(frozenset, found))


def test_intervals_are_wilsons():
    assert Share(8, 10, 10).interval == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert Share(0, 10, 10).interval == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert Share(16, 20, 10).interval == Share(8, 10, 10).interval            # two things of a picture are one trial


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
    figures = segmentation.scene_ious(scene, words, dict.fromkeys(("official", "paper", "conditional half"), regions), truths)
    ceiling = figures[segmentation.CEILING]
    assert 0.6 < ceiling < 1 and all(value == ceiling for name, value in figures.items() if name.startswith("regions"))
    assert figures["foreground: official"] > 0.6 > figures[segmentation.EVERYTHING] > figures["foreground: official, inverted"]


def test_attention_is_compared_at_any_noise_level(flat):
    scenes = [compose(HELD_OUT + i) for i in range(3)]
    figures, again = segmentation.ious(flat, scenes, 500), segmentation.ious(flat, scenes[:2], 500)
    assert all(values.shape == (3,) and ((0 <= values) & (values <= 1)).all() for values in figures.values())
    assert all((abs(figures[name][:2] - again[name]) < 0.05).all() for name in figures)


def command(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "scfg.evaluate", *words], cwd=ROOT, capture_output=True, text=True)


def test_the_command_writes_a_table_figures_and_a_sheet_and_goes_on(tmp_path):
    words = "flatland", "--count", "3", "--steps", "2", "--scale", "3", "--output", str(tmp_path)
    first = command(*words)
    assert first.returncode == 0, first.stderr
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    assert len(made) == 2 and "whole captions" in first.stdout and len(list(tmp_path.glob("*-cpu-cfg-3.0-2-dpmpp_2m-3.png"))) == 1
    written, = tmp_path.glob("*.json")
    figures = json.loads(written.read_text())
    assert figures["settings"]["scale"] == 3 and figures["seen"]["backgrounds"]["of"] == 3 and len(figures["unseen"]["captions"]) == 3
    assert command(*words).stdout == first.stdout and made == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}


def test_regions_are_judged(tmp_path):
    """Of few pictures: what is asked for inside a mask appears there, and was not there before."""
    found = command("regions", "--count", "6", "--output", str(tmp_path))
    assert found.returncode == 0, found.stderr
    shares = {name: Share(**share) for name, share in json.loads((tmp_path / "regions.json").read_text())["figures"].items()}
    before, after = (shares[f"asked colour inside the mask{when}"] for when in (", before it is asked for", ""))
    assert before.right == 0 and after.right >= 4 and after.of == 6 and (tmp_path / "regions.png").exists()
    assert all(0 <= share.right <= share.of for share in shares.values()) and all(name in found.stdout for name in shares)


@pytest.mark.parametrize("words", [("flatland", "--count", "0"), ("flatland", "--scale", "much"), ("flatland", "--scale", "nan"), ("shapes",),
                                   ("segment", "--output", str(ROOT / "setup.cfg"))])
def test_bad_input_is_one_line(words):
    found = command(*words)
    assert found.returncode == 2 and found.stderr.count("\n") == 1


def test_scales_are_chosen_on_other_captions():
    scored = {scene.caption for scenes in evaluation.scored_scenes(512).values() for scene in scenes}
    chosen = {scene.caption for scene in evaluation.others(scored)}
    assert not chosen & scored and chosen & {scene.caption for scene in map(compose, range(evaluation.CHOICE, evaluation.CHOICE + 128))}
