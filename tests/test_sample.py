"""The script as its users run it."""
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import DATA
from PIL import Image

import sample

ROOT = Path(__file__).parent.parent


def script(*words: str, folder: Path) -> subprocess.CompletedProcess:
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, ROOT / "sample.py", *words], cwd=folder, env=offline, capture_output=True, text=True)


def test_the_bare_command_makes_a_picture_and_its_regions(tmp_path):
    done = script(folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["00000-0-regions.png", "00000-0.png"]
    assert "out/00000-0.png" in done.stdout and "load" in done.stdout
    with Image.open(tmp_path / "out" / "00000-0.png") as picture:
        assert picture.size == (64, 64)
        prompt, facts = picture.text["parameters"].split("\n")
    assert prompt == "a red car left of a blue star on grass"
    assert facts.startswith("Steps: 30, Sampler: DPM++ 2M, CFG scale: ") and "Seed: 0, Size: 64x64, Model: Flatland" in facts


@pytest.mark.parametrize("guidance", ["scfg", "scfg-paper", "scfg-mean", "scfg-cond", "cfg"])
def test_every_guidance_in_batches_of_any_size(tmp_path, guidance, capsys):
    words = ["a blue fish at sea", "--guidance", guidance, "--count", "3", "--steps", "3" if guidance == "cfg" else "1", "--seed", "7", "--out"]
    sample.run(sample.parse([*words, str(tmp_path / "a"), "--batch", "2"]))
    sample.run(sample.parse([*words, str(tmp_path / "b"), "--batch", "1"]))
    names = [f"0000{i}-{7 + i}.png" for i in range(3)]
    for name in names:
        a, b = (np.asarray(Image.open(tmp_path / folder / name)).astype(int) for folder in "ab")
        assert np.mean(abs(a - b) <= 1) >= 0.999
        assert (tmp_path / "a" / name.replace(".png", "-regions.png")).exists()
        assert f"Seed: {name[6]}," in Image.open(tmp_path / "a" / name).text["parameters"]
    assert not np.array_equal(*(np.asarray(Image.open(tmp_path / "a" / name)) for name in names[:2]))


def test_everything_together_in_one_command(tmp_path):
    Image.new("L", (64, 64), 255).save(tmp_path / "all.png")
    words = ["--direction", "apg", "--pag", "2", "--rescale", "0.7", "--interval", "0.3", "9", "--region", "car:scale=9", "--region",
             f"{tmp_path / 'all.png'} & ~foreground:times=0.5,end=0.6,base=0.5,feather=2,prompt=a pink fish, at sea"]
    for folder in "ab":
        sample.run(sample.parse([*words, "--steps", "4", "--out", str(tmp_path / folder)]))
    pictures = [Image.open(tmp_path / folder / "00000-0.png") for folder in "ab"]
    assert np.array_equal(*map(np.asarray, pictures))
    facts = pictures[0].text["parameters"]
    assert "Direction: apg, PAG scale: 2.0, CFG Rescale phi: 0.7, Interval: 0.3 to 9" in facts and "'car:scale=9'" in facts


@pytest.mark.parametrize("words, never", [
    (["--region", "car:scale=9,start=0.99"], ["'car:scale=9,start=0.99'"]),
    (["--region", "car:end=0.01,prompt=a pink star"], ["'car:end=0.01,prompt=a pink star'"]),
    (["--interval", "20", "30", "--region", "car:scale=9"], ["guidance", "'car:scale=9'"]),
    (["--interval", "0.3", "9", "--region", "car:scale=9"], [])])
def test_what_never_acts_is_said(tmp_path, words, never):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        sample.prepare(sample.parse([*words, "--steps", "5", "--out", str(tmp_path)]))
    assert [str(warning.message) for warning in said] == [f"{what} never acts: none of the 5 steps lies in its time" for what in never]


def test_earlier_pictures_stay(tmp_path):
    for _ in range(2):
        sample.run(sample.parse(["--steps", "1", "--out", str(tmp_path)]))
    assert sorted(path.name for path in tmp_path.glob("*-0.png")) == ["00000-0.png", "00001-0.png"]


WRONG = {
    "no number": (["--steps", "many"], "'many' is no whole number from 1 to 1000"),
    "zero": (["--steps", "0"], "from 1 to 1000"),
    "negative": (["--count", "-3"], "from 1 to 10000"),
    "huge": (["--scale", "1e30"], "'1e30'"),
    "not a number": (["--scale", "nan"], "'nan'"),
    "fraction": (["--seed", "1.5"], "'1.5'"),
    "no size": (["--size", "64"], "give WIDTHxHEIGHT"),
    "zero size": (["--size", "0x64"], "give WIDTHxHEIGHT"),
    "huge size": (["--size", "999999x64"], "up to 8192"),
    "uneven size": (["--size", "66x64"], "64 and 68"),
    "no guidance": (["--guidance", "magic"], "invalid choice: 'magic'"),
    "not UTF-8": (["a red \udce9 car"], "not UTF-8"),
    "eta": (["--eta", "0.5"], "dpmpp_2m adds none"),
    "no refiner": (["--refiner-from", "0.5"], "give its file with --refiner"),
    "clip skip": (["--clip-skip", "9"], "1 to 2, not 9"),
    "no vae": (["--vae", "absent.safetensors"], "no such file"),
    "no file": (["--checkpoint", "absent.safetensors"], "no such file"),
    "no device": (["--device", "cuda"], "not available"),
    "odd device": (["--device", "toaster"], "not available"),
    "no tokenizer": (["--tokenizer", "absent"], "no tokenizer"),
    "no folder": (["--out", "/proc/pictures"], "choose another with --out"),
    "a file as folder": (["--out", __file__], "choose another with --out"),
    "absent word": (["--region", "tree:scale=9"], "'tree' is not in the prompt, whose words are: a red car left of"),
    "absent mask": (["--region", "sky.png:scale=9"], "sky.png is no picture to be used as a mask"),
    "empty region": (["--region", "car"], "asks for nothing: give a scale, times or a prompt"),
    "no area": (["--region", ":scale=9"], "an area is a word of the prompt"),
    "odd option": (["--region", "car:colour=red"], "asks for 'colour'"),
    "odd value": (["--region", "car:scale=big"], "car:scale=big': scale 'big' is no number from 0 to 1000"),
    "no value": (["--region", "car:scale"], "'car:scale': scale '' is no number"),
    "twice the same": (["--region", "car:scale=3,scale=9"], "gives scale twice"),
    "no comma": (["--region", "car:scale=9prompt=a pink star"], "'9prompt=a pink star' is no number"),
    "base alone": (["--region", "car:scale=3,base=0.5"], "base is what the whole prompt still counts"),
    "no time": (["--region", "car:scale=5,start=0.9,end=0.1"], "is over before it starts"),
    "region not UTF-8": (["--region", "car:prompt=a pink \udce9 star"], "not UTF-8"),
    "empty interval": (["--interval", "9", "0.3"], "give the lower one first"),
    "two times": (["--interval", "1", "2", "--ramp", "linear"], "not allowed with argument"),
    "no text tower": (["--checkpoint", str(DATA / "tiny_sd1.safetensors")], "no text tower"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_one_line_and_exit_2(tmp_path, case, monkeypatch, capsys):
    words, message = WRONG[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sample.py", *words])
    with pytest.raises(SystemExit) as caught:
        sample.main()
    said = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2
    assert len(said) == 1 and message in said[0], said
    assert not list(tmp_path.rglob("*.png"))


def test_wrong_use_from_the_shell(tmp_path):
    done = script("--steps", "0", folder=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not done.stdout


def test_help_names_the_world_and_what_is_native(capsys):
    with pytest.raises(SystemExit):
        sample.parse(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "mushroom" in said and "SDXL 1024x1024, scale 5, trailing spacing" in said
