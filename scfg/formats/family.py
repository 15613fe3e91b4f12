"""What a checkpoint is: its family, its relatives, and what markers and headers say of its noise schedule."""

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..checkpoint import UNET, family_of, tower_tensors, with_prefix
from ..config import Config, predicting
from ..errors import BadInput
from .sizes import recognise

WEBUI_TERMINAL_ALPHA = 4.8973451890853435e-08  # the WebUI's in place of 0, so that sigma stays finite
PREDICTIONS = {"v": "v", "v_prediction": "v", "v-prediction": "v", "epsilon": "eps", "eps": "eps"}
EPS_SAYS_NOTHING = "and for the prediction eps, which says nothing of the picture at pure noise"
OTHERS = (  # names that tell files of other kinds -> what they are
    (
        r"(double_blocks|model\.diffusion_model\.double_blocks)\.|transformer\.single_transformer_blocks\.",
        "a Flux model",
    ),
    (r"(model\.diffusion_model\.)?joint_blocks\.", "an SD 3 model"),
    (r".*motion_modules\.", "a motion module of AnimateDiff"),
    (r".*(time_stack|time_mixer|temporal_transformer)\b", "a video model"),
    (
        r"(control_model\.|controlnet_cond_embedding|controlnet_(down|mid)_block|lora_controlnet|input_hint_block)",
        "a ControlNet",
    ),
    (r".*\.(lora_(A|B|up|down)|lora\.(up|down)|hada_w1_[ab]|lokr_w[12](_[ab])?)\b|lora_(unet|te\d?)_", "a LoRA"),
    (r"(image_proj|ip_adapter)\.", "an IP-Adapter"),
    (r"(adapter\.)?body\.\d+\.(in_conv|block1|resnets)", "a T2I-Adapter"),
    (r"(string_to_param|emb_params$)", "a textual inversion"),
    (r"(model\.)?(encoder_proj|encoder_pooling|aug_proj)\.", "a DeepFloyd IF model"),
    (r"(body\.\d+\.rdb1|model\.1\.sub\.|conv_first\.)", "an upscaler of pictures"),
)
CHANNELS = {  # of the U-Net's input -> the task
    5: "a depth model (5 channels)",
    7: "an upscaler (7 channels)",
    8: "a model that edits pictures by instructions (8 channels, such as InstructPix2Pix)",
    9: "an inpainting model (9 channels)",
}


def check_kind(names: Iterable[str], tensors: Mapping[str, Tensor]) -> None:
    """Name what is no Stable Diffusion text-to-image checkpoint; raises BadInput.

    names: the file's own; tensors: by original names.
    """
    names = list(names)
    first = tensors.get(UNET + "input_blocks.0.0.weight")
    if first is None:
        for pattern, what in OTHERS:
            if any(re.match(pattern, name) for name in names):
                raise BadInput(f"this is {what}, not a checkpoint: give the checkpoint that it is made for")
    elsewhere = ", and scfg samples from text alone: give the text-to-image checkpoint that it was made from"
    for pattern, what in OTHERS[2:4]:
        if any(re.match(pattern, name) for name in names):
            raise BadInput(f"this is {what}{elsewhere}")
    if first is not None and first.ndim == 4 and first.shape[1] in CHANNELS:
        raise BadInput(f"this is {CHANNELS[first.shape[1]]}{elsewhere}")
    if UNET + "label_emb.0.0.weight" in tensors and UNET + "input_blocks.1.1.norm.weight" in tensors:
        raise BadInput(f"this is an unCLIP model, which takes a picture's embedding{elsewhere}")
    if UNET + "label_emb.weight" in tensors:
        raise BadInput(f"this is an upscaler or another model of classes{elsewhere}")
    if any(name in ("edm_mean", "edm_std") for name in names):
        raise BadInput("this is Playground 2.5, which is sampled as EDM: it is not supported, give another SDXL model")
    if any(name.startswith("edm_vpred.") for name in names):
        raise BadInput("this is a CosXL model, which is sampled as EDM: it is not supported, give another SDXL model")
    if first is not None and UNET + "middle_block.0.in_layers.0.weight" not in tensors:
        raise BadInput("this U-Net has no middle block (a KOALA model?): it is not supported, give another SDXL model")


def stated_schedule(names: Iterable[str], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Fields of the Schedule by a file's markers, else by its header (sd-scripts and modelspec write these)."""
    names = {name.removeprefix("module.") for name in names}
    written = metadata.get("modelspec.prediction_type", "").lower()
    stated: dict[str, Any] = {"prediction": PREDICTIONS[written]} if written in PREDICTIONS else {}
    if "v_pred" in names:
        stated["prediction"] = "v"
    if "ztsnr" in names:
        stated["terminal_alpha"] = WEBUI_TERMINAL_ALPHA
    return stated


def config_of(tensors: Mapping[str, Tensor], schedule: Mapping[str, Any], fields: Mapping[str, Any]) -> Config:
    """The family's config, or a relative's, with what the files state.

    tensors: by original names, towers included. schedule, fields: stated fields of the Schedule and of the Config.
    """
    config = recognise(dict(tensors))
    if "prediction" in schedule:
        config = predicting(config, schedule["prediction"])
    config = replace(config, schedule=replace(config.schedule, **schedule))
    if config.schedule.terminal_alpha and schedule.get("prediction") == "eps":
        warnings.warn(f"this file asks for zero terminal SNR {EPS_SAYS_NOTHING}", stacklevel=7)
    config = replace(config, **({"spacing": "trailing"} if config.schedule.terminal_alpha else {}) | dict(fields))
    return replace(config, spacing="lcm") if config.unet.guidance_dim else config


def place_towers(
    tensors: Mapping[str, Tensor], names: Mapping[str, str], family: Config
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Numbered text towers under the family's prefixes; and the files' names of all."""
    prefixes = {f"text.{i}.": tower.prefix for i, tower in enumerate(family.text)}

    def placed(name: str) -> str:
        return next((to + name.removeprefix(at) for at, to in prefixes.items() if name.startswith(at)), name)

    found = {placed(name): tensor for name, tensor in tensors.items() if not unused_projection(name, family)}
    return found, {placed(original): name for original, name in names.items()}


def unused_projection(name: str, family: Config) -> bool:
    """Whether this is the projection of a tower whose pooled text the family does not take."""
    pooled = [f"text.{i}." for i, tower in enumerate(family.text) if tower.pooled]
    return re.fullmatch(r"text\.\d\.text_projection", name) is not None and not name.startswith(tuple(pooled))


def without_last_layer(config: Config, tensors: Mapping[str, Tensor], from_diffusers: bool) -> Config:
    """SD 2.x's tower where its last layer, which is never used, is left out: the states are then those of the last.

    diffusers always leaves it out.
    """
    if len(config.text) != 1 or config.text[0].pooled or config.text[0].layer_from_end != 2:
        return config
    (tower,) = config.text
    own = tower_tensors(with_prefix(dict(tensors), tower.prefix))
    layers = len({name.split(".")[3] for name in own if name.startswith("transformer.encoder.layers.")})
    full = family_of(tensors).text[0]
    cut = layers == full.layers - 1 if tower.width == full.width else from_diffusers
    return replace(config, text=(replace(tower, layers=layers, layer_from_end=1, left_out=1),)) if cut else config
