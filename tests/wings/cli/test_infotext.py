"""The text of a picture: written as other tools read it, and read back as the command that made the picture."""

import json
import random
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import error
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_sample import ROOT, facts, made

import sample
import scfg
from scfg.cli.infotext import options, read, write

A1111 = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')  # that program's own
PIECES = [
    '"',
    "\\",
    ",",
    ":",
    ", Seed: 99",
    " ",
    "é",
    "日本",
    "a red car",
    "{",
    "}",
    "'",
    "\n",
    "\t",
    "Steps: 3",
    "/",
    "🙂",
]


def words(rng: random.Random, least: int, most: int) -> str:
    return "".join(rng.choice(PIECES) for _ in range(rng.randint(least, most)))


def as_a1111_reads(text: str) -> dict[str, str]:
    fields = dict(A1111.findall(text.split("\n")[-1]))
    return {name: json.loads(value) if value.startswith('"') else value for name, value in fields.items()}


def test_200_texts_are_read_as_they_were_written():
    rng = random.Random(0)
    names = ["Steps", "Seed", "Guidance", "CFG scale", "Region prompts", "Model", "Clip skip", "VAE", "A-b/c d"]
    for _ in range(200):
        given = {name: words(rng, 1, 6) for name in names}
        prompt, negative = words(rng, 1, 5), words(rng, 0, 4)
        text = write(prompt, negative, given)
        assert read(text) == (prompt, negative, given)
        assert {name: value for name, value in as_a1111_reads(text).items() if name in names} == given


def test_prompts_that_look_like_settings_come_back():
    facts = {"Steps": "3", "Seed": "1", "Size": "64x64"}
    for prompt in ("a\nNegative prompt: b", "Negative prompt: b", "a\nSteps: 9, Seed: 9, Size: 9x9", "", "\n"):
        for negative in ("", "c", "c\nNegative prompt: d", " c"):
            assert read(write(prompt, negative, facts)) == (prompt, negative, facts)


COMMANDS = {
    "bare": [],
    "options": ["a blue fish at sea, Seed: 99", "--negative", '-a: "cat"', "--sampler", "heun", "--spacing", "karras"],
    "everything": [
        *("--guidance", "scfg-paper", "--scale", "3", "--direction", "apg", "--pag", "2", "--rescale", "0.7"),
        *("--interval", "0.3", "9", "--sampler", "dpmpp_2m_sde", "--eta", "0.5", "--clip-skip", "2"),
        *("--size", "72x64", "--prediction", "eps", "--dtype", "bfloat16", "--seed", "3"),
        *("--region", "red car & ~foreground:scale=9,start=0.2"),
        *("--region", "blue star | words(car, soft):times=2,feather=1,base=0.5,prompt=a pink star, style: x"),
    ],
    "a batch": ["--count", "3", "--seg", "2", "--direction", "fdg", "--ramp", "cosine", "--seed", "5"],
    "cfg++": ["--sampler", "euler_cfg_pp", "--direction", "tcfg"],
}


@pytest.mark.filterwarnings("ignore:this model never saw")
@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.slow
def test_a_picture_is_repeated_to_the_bit(tmp_path, name):
    made(tmp_path, *COMMANDS[name], "--steps", "3")
    first = sorted(path for path in tmp_path.glob("*.png") if "regions" not in path.name)
    picture = first[-1]
    made(tmp_path, "--from", str(picture))
    again = sorted(set(tmp_path.glob("*.png")) - set(first))
    again = [path for path in again if "regions" not in path.name]
    assert len(again) == len(first)
    for one, other in zip(first, again):
        assert np.array_equal(*(np.asarray(Image.open(path)) for path in (one, other)))
        assert facts(one) == facts(other)


@pytest.mark.slow
def test_options_change_what_the_picture_says(tmp_path):
    latent = made(tmp_path, "--steps", "3", "--guidance", "cfg", "--scale", "4", "--seed", "7")
    picture = str(tmp_path / "00000-7.png")
    for changed in (["--seed", "8"], ["a blue fish at sea"], ["--steps", "4"], ["--guidance", "scfg"]):
        found = made(tmp_path, "--from", picture, *changed)
        expected = ["--steps", "3", "--guidance", "cfg", "--scale", "4", "--seed", "7"]
        if changed == ["--guidance", "scfg"]:
            expected = ["--steps", "3", "--seed", "7"]  # at its own scale
        assert error(found, latent) > 1e-3 and np.array_equal(found, made(tmp_path, *expected, *changed)), changed


def test_another_program_s_picture_gives_what_it_says(tmp_path):
    text = "a red car on grass\nNegative prompt: a cat\nSteps: 3, Sampler: DPM++ 2M, Schedule type: Karras, "
    text += "CFG scale: 3.5, Seed: 42, Size: 72x64, Model hash: 6ce0161689, Model: Flatland, Version: v1.10.1"
    info = PngInfo()
    info.add_text("parameters", text)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    args = sample.parse(["--from", str(tmp_path / "a.png")])
    assert (args.prompt, args.negative, args.guidance, args.scale) == ("a red car on grass", "a cat", "cfg", 3.5)
    assert (args.steps, args.sampler, args.spacing, args.seed, args.size) == (3, "dpmpp_2m", "karras", 42, (72, 64))
    assert (args.count, args.batch) == (1, 1)


def test_a_sampler_and_its_schedule_in_one_name_are_both_read():
    """As the WebUI wrote them before it told schedules apart."""
    assert options({"Sampler": "DPM++ 2M Karras"})[:2] == ["--spacing=karras", "--sampler=dpmpp_2m"]
    assert options({"Sampler": "Euler a"})[:1] == ["--sampler=euler_ancestral"]


@pytest.mark.slow
def test_an_option_of_zero_switches_off_what_the_picture_has(tmp_path):
    common = ("--steps", "2", "--guidance", "cfg")
    made(tmp_path, *common, "--pag", "2", "--rescale", "0.7")
    picture = str(tmp_path / "00000-0.png")
    plain = made(tmp_path, *common)
    assert error(made(tmp_path, "--from", picture), plain) > 1e-3
    assert np.array_equal(made(tmp_path, "--from", picture, "--pag", "0", "--rescale", "0"), plain)


LINE = "Steps: 3, Seed: 1, Size: 64x64, "
HOSTILE = {
    "no settings": ("a cat", "no settings"),
    "class": (LINE + 'Guidance: "{\\"class\\": \\"os.system\\"}"', "none of the classes"),
    "no JSON": (LINE + "Guidance: {{{", "--guidance"),
    "steps": ("Steps: 10000000, Seed: 1, Size: 64x64", "from 1 to 1000"),
    "size": ("Steps: 3, Seed: 1, Size: 99999x99999", "give WIDTHxHEIGHT"),
    "seed": ("Steps: 3, Seed: -1, Size: 64x64", "no whole numbers"),
    "batch": (LINE + "Batch size: 100000", "from 1 to 10000"),
    "place": (LINE + "Batch size: 2, Batch pos: 5", "a seed below 0"),
    "sampler": (LINE + "Sampler: magic", "invalid choice"),
    "regions": (LINE + 'Region prompts: "{}"', "no list of texts"),
    "region": (LINE + 'Region prompts: "[\\"((:prompt=x\\"]"', "no area"),
    "model": (LINE + "Model: other", "give its file with --checkpoint"),
    "vae": (LINE + "Model: Flatland, VAE: other", "give its file with --vae"),
    "deep": (LINE + f'Guidance: "{"[" * 100000}"', "--guidance"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_are_refused_in_one_line(tmp_path, monkeypatch, capsys, name):
    text, message = HOSTILE[name]
    info = PngInfo()
    info.add_text("parameters", "a cat\n" + text)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    monkeypatch.setattr(sys, "argv", ["sample.py", "--from", "a.png", "--out", "out"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        sample.main()
    said = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and len(said) == 1 and message in said[0] and len(said[0]) < 500, said
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_guidance_is_read_from_json_typed_and_in_a_file(tmp_path):
    guidance = scfg.Guidance(scale=scfg.CFG(3.0), perturb=scfg.PAG(1.0))
    text = json.dumps(scfg.to_dict(guidance))
    (tmp_path / "mine.json").write_text(text)
    for given in (text, str(tmp_path / "mine.json")):
        assert sample.parse(["--guidance", given]).guidance == guidance
    latent = made(tmp_path, "--guidance", text, "--steps", "2")
    assert np.array_equal(latent, made(tmp_path, "--guidance", "cfg", "--scale", "3", "--pag", "1", "--steps", "2"))


@pytest.mark.slow
def test_from_the_shell(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "sample.py", "--from", "absent.png"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
