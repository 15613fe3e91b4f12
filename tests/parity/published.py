"""diffusers' pipeline of an original file, by diffusers' own reader of such files and without a hub.

The reader wants a folder that gives the sizes of a family's networks, which it otherwise downloads. That folder is
written here: what the published ones hold, with the widths of the file.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import transformers
from schedulers import scheduler
from transformers import CLIPTokenizer

import scfg
from scfg.config import SDXL, SDXL_REFINER, Config, TextConfig

PIPELINES = {SDXL.name: "StableDiffusionXLPipeline", SDXL_REFINER.name: "StableDiffusionXLImg2ImgPipeline"}


def unet_sizes(config: Config) -> dict[str, Any]:
    """A U-Net's; attention_head_dim is diffusers' name for the number of heads."""
    unet, xl, refiner = config.unet, bool(config.unet.vector_dim), bool(config.aesthetic_scores)
    widths = [unet.model_channels * m for m in unet.channel_mult]
    heads = [width // 64 for width in widths] if unet.linear_projections else 8
    depths = 4 if refiner else [1, 2, 10] if xl else 1
    attended = [0, 1, 1, 0][: len(widths)] if xl else [1, 1, 1, 0]
    sizes = {"block_out_channels": widths, "layers_per_block": 2, "cross_attention_dim": unet.context_dim}
    sizes |= {"attention_head_dim": heads, "transformer_layers_per_block": depths}
    sizes |= {"use_linear_projection": unet.linear_projections, "sample_size": config.size[0] // 8}
    sizes |= {"down_block_types": [("DownBlock2D", "CrossAttnDownBlock2D")[a] for a in attended]}
    sizes |= {"up_block_types": [("UpBlock2D", "CrossAttnUpBlock2D")[a] for a in reversed(attended)]}
    if xl:
        sizes |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
        sizes |= {"projection_class_embeddings_input_dim": unet.vector_dim}
    return sizes


def vae_sizes(config: Config) -> dict[str, Any]:
    widths = [config.vae.channels * m for m in config.vae.channel_mult]
    sizes: dict[str, Any] = {"block_out_channels": widths, "layers_per_block": 2, "latent_channels": 4}
    sizes |= {"down_block_types": ["DownEncoderBlock2D"] * len(widths)}
    sizes |= {"up_block_types": ["UpDecoderBlock2D"] * len(widths)}
    return sizes | {"scaling_factor": 0.13025 if config.unet.vector_dim else 0.18215}


def text_sizes(tower: TextConfig) -> dict[str, Any]:
    """A text tower's; of SD 2.x's tower the last layer is left out, as its states are not used."""
    last_unused, n = tower.prefix == "cond_stage_model.model.", tower.vocabulary
    sizes = {"hidden_size": tower.width, "intermediate_size": 4 * tower.width, "vocab_size": n}
    sizes |= {"num_hidden_layers": tower.layers - last_unused, "num_attention_heads": tower.width // 64}
    sizes |= {"projection_dim": tower.pooled or tower.width, "bos_token_id": n - 2, "eos_token_id": n - 1}
    openai = tower.prefix.endswith(".transformer.")
    return sizes | {"hidden_act": "quick_gelu" if openai else "gelu", "model_type": "clip_text_model"}


def write_sizes(config: Config, folder: Path) -> None:
    """The folder of a family."""
    names = ("text_encoder_2",) if config.aesthetic_scores else ("text_encoder", "text_encoder_2")
    parts = {"unet": unet_sizes(config), "vae": vae_sizes(config)}
    index: dict[str, Any] = {"_class_name": PIPELINES.get(config.name, "StableDiffusionPipeline")}
    index |= {"unet": ("diffusers", "UNet2DConditionModel"), "vae": ("diffusers", "AutoencoderKL")}
    for name, tower in zip(names, config.text):
        parts[name] = text_sizes(tower)
        index[name] = ("transformers", "CLIPTextModelWithProjection" if tower.pooled else "CLIPTextModel")
    for name, part in parts.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(part), encoding="utf-8")
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def padded_with(token: str, tokenizer: CLIPTokenizer) -> CLIPTokenizer:
    """The tokenizer with a family's filler: the end token for OpenAI's towers, "!" for open_clip's."""
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in bpe["merges"]]
    return CLIPTokenizer(vocab=bpe["vocab"], merges=merges, model_max_length=77, pad_token=token)


def arguments(config: Config, tokenizer: CLIPTokenizer) -> dict[str, Any]:
    """What a family's pipeline is made of beside its networks."""
    ends, marks = padded_with("<|endoftext|>", tokenizer), padded_with("!", tokenizer)
    given: dict[str, Any] = {"scheduler": scheduler("ddim", "leading", config.schedule.prediction)}
    if config.aesthetic_scores:
        given |= {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False}
        return given | {"text_encoder": None, "tokenizer": None, "tokenizer_2": marks, "add_watermarker": False}
    if config.unet.vector_dim:
        return given | {"tokenizer": ends, "tokenizer_2": marks, "add_watermarker": False}
    given |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return given | {"tokenizer": ends if config.text[0].pad is None else marks}


def pipeline(file: Path, ours: scfg.Diffusion) -> Any:
    """diffusers' pipeline of the file that `ours` is of, on its device and in its dtypes, with DDIM."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    made_of = arguments(ours.config, ours.towers().checked_tokenizer())
    kind = getattr(diffusers, PIPELINES.get(ours.config.name, "StableDiffusionPipeline"))
    with tempfile.TemporaryDirectory() as folder:
        write_sizes(ours.config, Path(folder))
        try:
            pipe = kind.from_single_file(
                str(file), config=folder, local_files_only=True, torch_dtype=ours.dtype, **made_of
            ).to(ours.device)
        except Exception as error:  # a file that it cannot read fails in as many ways as its converters have parts
            first = str(error).strip().split("\n")[0]
            raise scfg.BadInput(f"diffusers cannot read {file} ({type(error).__name__}: {first})") from error
    pipe.vae.to(ours.vae.quant_conv.weight.dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe
