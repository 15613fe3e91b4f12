"""The script with files of other families, a tokenizer and a refiner."""

import itertools
import warnings

import families
import pytest
from conftest import error
from families import FAMILIES
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTokenizer

import sample
from scfg import cli

MERGES = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>")]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Small files of random weights, base and refiner, and the tokenizer for both."""
    folder, vocabulary = tmp_path_factory.mktemp("families"), families.vocabulary(MERGES)
    CLIPTokenizer(vocab=vocabulary, merges=MERGES).save_pretrained(folder / "tokenizer")
    said = {"modelspec.prediction_type": "epsilon"}  # networks of random weights cannot tell
    for name in ("sdxl", "sdxl_refiner"):
        tensors = families.original(families.small(FAMILIES[name], len(vocabulary)))
        save_file(tensors, folder / f"{name}.safetensors", metadata=said)
    return folder


def words(files, folder, *more: str) -> list[str]:
    given = ["cat dog", "--checkpoint", str(files / "sdxl.safetensors"), "--tokenizer", str(files / "tokenizer")]
    return [*given, "--steps", "3", "--size", "64x96", "--out", str(folder), *more]


@pytest.mark.slow
def test_the_script_runs_base_and_refiner_and_says_what_it_runs(files, tmp_path, capsys):
    refiner = ["--refiner", str(files / "sdxl_refiner.safetensors"), "--refiner-from", "0.5"]
    runs, said = [], []
    for more in (
        [],
        refiner,
        ["--clip-skip", "1"],
        ["--negative", "dog"],
        ["--sampler", "euler_ancestral"],
        ["--sampler", "euler_ancestral", "--eta", "0.5"],
    ):
        runs.append(sample.run(sample.parse(words(files, tmp_path, *more))))
        said.append(capsys.readouterr().out)
    alone = "SDXL: 64x96, scfg at scale 5, 3 steps of DPM++ 2M over trailing noise levels, 1 from seed 0"
    assert f"{alone}\n" in said[0] and f"{alone}, refined by sdxl_refiner from 0.5 on\n" in said[1]
    note = "times in 3 steps, 1 of 1 pictures (seed 0): the unconditional context is all zeros"
    assert f"note, 3 {note}" in said[0] and f"note, 2 {note}" in said[1]  # the refiner's context is not
    assert "all zeros" not in said[3]  # nor that of a negative prompt
    facts = [Image.open(path).text["parameters"] for path in sorted(tmp_path.glob("*-0.png"))]
    assert "Refiner: sdxl_refiner, Refiner switch at: 0.5" in facts[1] and "Refiner" not in facts[0]
    assert "Clip skip: 1" in facts[2] and "Negative prompt: dog" in facts[3] and "Eta: 0.5" in facts[5]
    assert all(error(a, b) > 1e-5 for a, b in itertools.combinations(runs, 2)) and runs[0].shape == (1, 4, 12, 8)


def plan(files, folder, *more: str) -> cli.Job:
    args = sample.parse(words(files, folder, *more))
    model = cli.load(args.checkpoint, args)
    return cli.plan(model, args)


@pytest.mark.slow
def test_a_refiner_that_never_takes_over_is_said(files, tmp_path):
    refiner = ["--refiner", str(files / "sdxl_refiner.safetensors"), "--sampler", "euler"]
    with pytest.warns(UserWarning, match="the refiner never takes over: none of the 4 steps lies in its share"):
        plan(files, tmp_path, *refiner, "--steps", "4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan(files, tmp_path, *refiner, "--steps", "5")


@pytest.mark.slow
def test_a_base_as_refiner_and_a_refiner_as_base_are_said(files, tmp_path):
    with pytest.warns(UserWarning, match="SDXL is no refiner: it is used as one all the same"):
        plan(files, tmp_path, "--refiner", str(files / "sdxl.safetensors"), "--steps", "9")
    with pytest.warns(UserWarning, match="the SDXL refiner finishes what SDXL began and is poor at starting"):
        plan(files, tmp_path, "--checkpoint", str(files / "sdxl_refiner.safetensors"))
