import json
import os
import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import families
import pytest
import torch
from conftest import DATA
from safetensors.torch import load_file, save_file
from torch import Tensor

import scfg
from scfg import checkpoint
from scfg.config import SD1, SD2_V, SDXL, SDXL_REFINER, VAEConfig


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return load_file(DATA / "tiny_sd1.safetensors")


def saved(folder, tensors, name="model.safetensors"):
    save_file(tensors, folder / name)
    return folder / name


FAMILIES = {"sd1": SD1, "sd2": SD2_V, "sdxl": SDXL, "sdxl_refiner": SDXL_REFINER}


def published(name: str) -> dict[str, Tensor]:
    """The tensors of a published file, without their numbers."""
    keys = {}
    for part in (name, "vae", f"text_{name}"):
        keys |= json.loads((DATA / "keys" / f"{part}.json").read_text())
    return {key: torch.empty(shape, device="meta") for key, shape in keys.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_names_and_shapes_of_whole_files_are_the_originals(name):
    """Every one of a published file's tensors finds its place and no place stays empty; the sizes read off are the family's."""
    tensors = published(name)
    assert checkpoint.recognise(tensors) == FAMILIES[name]
    wanted = {key: tensor for key, tensor in tensors.items() if not checkpoint.DROPPED.fullmatch(key)}
    parts = checkpoint.assemble(Path(name), FAMILIES[name], wanted, {}, torch.float16, None)
    assert parts.unet.out[2].weight.is_meta and len(parts.text.towers) == len(FAMILIES[name].text)
    for key in list(wanted)[::97]:
        with pytest.raises(scfg.BadInput, match="missing"):
            checkpoint.assemble(Path(name), FAMILIES[name], {k: v for k, v in wanted.items() if k != key}, {}, torch.float16, None)


@pytest.mark.parametrize("name", FAMILIES)
def test_files_without_text_towers_are_recognised(name):
    tensors = {key: tensor for key, tensor in published(name).items() if not key.startswith(("cond_stage_model", "conditioner"))}
    assert checkpoint.recognise(tensors) == replace(FAMILIES[name], text=())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_small_file_of_a_family_loads_whole(tmp_path, name):
    config = families.small(FAMILIES[name])
    tensors = families.original(config)
    model = scfg.load(saved(tmp_path, tensors), prediction=config.prediction)
    assert model.config == config and model.text.restore_buffers() is None
    for tower in config.text:                                                 # some published files lack the prefix within
        tensors = {key.replace(f"{tower.prefix}text_model.", tower.prefix): tensor for key, tensor in tensors.items()}
    again = scfg.load(saved(tmp_path, tensors), prediction=config.prediction)
    assert all(torch.equal(a, b) for a, b in zip(model.text.parameters(), again.text.parameters(), strict=True))


def test_another_files_vae(tmp_path, tensors, tiny):
    other = {name: -tensor for name, tensor in tensors.items() if name.startswith(checkpoint.FIRST_STAGE)}
    bare = {name.removeprefix(checkpoint.FIRST_STAGE): tensor for name, tensor in other.items()}
    for i, vae in enumerate((other, bare, bare | {"loss.logvar": torch.ones(1), "model_ema.decay": torch.ones(1)})):
        with pytest.warns(UserWarning, match="does not say its family: .* taken for one of SD 1.x"):
            model = scfg.load(DATA / "tiny_sd1.safetensors", vae=saved(tmp_path, vae, f"{i}.safetensors"))
        assert torch.equal(model.vae.quant_conv.weight, -tiny.vae.quant_conv.weight)
        assert torch.equal(model.unet.out[2].weight, tiny.unet.out[2].weight)
    whole = {name: -tensor for name, tensor in tensors.items()}
    model = scfg.load(DATA / "tiny_sd1.safetensors", vae=saved(tmp_path, whole, "whole.safetensors"))
    assert torch.equal(model.vae.quant_conv.weight, -tiny.vae.quant_conv.weight)


def test_a_checkpoint_without_a_vae_takes_another_files(tmp_path, tensors, tiny):
    bare = saved(tmp_path, {name: tensor for name, tensor in tensors.items() if not name.startswith(checkpoint.FIRST_STAGE)}, "bare.safetensors")
    with pytest.raises(scfg.BadInput, match="bare.safetensors: unknown architecture: .* it has no first_stage_model"):
        scfg.load(bare)
    model = scfg.load(bare, vae=DATA / "tiny_sd1.safetensors")
    assert torch.equal(model.vae.quant_conv.weight, tiny.vae.quant_conv.weight)


def test_broken_vae_files_are_named_and_not_the_checkpoint(tmp_path, tensors):
    vae = checkpoint.part(tensors, checkpoint.FIRST_STAGE)
    for i, (change, message) in enumerate([
            ({"decoder.conv_out.bias": None}, "holds no whole VAE: missing decoder.conv_out.bias"),
            ({"decoder.conv_out.bias": torch.ones(5)}, r"holds no whole VAE: decoder.conv_out.bias is \[5\], not \[3\]"),
            ({"encoder.conv_in.weight": torch.ones(0)}, "holds no VAE of Stable Diffusion's layout")]):
        changed = {name: tensor for name, tensor in (vae | change).items() if tensor is not None}
        with pytest.raises(scfg.BadInput, match=f"{i}.safetensors {message}"):
            scfg.load(DATA / "tiny_sd1.safetensors", vae=saved(tmp_path, changed, f"{i}.safetensors"))


def test_a_missing_tower_or_its_last_layers_are_named():
    tensors = {key: tensor for key, tensor in published("sdxl").items() if not checkpoint.DROPPED.fullmatch(key)}
    for i, tower in enumerate(SDXL.text):
        rest = {key: tensor for key, tensor in tensors.items() if not key.startswith(tower.prefix)}
        with pytest.raises(scfg.BadInput, match=f"its text tower {tower.prefix}.* is missing"):
            checkpoint.assemble(Path("xl"), checkpoint.recognise(rest), rest, {}, torch.float16, None)
        short = {key: tensor for key, tensor in tensors.items() if f"{('layers', 'resblocks')[i]}.{tower.layers - 1}." not in key}
        with pytest.raises(scfg.BadInput, match=f"missing towers.{i}.transformer.encoder.layers.{tower.layers - 1}."):
            checkpoint.assemble(Path("xl"), checkpoint.recognise(short), short, {}, torch.float16, None)


def test_a_vae_of_another_family_is_named(tmp_path):
    xl = saved(tmp_path, families.original(replace(families.small(SDXL), text=())), "xl.safetensors")
    sixteen = families.original(families.small(replace(SD1, vae=VAEConfig(latent_channels=16))))
    vae = saved(tmp_path, {k: v for k, v in sixteen.items() if k.startswith(checkpoint.FIRST_STAGE)}, "16.safetensors")
    for file, message in ((xl, "xl.safetensors is SDXL, whose latents are not those of SD 1.x"),
                          (vae, "latents of 16 channels, those of SD 1.x have 4"),
                          (scfg.diffusion.embedded_checkpoint(), "is Flatland, whose latents are not those of SD 1.x"),
                          (saved(tmp_path, {"x": torch.ones(1)}, "none.safetensors"), "none.safetensors holds no VAE"),
                          (tmp_path / "absent.safetensors", "no such file")):
        with pytest.raises(scfg.BadInput, match=message), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scfg.load(DATA / "tiny_sd1.safetensors", vae=file)


def test_buffers_of_published_files_are_dropped(tmp_path, tensors, tiny):
    extra = {"model_ema.decay": torch.ones(1), "betas": torch.ones(1000), "sqrt_one_minus_alphas_cumprod": torch.ones(1000),
             "posterior_mean_coef2": torch.ones(1000), "model_ema.num_updates": torch.ones(1)}
    model = scfg.load(saved(tmp_path, tensors | extra))
    assert torch.equal(model.unet.out[2].weight, tiny.unet.out[2].weight)


def test_ckpt_files_load_with_the_one_harmless_class(tmp_path, tensors, tiny, monkeypatch):
    import sys
    import types
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


class Harmful:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize("protocol", ["zip", "plain pickle"])
def test_code_in_a_pickle_is_named_and_not_run(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": Harmful()}, path) if protocol == "zip" else path.write_bytes(pickle.dumps(Harmful(), 2))
    with pytest.raises(scfg.BadInput, match=r"holds code \(\w+\.system\), which was not run"):
        scfg.load(path)
    assert not (tmp_path / "ran").exists()


def broken_files(tmp_path, tensors):
    some = checkpoint.UNET + "output_blocks.3.0.in_layers.2.weight"
    whole = (DATA / "tiny_sd1.safetensors").read_bytes()

    def written(name, content):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    torch.save(tensors, tmp_path / "whole.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    yield tmp_path / "absent.safetensors", "no such file"
    yield tmp_path, "no such file"
    yield written("torn.safetensors", whole[:-1000]), "no whole .safetensors"
    yield written("empty.safetensors", b""), "no whole .safetensors"
    yield written("noise.ckpt", b"\x93" * 999), "noise.ckpt"
    yield written("empty.ckpt", b""), "empty.ckpt"
    yield written("torn.ckpt", (tmp_path / "whole.ckpt").read_bytes()[:-5000]), "torn.ckpt"
    yield tmp_path / "list.ckpt", "no state dict"
    yield written("model.png", whole), "neither .safetensors nor .ckpt"
    yield saved(tmp_path, {"x": torch.ones(2)}, "other.safetensors"), "unknown architecture"
    yield saved(tmp_path, {k: v for k, v in tensors.items() if k != some}, "lacking.safetensors"), f"missing output_blocks.3"
    yield saved(tmp_path, tensors | {some: torch.ones(3, 3)}, "shape.safetensors"), r"\[3, 3\], not \[64, 128, 3, 3\]"
    yield saved(tmp_path, tensors | {"surprise": torch.ones(2)}, "more.safetensors"), "unexpected surprise"
    inpainting = tensors | {checkpoint.UNET + "input_blocks.0.0.weight": torch.ones(32, 9, 3, 3)}
    yield saved(tmp_path, inpainting, "inpainting.safetensors"), "9 channels"


def test_unusable_files_are_one_line_that_names_the_trouble(tmp_path, tensors):
    for path, message in broken_files(tmp_path, tensors):
        with pytest.raises(scfg.BadInput, match=message) as caught:
            scfg.load(path)
        assert "\n" not in str(caught.value), path


@pytest.mark.parametrize("metadata", [
    {"scfg.config": "{"}, {"scfg.config": "[]"}, {"scfg.config": '{"name": "x"}'}, {"scfg.config": '{"name": "x", "unet": null}'},
    {"scfg.config": '{"name": "x", "unet": {"context_dim": 48, "model_channels": 33, "heads": 0}}'}])
def test_unusable_metadata_is_one_line(tmp_path, tensors, metadata):
    save_file(tensors, tmp_path / "model.safetensors", metadata)
    with pytest.raises(scfg.BadInput, match="no usable checkpoint|unexpected|missing") as caught:
        scfg.load(tmp_path / "model.safetensors")
    assert "\n" not in str(caught.value)


def test_weights_that_are_no_fractions_are_refused(tmp_path, tensors):
    name = checkpoint.UNET + "out.2.bias"
    with pytest.raises(scfg.BadInput, match="out.2.bias holds torch.int8"):
        scfg.load(saved(tmp_path, tensors | {name: torch.ones(4, dtype=torch.int8)}))


def test_prediction_and_dtype_can_be_chosen():
    model = scfg.load(DATA / "tiny_sd1.safetensors", prediction="v", dtype=torch.bfloat16)
    assert model.config.prediction == "v" and model.dtype == torch.bfloat16
    with pytest.raises(scfg.BadInput, match="not available"):
        scfg.load(device="cuda:99")


def test_a_file_without_a_text_tower_refuses_prompts_only(tiny):
    with pytest.raises(scfg.BadInput, match="no text tower"):
        tiny.prompt("a cat")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_weights_of_a_float16_file_stay_in_the_file(dtype):
    """They lie in one mapping of it, none was copied; in float32 those stay, most of all, that are widened as they are used."""
    model = scfg.load(DATA / "tiny_sd1.safetensors", dtype=dtype)
    maps = [line.split() for line in open("/proc/self/maps") if "tiny_sd1.safetensors" in line]
    spans = [tuple(int(end, 16) for end in line[0].split("-")) for line in maps]
    stay = checkpoint.widened_in_use(model.unet) if dtype == torch.float32 else dict(model.unet.named_parameters())
    sizes = {name: p.numel() for name, p in model.unet.named_parameters()}
    assert spans and all(any(low <= model.unet.get_parameter(name).data_ptr() < high for low, high in spans) for name in stay)
    assert model.dtype == dtype and {p.dtype for name, p in model.unet.named_parameters() if name not in stay} <= {dtype}
    assert sum(sizes[name] for name in stay) > 0.7 * sum(sizes.values())


def test_weights_that_stay_in_float16_give_what_widened_ones_give(flat):
    wide = scfg.load()
    for network in (wide.unet, wide.vae, wide.text):
        assert {p.dtype for p in network.parameters()} == {torch.float16, torch.float32}
        network.float()
    latents = [list(model.sample("a red car on grass", scfg.SCFG(3.0), steps=2))[-1].latent for model in (flat, wide)]
    assert torch.equal(*latents) and torch.equal(flat.decode(latents[0]), wide.decode(latents[0]))
