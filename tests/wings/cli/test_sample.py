"""The script as its users run it, on the embedded checkpoint."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA, error
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sample
import scfg
from scfg import cli, from_dict
from scfg.cli.infotext import read
from scfg.diffusion import embedded_checkpoint
from scfg.formats.whole import HOST
from scfg.guidance import Guidance, named_rule

ROOT = Path(__file__).parents[3]
CAPTION = "a red car left of a blue star on grass"


def script(*words: str, folder: Path) -> subprocess.CompletedProcess:
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, ROOT / "sample.py", *words]
    return subprocess.run(command, cwd=folder, env=offline, capture_output=True, text=True)


def made(folder: Path, *words: str) -> torch.Tensor:
    """The final latents of the command."""
    return sample.run(sample.parse([*words, "--device", "cpu", "--out", str(folder)]))


def facts(path: Path) -> str:
    with Image.open(path) as picture:
        return picture.text["parameters"]


@pytest.mark.slow
def test_the_bare_command_makes_a_picture_and_its_regions(tmp_path):
    done = script(folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["00000-0-regions.png", "00000-0.png"]
    with Image.open(tmp_path / "out" / "00000-0.png") as picture:
        assert picture.size == (64, 64) and max(high - low for low, high in picture.getextrema()) > 100
    prompt, own = facts(tmp_path / "out" / "00000-0.png").split("\n")
    assert prompt == CAPTION
    assert own.startswith(
        "Steps: 30, Sampler: DPM++ 2M, Schedule type: linspace, CFG scale: 2, Seed: 0, Size: 64x64, Model: Flatland"
    )
    assert facts(tmp_path / "out" / "00000-0-regions.png") == f"{prompt}\n{own}"
    said = done.stdout.splitlines()
    assert said[0].startswith(
        "Flatland: 64x64, scfg at scale 2, 30 steps of DPM++ 2M over linspace noise levels, 1 from"
    )
    assert said[1:3] == ["out/00000-0-regions.png", "out/00000-0.png"] and said[-1].startswith("load ")


def test_nothing_is_printed_where_there_is_no_note(tmp_path, capsys):
    """No empty line either, which sample.py's print of no note lines would leave."""
    made(tmp_path, "--steps", "1")
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4 and all(said), said


def test_notes_are_printed_at_the_end(tmp_path, capsys):
    """Of every batch; a text without a known word has flat maps."""
    with pytest.warns(UserWarning, match="this model never saw 'qqq'"):
        made(tmp_path, "qqq", "--steps", "3", "--seed", "4", "--count", "2", "--batch", "1")
    *_, note, last = capsys.readouterr().out.splitlines()
    assert note.startswith("note, ") and last.startswith("load ")
    assert note.endswith(" times in 6 steps, 2 of 2 pictures (seed 4, 5): attention shows no regions: plain CFG there")


@pytest.mark.parametrize("guidance", ["scfg", "scfg-paper", "scfg-mean", "scfg-cond", "cfg"])
@pytest.mark.slow
def test_every_guidance_in_batches_of_any_size(flat, tmp_path, guidance):
    steps = "3" if guidance == "cfg" else "1"
    words = ["a blue fish at sea", "--guidance", guidance, "--count", "3", "--steps", steps, "--seed", "7"]
    for folder, batch in (("a", "2"), ("b", "1")):
        made(tmp_path / folder, *words, "--batch", batch)
    names = [f"0000{i}-{7 + i}.png" for i in range(3)]
    for name in names:
        a, b = (np.asarray(Image.open(tmp_path / folder / name)).astype(int) for folder in "ab")
        assert np.mean(abs(a - b) <= 1) >= 0.999
        assert (tmp_path / "a" / name.replace(".png", "-regions.png")).exists()
        said = read(facts(tmp_path / "a" / name)).facts
        assert said["Seed"] == name[6] and from_dict(json.loads(said["Guidance"])).scale == named_rule(
            guidance, 2.0, flat.config
        )
    assert not np.array_equal(*(np.asarray(Image.open(tmp_path / "a" / name)) for name in names[:2]))


@pytest.mark.parametrize(
    "sampler, spacing, eta", [("dpmpp_2m", None, None), ("ddim", None, "0.5"), ("heun", "karras", None)]
)
@pytest.mark.parametrize("guidance", ["scfg", "scfg-paper", "cfg"])
@pytest.mark.slow
def test_the_command_makes_what_the_python_api_makes(flat, tmp_path, guidance, sampler, spacing, eta):
    """Regions that are read for the report only, as with plain guidance, change no picture."""
    words = [
        "--guidance",
        guidance,
        "--scale",
        "3",
        "--sampler",
        sampler,
        "--steps",
        "4",
        "--seed",
        "5",
        "--count",
        "2",
    ]
    words += ["--spacing", spacing] if spacing else []
    found = made(tmp_path, *words, *(["--eta", eta] if eta else []))

    def run(*given):
        return scfg.SAMPLERS[sampler](*given, **({"eta": float(eta)} if eta else {}))

    rule, sigmas = named_rule(guidance, 3.0, flat.config), flat.sigmas(4, sampler, spacing)
    *_, step = flat.sample([CAPTION] * 2, rule, sampler=run, sigmas=sigmas, seeds=5)
    assert error(found, step.latent) < 1e-5
    assert (step.denoised.scale.std() > 0.1) == (guidance != "cfg")
    picture = flat.decode(step.latent)[1].permute(1, 2, 0).numpy() * 255
    with Image.open(tmp_path / "00001-6.png") as written:
        assert abs(np.asarray(written) - picture).max() < 0.6


TOGETHER = {
    "--negative": ["a blue fish at sea"],
    "--guidance": ["scfg-paper"],
    "--scale": ["4"],
    "--direction": ["apg"],
    "--pag": ["2"],
    "--rescale": ["0.7"],
    "--interval": ["0.3", "9"],
    "--sampler": ["dpmpp_2m_sde"],
    "--spacing": ["trailing"],
    "--eta": ["0.5"],
    "--clip-skip": ["2"],
    "--seed": ["3"],
    "--size": ["72x64"],
    "--dtype": ["bfloat16"],
    "--prediction": ["v"],
    "--offload": [],
}
MASKED = "mask.png & ~blue star"
REGIONS = [["red car", "scale=9", "start=0.3"], [MASKED, "times=0.5", "end=0.5", "feather=2", "base=0.5"]]
FISH = "prompt=a pink fish, at sea"


def together(folder: Path, options: dict[str, list[str]], regions: list[list[str]], fish: str = FISH) -> torch.Tensor:
    words = [word for name, values in options.items() for word in (name, *values)]
    for i, (area, *asked) in enumerate(regions):
        area = area.replace("mask.png", str(folder.parent / "mask.png"))
        words += ["--region", f"{area}:{','.join([*asked, fish] if i == len(regions) - 1 and fish else asked)}"]
    return made(folder, *words, "--steps", "5")


@pytest.fixture(scope="module")
def all_together(tmp_path_factory) -> tuple[torch.Tensor, Path]:
    """The latents of everything in one command, and its folder."""
    folder = tmp_path_factory.mktemp("together")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 16, 64, 64))
    mask.save(folder / "mask.png")
    return together(folder / "whole", TOGETHER, REGIONS), folder / "whole"


def test_everything_together_in_one_command(all_together):
    latent, folder = all_together
    assert torch.equal(latent, together(folder.parent / "again", TOGETHER, REGIONS))
    pictures = [Image.open(folder.parent / name / "00000-3.png") for name in ("whole", "again")]
    assert np.array_equal(*map(np.asarray, pictures)) and pictures[0].size == (72, 64)
    said = read(pictures[0].text["parameters"])
    assert said[:2] == (CAPTION, "a blue fish at sea")
    expected = {"Steps": "5", "Sampler": "DPM++ 2M SDE", "Schedule type": "trailing", "CFG scale": "4", "Seed": "3"}
    expected |= {"Size": "72x64", "Model": "Flatland", "Eta": "0.5", "Clip skip": "2", "Precision": "bfloat16"}
    assert said.facts.items() >= expected.items()
    guidance = from_dict(json.loads(said.facts["Guidance"]))
    assert guidance.scale.base == replace(scfg.SCFG.paper(4.0), min_contrast=1.18)
    assert (
        guidance.scale.regions[0] == scfg.Region("red car", scale=9.0, start=0.3) and len(guidance.scale.regions) == 2
    )
    assert (guidance.perturb, guidance.direction) == (scfg.PAG(2.0), scfg.APG())
    assert (guidance.rescale, guidance.when) == (scfg.Rescale(0.7), scfg.Interval(0.3, 9.0))


SAME = {"--prediction", "--offload"}  # as the embedded model is anyway; and where the towers are on the cpu


@pytest.mark.parametrize("without", TOGETHER)
@pytest.mark.slow
def test_every_option_acts_beside_all_others(all_together, without):
    """The command with everything, but for this option, makes another picture."""
    latent, folder = all_together
    options = {name: values for name, values in TOGETHER.items() if name != without}
    if without == "--sampler":
        options["--sampler"] = ["euler_ancestral"]  # the default takes no eta
    found = together(folder.parent / without, options, REGIONS)
    if without in SAME:
        assert torch.equal(found, latent)
    else:
        assert found.shape != latent.shape or error(found, latent) > 1e-3


@pytest.mark.slow
def test_every_part_of_a_region_acts_beside_all_others(all_together):
    latent, folder = all_together
    cases = {"first": REGIONS[1:], "second": REGIONS[:1]}
    for region, (_, *asked) in enumerate(REGIONS):
        for name in asked:
            rest = [other for other in REGIONS[region] if other != name]
            cases[name] = [rest if i == region else other for i, other in enumerate(REGIONS)]
    del cases["scale=9"]  # the only thing that is asked for there
    for name, regions in cases.items():
        found = together(folder.parent / name, TOGETHER, regions, "" if name == "second" else FISH)
        assert error(found, latent) > 1e-3, name
    assert error(together(folder.parent / "no fish", TOGETHER, [REGIONS[0], REGIONS[1][:4]], ""), latent) > 1e-3
    for i, area in enumerate(("mask.png", "~blue star", "mask.png & ~foreground")):
        regions = [REGIONS[0], [area, *REGIONS[1][1:]]]
        assert error(together(folder.parent / f"area {i}", TOGETHER, regions), latent) > 1e-3, area


@pytest.mark.parametrize(
    "words, said",
    [
        (["--ramp", "linear"], '"Ramp"'),
        (["--ramp", "cosine"], '"cosine"'),
        (["--direction", "zero"], '"OptimizedScale"'),
        (["--direction", "tcfg"], '"TCFG"'),
        (["--direction", "fdg"], '"FDG"'),
        (["--seg", "3"], '"SEG"'),
        (["--prediction", "eps"], "Prediction: eps"),
        (["--sampler", "euler_cfg_pp"], "Euler CFG++"),
    ],
)
@pytest.mark.slow
def test_options_that_do_not_go_with_the_others_act(tmp_path, words, said):
    plain, found = made(tmp_path, "--steps", "4"), made(tmp_path, "--steps", "4", *words)
    # the middle block's queries hardly differ in this model, so that blurring them changes little
    assert error(found, plain) > (1e-5 if "--seg" in words else 1e-3)
    assert said in facts(tmp_path / "00001-0.png").replace('\\"', '"')


def test_another_files_vae_decodes(tmp_path):
    tensors = load_file(embedded_checkpoint())
    tensors["first_stage_model.decoder.conv_out.bias"] += 0.5
    with safe_open(embedded_checkpoint(), "pt") as file:
        save_file(tensors, tmp_path / "brighter.safetensors", file.metadata())
    found = made(tmp_path, "--steps", "1", "--vae", str(tmp_path / "brighter.safetensors"))
    assert torch.equal(found, made(tmp_path, "--steps", "1"))
    brighter, plain = (np.asarray(Image.open(tmp_path / f"0000{i}-0.png")).astype(int) for i in range(2))
    assert 20 < (brighter - plain).mean() < 70  # a quarter of all brightness, where there is room for it
    assert "VAE: brighter" in facts(tmp_path / "00000-0.png") and "VAE" not in facts(tmp_path / "00001-0.png")


READ = {  # every option: what is given, and what is read
    "negative": (["a cat"], "a cat"),
    "literal": ([], True),
    "no-regions": ([], True),
    "resume": ([], True),
    "emphasis": (["original"], "original"),
    "guidance": (["scfg-mean"], "scfg-mean"),
    "scale": (["4.5"], 4.5),
    "direction": (["zero"], "zero"),
    "pag": (["3"], 3.0),
    "seg": (["3"], 3.0),
    "rescale": (["0.7"], 0.7),
    "interval": (["0.3", "5"], [0.3, 5.0]),
    "ramp": (["cosine"], "cosine"),
    "sampler": (["unipc"], "unipc"),
    "spacing": (["karras"], "karras"),
    "eta": (["0.5"], 0.5),
    "steps": (["12"], 12),
    "size": (["512X768"], (512, 768)),
    "seed": (["9223372036854775807"], 2**63 - 1),
    "count": (["3"], 3),
    "batch": (["2"], 2),
    "checkpoint": (["a.ckpt"], Path("a.ckpt")),
    "refiner": (["b.safetensors"], Path("b.safetensors")),
    "vae": (["c.safetensors"], Path("c.safetensors")),
    "text": (["d.safetensors"], [Path("d.safetensors")]),
    "ema": ([], True),
    "zero-terminal-snr": ([], True),
    "verbose": ([], True),
    "prediction": (["eps"], "eps"),
    "clip-skip": (["2"], 2),
    "tokenizer": (["folder"], Path("folder")),
    "device": (["cpu"], "cpu"),
    "offload": ([], True),
    "compile": ([], True),
    "dtype": (["float16"], "float16"),
    "out": (["elsewhere"], Path("elsewhere")),
}
DEFAULTS = {
    "prompt": CAPTION,
    "guidance": "scfg",
    "sampler": "dpmpp_2m",
    "steps": 30,
    "seed": 0,
    "count": 1,
    "batch": 4,
}
DEFAULTS |= {
    "region": [],
    "literal": False,
    "no_regions": False,
    "resume": False,
    "text": [],
    "ema": False,
    "zero_terminal_snr": False,
    "verbose": False,
    "offload": False,
    "compile": False,
    "out": Path("out"),
    "device": "cuda" if torch.cuda.is_available() else "cpu",
}


def test_every_option_is_read_and_has_its_default():
    bare = vars(sample.parse([]))
    assert set(bare) == {name.replace("-", "_") for name in READ} | {"prompt", "region", "refiner_from", "picture"}
    assert {name: value for name, value in bare.items() if value is not None} == DEFAULTS
    for name, (words, value) in READ.items():
        found = vars(sample.parse([f"--{name}", *words]))
        changed = {name.replace("-", "_"): value}
        assert found == bare | changed, name
    assert sample.parse(["--refiner", "b.safetensors", "--refiner-from", "0.5"]).refiner_from == 0.5
    assert [option.text for option in sample.parse(["--region", "a:scale=1", "--region", "b:times=2"]).region] == [
        "a:scale=1",
        "b:times=2",
    ]


@pytest.mark.parametrize(
    "words, never",
    [
        (["--region", "car:scale=9,start=0.99"], ["'car: scale 9, from 0.99'"]),
        (["--region", "car:end=0.01,prompt=a pink star"], ["'car:end=0.01,prompt=a pink star'"]),
        (["--interval", "20", "30", "--region", "car:scale=9"], ["guidance", "'car: scale 9'"]),
        (["--interval", "0.3", "9", "--region", "car:scale=9"], []),
    ],
)
def test_what_never_acts_is_said(tmp_path, words, never):
    args = sample.parse([*words, "--steps", "5", "--out", str(tmp_path)])
    model = cli.load(args.checkpoint, args)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        cli.plan(model, args)
    lines = [f"{what} never acts: none of the 5 steps lies in its time" for what in never]
    assert [str(warning.message) for warning in said] == lines


def test_earlier_pictures_stay(tmp_path):
    for _ in range(2):
        made(tmp_path, "--steps", "1")
    assert sorted(path.name for path in tmp_path.glob("*-0.png")) == ["00000-0.png", "00001-0.png"]


def test_numbers_count_on_from_the_highest(tmp_path):
    assert cli.next_number(tmp_path) == 0
    for name in ("00007-3.png", "00002-1-regions.png", "holiday-2024.png", "99-x.jpg", "12.png"):
        (tmp_path / name).touch()
    assert cli.next_number(tmp_path) == 8


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    image = Image.new("RGB", (4, 4))

    def torn(path, *words, **options):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image, "save", torn)
    with pytest.raises(scfg.BadInput, match=r"cannot write .*00000-0-regions.png \(No space left on device\)"):
        cli.save(tmp_path, 0, "text", image, image)
    assert not list(tmp_path.iterdir())


def test_a_number_that_another_process_took_in_the_same_moment_is_left_to_it(tmp_path, monkeypatch):
    """Both found it free; the second goes on to the next, and nothing is overwritten, with hard links or without."""
    image = Image.new("RGB", (4, 4))
    monkeypatch.setattr("scfg.cli.files.next_number", lambda folder: 0)
    for i, no_links in enumerate((False, False, True, True)):
        if no_links:
            monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(1, "Operation not permitted")))
        cli.save(tmp_path, 0, f"text {i}", image, image)
    assert len(list(tmp_path.iterdir())) == 8
    for i in range(4):
        assert Image.open(tmp_path / f"{i:05d}-0.png").text["parameters"] == f"text {i}"


def test_options_change_a_guidance_that_is_given_as_a_whole(flat, tmp_path):
    """As JSON, or in a picture that --from repeats."""

    def guidance(*words: str) -> scfg.Guidance:
        args = sample.parse([*words, "--steps", "1"])
        cli.plan(flat, args)
        return args.guidance

    made(tmp_path, "--steps", "1", "--region", "red car:scale=5", "--rescale", "0.5")
    (picture,) = tmp_path.glob("*-0.png")
    own = guidance("--from", str(picture))
    assert own.rescale == scfg.Rescale(0.5) and own.scale.base.gamma == 2 and len(own.scale.regions) == 1
    words = [
        "--scale",
        "4",
        "--region",
        "blue star:times=2",
        "--pag",
        "3",
        "--interval",
        "1",
        "5",
        "--direction",
        "apg",
    ]
    changed = guidance("--from", str(picture), *words)
    assert changed.scale == scfg.ByRegion(
        replace(own.scale.base, gamma=4.0), (*own.scale.regions, scfg.Region("blue star", times=2.0))
    )
    assert (changed.perturb, changed.rescale, changed.when) == (scfg.PAG(3.0), own.rescale, scfg.Interval(1.0, 5.0))
    assert isinstance(changed.direction, scfg.APG)
    energy = json.dumps(scfg.to_dict(Guidance(scale=scfg.Energy())))
    assert guidance("--guidance", energy, "--seg", "2") == Guidance(scale=scfg.Energy(), perturb=scfg.SEG(2.0))
    with pytest.raises(scfg.BadInput, match="--scale does not act on Energy"):
        guidance("--guidance", energy, "--scale", "3")


def test_an_empty_negative_prompt_is_not_the_same_as_none(tmp_path, flat):
    args = sample.parse(["--negative", "", "--steps", "1"])
    cli.plan(flat, args)
    image = Image.new("RGB", (4, 4))
    cli.save(tmp_path, 0, cli.parameters(args, flat, [0], 0), image, image)
    assert sample.parse(["--from", str(tmp_path / "00000-0.png")]).negative == ""
    made(tmp_path, "--steps", "1")
    assert sample.parse(["--from", str(tmp_path / "00001-0.png")]).negative is None


def test_what_killed_runs_left_behind_is_swept_away(tmp_path):
    with subprocess.Popen(["true"]) as dead:
        pass
    (tmp_path / f".a.png.{HOST}.{dead.pid}.part").touch()
    kept = {f".b.png.{HOST}.{os.getpid()}.part", f".c.png.elsewhere.{dead.pid}.part", "own.part"}
    for name in kept:
        (tmp_path / name).touch()
    cli.check_writable(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_a_run_that_was_interrupted_goes_on_with_what_is_missing(tmp_path, capsys):
    """To the bit, also in the middle of a batch; what is there already is not made again."""
    words = ("--steps", "2", "--count", "5", "--batch", "2")
    whole = made(tmp_path / "whole", *words)
    made(tmp_path / "part", "--steps", "2", "--count", "4", "--batch", "2")
    for path in (*(tmp_path / "part").glob("*-1.png"), *(tmp_path / "part").glob("*-1-regions.png")):
        path.unlink()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "part").iterdir()}
    rest = made(tmp_path / "part", *words, "--resume")
    assert len(rest) == 3 and torch.equal(rest, whole[[0, 1, 4]])  # the batches of seed 1 and of seed 4
    after = sorted(path.name.split("-", 1)[1] for path in (tmp_path / "part").iterdir())
    assert after == sorted(path.name.split("-", 1)[1] for path in (tmp_path / "whole").iterdir())
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert len(made(tmp_path / "part", *words, "--resume")) == 0
    assert "nothing to make: " in capsys.readouterr().out
    more = made(tmp_path / "part", *words, "--resume", "--count", "7", "--batch", "4")  # in other batches
    assert len(more) == 3 and len(list((tmp_path / "part").glob("*-regions.png"))) == 7  # the batch of seeds 4 to 6
    assert len(made(tmp_path / "part", *words, "--resume", "--scale", "3")) == 5  # of another setting there is none


def test_a_file_name_that_is_no_text_loses_no_picture(tmp_path, flat):
    named = Path(os.fsdecode(os.fsencode(tmp_path) + b"/va\xe9.safetensors"))
    args = sample.parse(["--steps", "1"])
    cli.plan(flat, args)
    args.vae = named
    text, image = cli.parameters(args, flat, [0], 0), Image.new("RGB", (4, 4))
    cli.save(tmp_path, 0, text, image, image)
    assert "VAE: va\ufffd" in facts(tmp_path / "00000-0.png")
    shutil.copy(embedded_checkpoint(), named)  # which the library refuses to open
    with pytest.raises(scfg.BadInput, match=r"va\\udce9.safetensors' has a name that is no text.*: rename it"):
        scfg.load(named)


WRONG = {
    "no quotes": (["a", "red", "car"], 'the prompt is one argument: put it in quotes, "a red car"'),
    "no quotes, with options": (["--steps", "3", "a", "red", "car", "--seed", "1"], 'in quotes, "a red car"'),
    "unrecognized": (["a red car", "--cfg", "7"], "unrecognized arguments: --cfg 7"),
    "unrecognized flag": (["--upscale"], "unrecognized arguments: --upscale"),
    "no value at all": (["--steps"], "expected one argument"),
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
    "no guidance": (["--guidance", "magic"], "'magic': it is one of scfg, scfg-paper"),
    "not UTF-8": (["a red \udce9 car"], "not UTF-8"),
    "eta": (["--eta", "0.5"], "dpmpp_2m adds none"),
    "no refiner": (["--refiner-from", "0.5"], "give its file with --refiner"),
    "clip skip": (["--clip-skip", "9"], "1 to 2, not 9"),
    "no vae": (["--vae", "absent.safetensors"], "no such file"),
    "no file": (["--checkpoint", "absent.safetensors"], "no such file"),
    "odd device": (["--device", "toaster"], "not available"),
    "no tokenizer": (["--tokenizer", "absent"], "no tokenizer"),
    "no folder": (["--out", "/proc/pictures"], "choose another with --out"),
    "a file as folder": (["--out", __file__], "choose another with --out"),
    "absent word": (["--region", "tree:scale=9"], "'tree' is not in the prompt, whose words are: a red car left of"),
    "absent mask": (["--region", "sky.png:scale=9"], "sky.png is not there"),
    "empty region": (["--region", "car"], "asks for nothing: give a scale, times or a prompt"),
    "no area": (["--region", ":scale=9"], "is no area: it is made of words of the prompt"),
    "odd option": (["--region", "car:colour=red"], "asks for 'colour'"),
    "odd value": (["--region", "car:scale=big"], "car:scale=big': scale 'big' is no number from 0 to 1000"),
    "no value": (["--region", "car:scale"], "'car:scale': scale '' is no number"),
    "twice the same": (["--region", "car:scale=3,scale=9"], "gives scale twice"),
    "no comma": (["--region", "car:scale=9prompt=a pink star"], "'9prompt=a pink star' is no number"),
    "base alone": (["--region", "car:scale=3,base=0.5"], "base is what the whole prompt still counts"),
    "option after a prompt": (["--region", "car:prompt=a star,start=0.2"], "start comes after the prompt"),
    "no JSON": (["--guidance", "{"], "argument --guidance: '{': "),
    "no such JSON": (["--guidance", "absent.json"], "'absent.json': "),
    "hostile JSON": (["--guidance", '{"class": "os.system"}'], "is none of the classes Guidance, CFG"),
    "no picture": (["--from", "absent.png"], "absent.png is not there"),
    "picture without text": (["--from", str(ROOT / "weights" / "sheet.png")], "no text that says how it was made"),
    "two perturbations": (["--pag", "1", "--seg", "1"], "not allowed with argument"),
    "no time": (["--region", "car:scale=5,start=0.9,end=0.1"], "is over before it starts"),
    "region not UTF-8": (["--region", "car:prompt=a pink \udce9 star"], "not UTF-8"),
    "empty interval": (["--interval", "9", "0.3"], "give the lower one first"),
    "two times": (["--interval", "1", "2", "--ramp", "linear"], "not allowed with argument"),
    "no text tower": (["--checkpoint", str(DATA / "tiny_sd1.safetensors")], "no text tower"),
    "foreign refiner": (["--refiner", str(DATA / "tiny_sd1.safetensors")], "cannot refine what Flatland began"),
}
if not torch.cuda.is_available():
    WRONG["no device"] = ["--device", "cuda"], "not available"


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_one_line_and_exit_2(tmp_path, case, monkeypatch, capsys):
    words, message = WRONG[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sample.py", *words])
    with pytest.raises(SystemExit) as caught:
        sample.main()
    said = [line for line in capsys.readouterr().err.splitlines() if "answer to noise is unsure" not in line]
    assert caught.value.code == 2
    assert len(said) == 1 and said[0].startswith("sample.py: ") and message in said[0], said
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.slow
def test_wrong_use_from_the_shell(tmp_path):
    for words in (["--steps", "0"], ["a", "red", "car"], ["--cfg", "7"]):
        done = script(*words, folder=tmp_path)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not done.stdout


@pytest.mark.parametrize(
    "raised, code, line",
    [
        (FloatingPointError("step 1 of 2\nis not finite"), 2, "sample.py: step 1 of 2 is not finite"),
        (OSError("disk"), 2, "sample.py: disk"),
        (MemoryError(), 2, "sample.py: not enough memory for this: try a smaller --size or --batch"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "sample.py: not enough memory for this"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "sample.py: not enough memory for this"),
        (KeyboardInterrupt(), 130, "interrupted. Pictures named above are whole"),
    ],
)
def test_what_ends_a_run_is_said_in_a_line(tmp_path, monkeypatch, capsys, raised, code, line):
    def run(args):
        raise raised

    monkeypatch.setattr(sample, "run", run)
    monkeypatch.setattr(sys, "argv", ["sample.py"])
    with pytest.raises(SystemExit) as caught:
        sample.main()
    said = [line for line in capsys.readouterr().err.splitlines() if line]
    assert caught.value.code == code and len(said) == 1 and said[0].startswith(line)


def test_what_nobody_expected_is_not_hidden(monkeypatch):
    def run(args):
        raise RuntimeError("a fault of the program")

    monkeypatch.setattr(sample, "run", run)
    monkeypatch.setattr(sys, "argv", ["sample.py"])
    with pytest.raises(RuntimeError, match="a fault of the program"):
        sample.main()


def test_help_names_the_world_and_what_is_native(capsys):
    with pytest.raises(SystemExit) as caught:
        sample.parse(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert not caught.value.code
    assert "mushroom" in said and "SDXL 1024x1024, scale 5, trailing spacing" in said
    assert all(f"--{name}" in said for name in (*READ, "region", "refiner-from"))


def test_offloading_on_a_cpu_is_said_to_do_nothing(tmp_path):
    with pytest.warns(UserWarning, match="--offload does nothing on a CPU"):
        made(tmp_path, "--steps", "1", "--offload")


@pytest.mark.slow
def test_warnings_are_no_errors_whatever_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONWARNINGS", "error::UserWarning")
    done = script("a zebra", "--steps", "1", folder=tmp_path)
    assert done.returncode == 0 and "warning: this model never saw 'zebra'" in done.stderr, done.stderr


@pytest.mark.slow
def test_compiled_steps_are_timed_and_make_the_same_picture(tmp_path, capsys):
    torch._dynamo.reset()
    plain = made(tmp_path, "--steps", "2")
    assert "compiling" not in capsys.readouterr().out
    compiled = made(tmp_path, "--steps", "2", "--compile")
    assert re.search(r"sampling [\d.]+ s \(compiling [\d.]+ s\)", capsys.readouterr().out)
    assert (compiled - plain).abs().max() < 1e-3 * plain.abs().max()
