"""Pickled checkpoints, VAEs of other files, tokenizers."""

import argparse
import datetime
import gzip
import itertools
import logging
import os
import pickle
import sys
import tracemalloc
import types
import warnings
from dataclasses import replace
from pathlib import Path

import families
import numpy as np
import pytest
import torch
from conftest import DATA
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPTokenizer

import scfg
from scfg import checkpoint, formats
from scfg.config import SD1, SDXL, TextConfig, VAEConfig
from scfg.diffusion import embedded_checkpoint
from scfg.text import Text, Tower

TINY = DATA / "tiny_sd1.safetensors"
MERGES = [("c", "a"), ("ca", "t</w>"), ("o", "f</w>"), ("t", "h"), ("th", "e</w>")]


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return load_file(TINY)


def saved(folder: Path, tensors: dict[str, Tensor], name: str = "model.safetensors") -> Path:
    save_file(tensors, folder / name)
    return folder / name


def tokenizer(**options) -> CLIPTokenizer:
    return CLIPTokenizer(vocab=formats.vocabulary(MERGES), merges=MERGES, **options)


def test_another_files_vae(tmp_path, tensors, tiny):
    other = {name: -tensor for name, tensor in tensors.items() if name.startswith(checkpoint.FIRST_STAGE)}
    bare = {name.removeprefix(checkpoint.FIRST_STAGE): tensor for name, tensor in other.items()}
    for i, vae in enumerate((other, bare, bare | {"loss.logvar": torch.ones(1), "model_ema.decay": torch.ones(1)})):
        with pytest.warns(UserWarning, match="does not say its family: .* taken for one of SD 1.x"):
            model = scfg.load(TINY, vae=saved(tmp_path, vae, f"{i}.safetensors"))
        assert torch.equal(model.vae.quant_conv.weight, -tiny.vae.quant_conv.weight)
        assert torch.equal(model.unet.out[2].weight, tiny.unet.out[2].weight)
    whole = {name: -tensor for name, tensor in tensors.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a whole checkpoint says its family
        model = scfg.load(TINY, vae=saved(tmp_path, whole, "whole.safetensors"), prediction="eps")
    assert torch.equal(model.vae.quant_conv.weight, -tiny.vae.quant_conv.weight)
    assert torch.equal(model.unet.out[2].weight, tiny.unet.out[2].weight)


def test_a_pickled_files_vae(tmp_path, tensors, tiny):
    torch.save({"state_dict": {name: -tensor for name, tensor in tensors.items()}}, tmp_path / "vae.pt")
    model = scfg.load(TINY, vae=tmp_path / "vae.pt")
    assert torch.equal(model.vae.quant_conv.weight, -tiny.vae.quant_conv.weight)


def test_a_checkpoint_without_a_vae_takes_another_files(tmp_path, tensors, tiny):
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(checkpoint.FIRST_STAGE)}
    bare = saved(tmp_path, rest, "bare.safetensors")
    with pytest.raises(scfg.BadInput, match="bare.safetensors: this checkpoint has no VAE: .* --vae FILE"):
        scfg.load(bare)
    model = scfg.load(bare, vae=TINY)
    assert torch.equal(model.vae.quant_conv.weight, tiny.vae.quant_conv.weight)


def test_broken_vae_files_are_named_and_not_the_checkpoint(tmp_path, tensors):
    vae, i = checkpoint.with_prefix(tensors, checkpoint.FIRST_STAGE), 0
    for change, message in (
        ({"decoder.conv_out.bias": None}, "holds no whole VAE: missing decoder.conv_out.bias"),
        ({"decoder.conv_out.bias": torch.ones(5)}, r"holds no whole VAE: decoder.conv_out.bias is \[5\], not \[3\]"),
        ({"encoder.conv_in.weight": torch.ones(0)}, "holds no VAE of Stable Diffusion's layout"),
    ):
        changed, i = {name: tensor for name, tensor in (vae | change).items() if tensor is not None}, i + 1
        with pytest.raises(scfg.BadInput, match=f"{i}.safetensors {message}"):
            scfg.load(TINY, vae=saved(tmp_path, changed, f"{i}.safetensors"))


def test_a_vae_of_another_family_is_named(tmp_path):
    xl = saved(tmp_path, families.original(replace(families.small(SDXL), text=())), "xl.safetensors")
    sixteen = families.original(families.small(replace(SD1, vae=VAEConfig(latent_channels=16))))
    alone = {name: tensor for name, tensor in sixteen.items() if name.startswith(checkpoint.FIRST_STAGE)}
    rest = {name: tensor for name, tensor in sixteen.items() if name not in alone}
    for file, message in (
        (xl, "xl.safetensors is SDXL, whose latents are not those of SD 1.x"),
        (saved(tmp_path, alone, "16.safetensors"), "latents of 16 channels, those of SD 1.x have 4"),
        (embedded_checkpoint(), "is Flatland, whose latents are not those of SD 1.x"),
        (saved(tmp_path, {"x": torch.ones(1)}, "none.safetensors"), "none.safetensors holds no part of a Stable"),
        (saved(tmp_path, rest, "rest.safetensors"), "rest.safetensors holds no VAE"),
        (tmp_path / "absent.safetensors", "no such file"),
    ):
        with pytest.raises(scfg.BadInput, match=message), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scfg.load(TINY, vae=file)


def test_a_vae_that_overflows_still_does_when_it_is_another_files(tmp_path):
    """What a family's VAE does in float16 is in no file: it comes from the checkpoint's family."""
    tensors = families.original(replace(families.small(SDXL), text=()))
    vae = {name: tensor for name, tensor in tensors.items() if name.startswith(checkpoint.FIRST_STAGE)}
    whole, alone = saved(tmp_path, tensors, "xl.safetensors"), saved(tmp_path, vae, "vae.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = scfg.load(whole, vae=alone, dtype=torch.float16)
    assert model.config.vae.overflows and model.vae.quant_conv.weight.dtype == torch.float32


def test_ckpt_files_load_with_the_one_harmless_class(tmp_path, tensors, tiny, monkeypatch):
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    real = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = real
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    content = {"state_dict": tensors, "callbacks": {real: {"best": 1.0}}, "global_step": 7}
    for zipped in (True, False):
        torch.save(content, tmp_path / "model.ckpt", _use_new_zipfile_serialization=zipped)
        model = scfg.load(tmp_path / "model.ckpt")
        assert torch.equal(model.vae.quant_conv.weight, tiny.vae.quant_conv.weight)
        assert torch.equal(model.unet.out[2].weight, tiny.unet.out[2].weight)


class Harmful:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize("protocol", ["zip", "plain pickle"])
@pytest.mark.parametrize("use", ["checkpoint", "vae"])
def test_code_in_a_pickle_is_named_and_not_run(tmp_path, monkeypatch, protocol, use):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": Harmful()}, path) if protocol == "zip" else path.write_bytes(pickle.dumps(Harmful(), 2))
    with pytest.raises(scfg.BadInput, match=r"holds code \(\w+\.system\), which was not run"):
        scfg.load(path) if use == "checkpoint" else scfg.load(TINY, vae=path)
    assert not (tmp_path / "ran").exists()
    if protocol == "plain pickle":  # the file would do it
        pickle.loads(path.read_bytes())
        assert (tmp_path / "ran").exists()


def test_foreign_harmless_values_beside_the_tensors_are_passed_over(tmp_path, tensors, tiny):
    """As training programs leave them: numbers of numpy, nothing, settings, schedulers, states of the optimizer."""
    beside = {
        "epoch": 7,
        "loss": np.float64(0.5),
        "steps": np.int64(9),
        "best": None,
        "names": ["a", ("b", 2.0)],
        "args": argparse.Namespace(rate=1e-5),
        "rng": np.random.default_rng(0).bit_generator.state,
        "at": datetime.datetime(2024, 1, 1),
        "path": Path("x"),
        "dtype": torch.float16,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-5}]},
    }
    wrapped = {
        "beside": {"state_dict": tensors} | beside,
        "within": {"state_dict": tensors | {"best": np.float32(1.0), "nothing": None, "n": 3}},
        "nested": {"model": {"state_dict": tensors}} | beside,
        "module": {"module": {f"module.{name}": tensor for name, tensor in tensors.items()}},
        "bare": tensors | beside,
    }
    for name, content in wrapped.items():
        torch.save(content, tmp_path / f"{name}.ckpt")
        model = scfg.load(tmp_path / f"{name}.ckpt", prediction="eps")
        assert torch.equal(model.unet.out[2].weight, tiny.unet.out[2].weight), name


KINDS = {  # names and shapes by which files of other kinds are told, and what is said
    "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight": "an SD 3 model",
    "double_blocks.0.img_attn.norm.key_norm.scale": "a Flux model",
    "down_blocks.0.motion_modules.0.temporal_transformer.proj_in.weight": "a motion module of AnimateDiff",
    "controlnet_cond_embedding.conv_in.weight": "a ControlNet",
    "control_model.input_hint_block.0.weight": "a ControlNet",
    "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": "a LoRA",
    "unet.down_blocks.0.attentions.0.proj_in.lora_A.weight": "a LoRA",
    "image_proj.proj.weight": "an IP-Adapter",
    "string_to_param.*": "a textual inversion",
    "body.0.rdb1.conv1.weight": "an upscaler of pictures",
}


@pytest.mark.parametrize("name", KINDS)
def test_files_of_other_kinds_are_named(tmp_path, name):
    with pytest.raises(scfg.BadInput, match=f"other.safetensors: this is {KINDS[name]}, not a checkpoint: give the"):
        scfg.load(saved(tmp_path, {name: torch.ones(4, 4)}, "other.safetensors"))


def relatives(tensors):
    first = checkpoint.UNET + "input_blocks.0.0.weight"
    for channels, what in ((5, "a depth model"), (7, "an upscaler"), (8, "a model that edits"), (9, "an inpainting")):
        yield tensors | {first: torch.ones(32, channels, 3, 3)}, what
    label = {checkpoint.UNET + "label_emb.0.0.weight": torch.ones(4, 4)}
    yield tensors | label, "an unCLIP model"
    yield tensors | {"edm_mean": torch.ones(4), "edm_std": torch.ones(4)}, "Playground 2.5, which is sampled as EDM"
    yield tensors | {"edm_vpred.sigma_max": torch.ones(1)}, "a CosXL model"
    yield tensors | {f"{checkpoint.UNET}time_mixer.mix": torch.ones(1)}, "a video model"


def test_relatives_that_cannot_be_sampled_are_named_with_what_to_do(tmp_path, tensors):
    for i, (changed, what) in enumerate(relatives(tensors)):
        with pytest.raises(scfg.BadInput, match=f"{i}.safetensors: this is {what}.*: .*give ") as caught:
            scfg.load(saved(tmp_path, changed, f"{i}.safetensors"))
        assert "\n" not in str(caught.value)


def test_what_no_sampling_reads_is_said_when_asked_and_what_is_unknown_always(tmp_path, tensors, caplog):
    unread = {"model_ema.decay": torch.ones(1), "control_model.zero.weight": torch.ones(1)}
    path = saved(tmp_path, tensors | unread | {"surprise": torch.ones(2)}, "more.safetensors")
    with caplog.at_level(logging.INFO, "scfg"), pytest.warns(UserWarning, match="ignored 1 tensors .* known: surprise"):
        scfg.load(path, prediction="eps")
    (said,) = [line for line in caplog.messages if "does not read" in line]
    assert "control_model.zero.weight" in said and "model_ema.decay" in said and "\n" not in said
    with pytest.raises(scfg.BadInput, match="unexpected model.diffusion_model.surprise"):
        scfg.load(saved(tmp_path, tensors | {"model.diffusion_model.surprise": torch.ones(2)}), prediction="eps")


def test_a_later_files_unet_and_vae_are_not_taken(tmp_path, tensors, tiny, caplog):
    other = saved(tmp_path, {name: -tensor for name, tensor in tensors.items()}, "other.safetensors")
    with caplog.at_level(logging.INFO, "scfg"):
        model = scfg.load([TINY, other], prediction="eps")
    assert torch.equal(model.unet.out[2].weight, tiny.unet.out[2].weight)
    assert torch.equal(model.vae.quant_conv.weight, tiny.vae.quant_conv.weight)
    assert "other.safetensors: only nothing is taken" in caplog.text


def broken_files(tmp_path, tensors):
    def written(name, content):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    whole = TINY.read_bytes()
    torch.save(tensors, tmp_path / "whole.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    torch.save({"state_dict": {"x": 1}}, tmp_path / "numbers.ckpt")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "lost.ckpt").symlink_to(tmp_path / "blobs" / "0123")
    yield tmp_path, "is a folder, but none of diffusers'.*: give a file in it: list.ckpt, lost.ckpt, numbers.ckpt, w"
    yield tmp_path / "folder.safetensors", "is a folder, but none of diffusers'"
    yield tmp_path / "absent.ckpt", "no such file"
    yield tmp_path / "absent.safetensors", "no such file"
    yield tmp_path / "lost.ckpt", "no such file: .*lost.ckpt is a link to .*0123, which is not there"
    yield written("noise.ckpt", b"\x93" * 999), "noise.ckpt is neither .safetensors nor .ckpt"
    yield written("empty.ckpt", b""), "empty.ckpt is empty: download it again"
    yield written("torn.ckpt", (tmp_path / "whole.ckpt").read_bytes()[:-5000]), "torn.ckpt is no whole .ckpt file"
    yield written("torn.safetensors", whole[:-1000]), "torn.safetensors is no whole .safetensors file"
    yield tmp_path / "list.ckpt", "holds no tensors by name"
    yield tmp_path / "numbers.ckpt", "holds no tensors by name"
    for begin, message in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer.*: run git lfs pull"),
        (b"\n<!DOCTYPE html>\n<html>", "is a web page, not a checkpoint: download the file itself"),
        (b"GGUF\3\0\0\0", "is a GGUF file.*: give the .safetensors file that it was made from"),
        (b"\x89PNG\r\n", "is a picture, not a checkpoint"),
        (b"<!-- by a host --><html>", "is a web page, not a checkpoint: download the file itself"),
        (b'{"data":{"weights": 3}}', "is a JSON file: give the file of weights that it belongs to"),
        (b'{"_class_name": "x"}', "is a JSON file: give the file of weights that it belongs to"),
    ):
        yield written("downloaded.safetensors", begin + bytes(99)), f"downloaded.safetensors {message}"


def test_unusable_files_are_one_line_that_names_the_trouble(tmp_path, tensors):
    for path, message in broken_files(tmp_path, tensors):
        with pytest.raises(scfg.BadInput, match=message) as caught:
            scfg.load(path)
        assert "\n" not in str(caught.value), path


def test_the_vocabulary_is_clips_numbering():
    found = formats.vocabulary(MERGES)
    assert found == families.vocabulary(MERGES) and list(found.values()) == list(range(512 + len(MERGES) + 2))
    assert [found[token] for token in ("ca", "<|startoftext|>", "<|endoftext|>")] == [512, 517, 518]
    assert found["a</w>"] == found["a"] + 256


def test_the_original_vocabulary_file(tmp_path):
    """A file of the original form: a header line, then one merge a line, more of them than CLIP uses."""
    path = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    letters = sorted(ByteLevel.alphabet())
    filler = [pair for pair in itertools.product(letters, letters) if pair not in MERGES][:60000]
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(["#version: 0.2"] + [" ".join(pair) for pair in MERGES + filler]))
    found = formats.read_tokenizer(path)
    assert len(found) == 49408 and found.bos_token_id == 49406 and found.eos_token_id == 49407
    assert found("cat")["input_ids"] == [49406, 512 + 1, 49407]


def test_a_transformers_folder(tmp_path):
    tokenizer().save_pretrained(tmp_path)
    assert formats.read_tokenizer(tmp_path)("the cat")["input_ids"] == tokenizer()("the cat")["input_ids"]


def test_a_folders_padding_token_is_a_character_like_any_other(tmp_path):
    tokenizer(pad_token="!").save_pretrained(tmp_path)
    assert formats.read_tokenizer(tmp_path)("cat!")["input_ids"] == tokenizer()("cat!")["input_ids"]
    assert CLIPTokenizer.from_pretrained(tmp_path)("cat!")["input_ids"] != tokenizer()("cat!")["input_ids"]


def test_a_tokenizer_that_is_given_takes_the_place_of_the_files_own(tmp_path):
    own, other = [("c", "a"), ("ca", "t</w>")], [("d", "o"), ("do", "g</w>")]
    config = families.small(SD1, len(families.vocabulary(own)))
    path = tmp_path / "model.safetensors"
    save_file(families.original(config), path, families.tokenizer_metadata(own))
    folder = tmp_path / "tokenizer"
    CLIPTokenizer(vocab=families.vocabulary(other), merges=other).save_pretrained(folder)
    read = [len(scfg.load(path, tokenizer=given).text.tokenize("cat")[0]) - 2 for given in (None, folder)]
    assert read == [1, 3]


def test_no_tokenizer_is_one_line(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    (tmp_path / "text.txt.gz").write_bytes(b"no gzip")
    for path in (tmp_path, tmp_path / "absent", tmp_path / "broken", tmp_path / "text.txt.gz"):
        with pytest.raises(scfg.BadInput, match="is no tokenizer") as caught:
            formats.read_tokenizer(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    with pytest.raises(scfg.BadInput, match="absent is no tokenizer"):
        scfg.load(TINY, tokenizer=tmp_path / "absent")


def test_without_any_tokenizer_it_is_one_line_that_says_how_to_give_one(monkeypatch):
    monkeypatch.setattr("scfg.formats.tokenizer.HUB_TOKENIZER", "nobody/has-this-in-a-cache")
    monkeypatch.setattr("scfg.formats.tokenizer.HF_HUB_OFFLINE", True)
    with pytest.raises(scfg.BadInput, match="give --tokenizer") as caught:
        Text([Tower(TextConfig(width=64, layers=1, heads=1, vocabulary=9))]).tokenize("cat")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("answers, cached, asked", [(True, False, [True, False]), (True, True, [True])])
def test_clips_own_tokenizer_comes_from_the_cache_or_else_from_the_hub(monkeypatch, answers, cached, asked):
    """Asked for once, when a text is first read; from an empty cache comes an empty tokenizer."""
    whole, calls = [*MERGES, *((f"x{i}", "y") for i in range(49408 - 514 - len(MERGES)))], []

    def from_pretrained(name: str, local_files_only: bool) -> CLIPTokenizer:
        calls.append(local_files_only)
        merges = whole if cached or not local_files_only else []
        vocab = formats.vocabulary(whole) if merges else {"<|startoftext|>": 0, "<|endoftext|>": 1}
        return CLIPTokenizer(vocab=vocab, merges=MERGES if merges else [])

    monkeypatch.setattr("scfg.formats.tokenizer.hub_answers", lambda: answers)
    monkeypatch.setattr("scfg.formats.tokenizer.CLIPTokenizer.from_pretrained", from_pretrained)
    text = Text([Tower(TextConfig(width=64, layers=1, heads=1))])
    assert text.tokenize("cat")[0] == text.tokenize("cat")[0] == [49406, 512 + 1, 49407]
    assert calls == asked


def test_a_vocabulary_that_unpacks_to_gigabytes_is_not_unpacked(tmp_path):
    with gzip.open(tmp_path / "bomb.txt.gz", "wb") as file:
        for _ in range(64):
            file.write(b"a b\n" * 2**20)
    tracemalloc.start()
    formats.read_tokenizer(tmp_path / "bomb.txt.gz")  # 270 MB unpacked, of which a vocabulary's lines are read
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
