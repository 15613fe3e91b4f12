"""What files say is about their own U-Net, and is kept; what they lack or hold twice is said."""

import json
from pathlib import Path

import families
import layouts
import pytest
import torch
from conftest import DATA
from families import FAMILIES

import scfg
from scfg.checkpoint import FIRST_STAGE, UNET
from scfg.prompting import encode
from scfg.prompting.chunks import tokenize

MERGES = layouts.MERGES
SIZE = len(families.vocabulary(MERGES))
EPS, V = ({"modelspec.prediction_type": kind} for kind in ("epsilon", "v"))


def config(name: str) -> scfg.config.Config:
    return families.small(FAMILIES[name], SIZE)


def tensors(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    return families.original(config(name), seed=seed)


def saved(path: Path, own: dict[str, torch.Tensor], *said: dict[str, str]) -> Path:
    metadata = families.tokenizer_metadata(MERGES)
    for one in said:
        metadata |= one
    return layouts.save(path, own, metadata)


@pytest.fixture(scope="module")
def sd1(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("sd1") / "sd1.safetensors", tensors("sd1"), EPS)


def test_what_a_completing_file_says_of_its_own_unet_does_not_act(tmp_path, sd1):
    own = tensors("sd1", seed=1)
    marked = saved(tmp_path / "v.safetensors", own | {"v_pred": torch.ones(1), "ztsnr": torch.ones(1)}, V)
    tower = saved(tmp_path / "tower.safetensors", layouts.without(own, UNET, FIRST_STAGE), V)
    expected = scfg.load(sd1).config
    for other in (marked, tower):
        assert scfg.load([sd1, other]).config == expected
        model = scfg.load([other, sd1] if other == tower else [sd1, other, tower])
        assert model.config == expected
    assert scfg.load([marked, sd1]).config.schedule.prediction == "v"


def test_a_saved_models_own_config_and_tokenizer_are_kept_beside_another_tower(tmp_path, sd1):
    model = scfg.load(sd1)
    scfg.save(model, tmp_path / "own.safetensors")
    tower = layouts.save(tmp_path / "tower.safetensors", layouts.without(tensors("sd1", seed=1), UNET, FIRST_STAGE))
    again = scfg.load([tower, tmp_path / "own.safetensors"])
    assert again.config == model.config and len(again.text.tokenizer) == len(model.text.tokenizer)


def test_added_tokens_come_back_from_a_saved_file(tmp_path, sd1):
    own = tensors("sd1")
    name = next(name for name in own if name.endswith("token_embedding.weight"))
    own[name] = torch.cat([own[name], torch.ones(1, own[name].shape[1])])
    model = scfg.load(saved(tmp_path / "model.safetensors", own, EPS))
    model.text.tokenizer.add_tokens(["<hank>"])
    scfg.save(model, tmp_path / "saved.safetensors")
    again, text = scfg.load(tmp_path / "saved.safetensors"), "a <hank> cat"
    assert SIZE in again.text.tokenize(text)[0]
    assert torch.equal(again.prompt(text).context["cond"], model.prompt(text).context["cond"])


@pytest.mark.parametrize("name", ["sd2", "sd2_base"] if "sd2_base" in FAMILIES else ["sd2"])
def test_clip_skip_counts_the_layer_that_a_file_leaves_out(tmp_path, name):
    """diffusers leaves SD 2.x's last layer out, which is never used."""
    whole = scfg.load(saved(tmp_path / "whole.safetensors", tensors(name), V))
    folder = layouts.diffusers_folder(tmp_path / "folder", tensors(name), config(name))
    cut = scfg.load(folder, tokenizer=None)
    cut.text.tokenizer = whole.text.tokenizer
    for layer in (None, 2, 3):
        one, other = (model.prompt("a cat", layer_from_end=layer).context["cond"] for model in (whole, cut))
        assert torch.allclose(one, other, atol=1e-6), layer
    whole.prompt("a cat", layer_from_end=1)
    with pytest.raises(scfg.BadInput, match="clip skip: give a whole number from 2"):
        cut.prompt("a cat", layer_from_end=1)


def test_a_file_without_some_transformer_blocks_is_no_relative(tmp_path):
    for lacking in (UNET + "input_blocks.1.1.", UNET + "middle_block.1.transformer_blocks.0."):
        path = saved(tmp_path / "model.safetensors", layouts.without(tensors("sd1"), lacking), EPS)
        with pytest.raises(scfg.BadInput, match=f"missing {lacking}"):
            scfg.load(path)


def test_zero_terminal_snr_of_a_network_that_predicts_eps_is_said(tmp_path):
    path = saved(tmp_path / "model.safetensors", tensors("sd1") | {"ztsnr": torch.ones(1)}, EPS)
    with pytest.warns(UserWarning, match="zero terminal SNR and for the prediction eps"):
        scfg.load(path)


def test_two_of_one_part_are_refused_where_they_differ(tmp_path):
    own = tensors("sd1")
    vae = layouts.part(own, FIRST_STAGE)
    same = saved(tmp_path / "same.safetensors", own | layouts.under("vae.", vae), EPS)
    assert torch.equal(scfg.load(same).vae.quant_conv.weight, own[FIRST_STAGE + "quant_conv.weight"])
    other = layouts.under("vae.", {name: -value for name, value in vae.items()})
    with pytest.raises(scfg.BadInput, match="it holds first_stage_model.* and vae.*, which are one tensor"):
        scfg.load(saved(tmp_path / "other.safetensors", own | other, EPS))


def test_markers_beside_a_wrapper_or_below_a_prefix_act(tmp_path):
    own, mark = tensors("sdxl"), torch.ones(1)
    below = {f"module.{name}": value for name, value in {**own, "v_pred": mark}.items()}
    for content in ({"state_dict": own, "v_pred": mark}, {"state_dict": below}):
        torch.save(content, tmp_path / "model.ckpt")
        assert scfg.load(tmp_path / "model.ckpt").config.schedule.prediction == "v"


@pytest.mark.parametrize(
    "said",
    [
        {"use_karras_sigmas": "false"},
        {"rescale_betas_zero_snr": "false"},
        {"steps_offset": "1"},
        {"prediction_type": ["v"]},
        {"beta_start": None},
        {"_class_name": "EDMEulerScheduler"},
    ],
    ids=str,
)
def test_a_scheduler_that_cannot_be_is_one_line(tmp_path, said):
    folder = layouts.diffusers_folder(tmp_path / "folder", tensors("sd1"), config("sd1"))
    place = folder / "scheduler" / "scheduler_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | said))
    with pytest.raises(scfg.BadInput, match="cannot be|sampled as EDM") as caught:
        scfg.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("weight_map", ["x", {"a": 3}, {}, {"a": "../x.safetensors"}, None], ids=str)
def test_an_index_that_names_no_files_is_one_line(tmp_path, weight_map):
    folder = layouts.diffusers_folder(tmp_path / "folder", tensors("sd1"), config("sd1"))
    (file,) = (folder / "unet").glob("*.safetensors")
    file.unlink()
    (folder / "unet" / f"{file.name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(scfg.BadInput):
        scfg.load(folder)


def test_a_text_without_blanks_goes_on_in_the_next_chunk():
    model = scfg.load(DATA.parent.parent / "weights" / "flatland.safetensors")
    long = tokenize(model.text, "猫" * 40)
    whole = [one for own in long.chunks for one in own[1:-1]]
    assert whole == model.text.checked_tokenizer()("猫" * 40, add_special_tokens=False, verbose=False).input_ids
    assert all(3 <= len(chunk) <= model.text.length for chunk in long.chunks)
    with pytest.warns(UserWarning, match="never saw"):
        one, other = (encode(model, "日" * n).context["cond"] for n in (40, 60))
    assert one.shape != other.shape or not torch.equal(one, other)


def test_words_are_compared_in_one_form(flat):
    with pytest.warns(UserWarning, match="never saw"):
        words = encode(flat, "cafe\u0301 cat").words[0]
    assert [word.text for word in words] == ["caf\u00e9", "cat"]
