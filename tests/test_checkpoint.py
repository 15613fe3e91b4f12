import os
import pickle
from dataclasses import replace

import pytest
import torch
from conftest import DATA
from safetensors.torch import load_file, save_file
from torch import Tensor

import scfg
from scfg import checkpoint
from scfg.config import SD1, SD2_V, SDXL, SDXL_REFINER, VAEConfig
from scfg.unet import UNet
from scfg.vae import VAE


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return load_file(DATA / "tiny_sd1.safetensors")


def saved(folder, tensors, name="model.safetensors"):
    save_file(tensors, folder / name)
    return folder / name


@pytest.mark.parametrize("family", [SD1, SD2_V, SDXL, SDXL_REFINER])
def test_a_family_is_recognised_from_names_and_shapes(family):
    with torch.device("meta"):
        names = {checkpoint.UNET + k: v for k, v in UNet(family.unet).state_dict().items()}
        names |= {checkpoint.FIRST_STAGE + k: v for k, v in VAE(VAEConfig()).state_dict().items()}
    assert checkpoint.recognise(names) == replace(family, text=None)


def test_a_text_tower_s_sizes_are_read_off():
    with torch.device("meta"):
        text = checkpoint.Text(SD1.text)
    for prefix in ("text_model.", ""):                                        # some published files lack it
        names = {f"{checkpoint.CLIP}{prefix}{k.removeprefix('transformer.')}": v for k, v in text.state_dict().items()}
        assert checkpoint.clip_sizes(names) == SD1.text


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


def test_weights_of_the_files_own_dtype_stay_in_the_file():
    """fp16 in, fp16 out: every parameter lies in one mapping of the file, none was copied."""
    model = scfg.load(DATA / "tiny_sd1.safetensors", dtype=torch.float16)
    maps = [line.split() for line in open("/proc/self/maps") if "tiny_sd1.safetensors" in line]
    spans = [tuple(int(end, 16) for end in line[0].split("-")) for line in maps]
    assert spans and all(any(low <= p.data_ptr() < high for low, high in spans) for p in model.unet.parameters())
