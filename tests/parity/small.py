"""Small models of every family, of random weights, built from diffusers' and transformers' own modules.

`reference` returns a family's pipeline and the files with the same weights and vocabulary.
"""

import re
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from original import original
from safetensors.torch import save_file
from schedulers import scheduler
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

FAMILIES = ("sd1", "sd2", "sdxl", "sdxl_refiner")
NARROW, WIDE = 128, 192  # widths of the text towers, whose heads are 64 wide
MERGES = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("r", "e"), ("re", "d</w>"), ("o", "n</w>")]


def enliven(module: nn.Module) -> None:
    """Scale matrices so that signals keep their size, and move every bias and norm away from its trivial value.

    What is added to the residual stream is kept quiet, so that an epsilon of 1e-5 in a group norm differs from 1e-6.
    """
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.mul_(
                0.05 * 3**0.5 if re.search(r"(conv_in|conv2|proj_out|attentions\.0\.to_out\.0)\.", name) else 3**0.5
            )
        else:
            parameter.add_((0.2 if "norm" in name else 0.01) * torch.randn_like(parameter))


def tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """A CLIP tokenizer of bytes, whose first is "!", and a handful of merges."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge) for merge in MERGES)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=MERGES, model_max_length=77, pad_token=pad
    )


def text_encoder(width: int, layers: int, activation: str = "gelu", kind: type = CLIPTextModel) -> nn.Module:
    """A text tower; its start and end tokens are the last two numbers."""
    size = len(tokenizer())
    return kind(
        CLIPTextConfig(
            vocab_size=size,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            projection_dim=width,
            num_attention_heads=width // 64,
            max_position_embeddings=77,
            hidden_act=activation,
            bos_token_id=size - 2,
            eos_token_id=size - 1,
            pad_token_id=size - 1,
        )
    )


def unet(family: str) -> UNet2DConditionModel:
    """A U-Net of the family's structure; diffusers' attention_head_dim is the number of heads."""
    attended = {"sd1": (1, 1, 1, 0), "sd2": (1, 1, 1, 0), "sdxl": (0, 1, 1), "sdxl_refiner": (0, 1, 1, 0)}[family]
    sizes = {
        "sd1": {"block_out_channels": (32, 64, 128, 128), "cross_attention_dim": NARROW, "attention_head_dim": 8},
        "sd2": {
            "block_out_channels": (64, 128, 256, 256),
            "cross_attention_dim": NARROW,
            "attention_head_dim": (1, 2, 4, 4),
        },
        "sdxl": {
            "block_out_channels": (64, 128, 256),
            "cross_attention_dim": NARROW + WIDE,
            "attention_head_dim": (1, 2, 4),
            "transformer_layers_per_block": (1, 2, 10),
            "projection_class_embeddings_input_dim": WIDE + 6 * 256,
        },
        "sdxl_refiner": {
            "block_out_channels": (64, 128, 256, 256),
            "cross_attention_dim": WIDE,
            "attention_head_dim": (1, 2, 4, 4),
            "transformer_layers_per_block": 4,
            "projection_class_embeddings_input_dim": WIDE + 5 * 256,
        },
    }[family]
    return UNet2DConditionModel(
        sample_size=32,
        layers_per_block=2,
        norm_num_groups=32,
        use_linear_projection=family != "sd1",
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attended],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attended)],
        **sizes,
        **({"addition_embed_type": "text_time", "addition_time_embed_dim": 256} if "sdxl" in family else {}),
    )


def vae(family: str) -> AutoencoderKL:
    """An autoencoder of the structure that all families share."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32,
        sample_size=256,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.13025 if "sdxl" in family else 0.18215,
    )


def parts(family: str) -> dict[str, nn.Module]:
    """The networks of a family; of SD 2.x's tower, diffusers builds what is used: all but the last layer."""
    towers = {
        "sd1": {"text_encoder": lambda: text_encoder(NARROW, 3, "quick_gelu")},
        "sd2": {"text_encoder": lambda: text_encoder(NARROW, 3)},
        "sdxl": {
            "text_encoder": lambda: text_encoder(NARROW, 3, "quick_gelu"),
            "text_encoder_2": lambda: text_encoder(WIDE, 4, kind=CLIPTextModelWithProjection),
        },
        "sdxl_refiner": {"text_encoder_2": lambda: text_encoder(WIDE, 4, kind=CLIPTextModelWithProjection)},
    }[family]
    torch.manual_seed(FAMILIES.index(family))
    result = {"unet": unet(family), "vae": vae(family), **{name: build() for name, build in towers.items()}}
    for part in result.values():
        enliven(part.eval().requires_grad_(False))
        part.half().float()  # weights that a file of half precision holds exactly
    return result


def pipeline(family: str) -> DiffusionPipeline:
    """The seeded reference pipeline."""
    common = {**parts(family), "scheduler": scheduler("ddim", "leading")}
    if family == "sdxl":
        pipe = StableDiffusionXLPipeline(
            **common, tokenizer=tokenizer(), tokenizer_2=tokenizer("!"), add_watermarker=False
        )
    elif family == "sdxl_refiner":
        pipe = StableDiffusionXLImg2ImgPipeline(
            **common,
            text_encoder=None,
            tokenizer=None,
            tokenizer_2=tokenizer("!"),
            requires_aesthetics_score=True,
            force_zeros_for_empty_prompt=False,
            add_watermarker=False,
        )
    else:
        pipe = StableDiffusionPipeline(
            **common,
            tokenizer=tokenizer("!") if family == "sd2" else tokenizer(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Reference(NamedTuple):
    """diffusers' pipeline and the files holding the same weights and vocabulary."""

    pipe: DiffusionPipeline
    weights: dict[str, Tensor]  # under their original names
    checkpoint: Path
    tokenizer: Path


FOLDER = tempfile.TemporaryDirectory(prefix="parity-")  # removed when the tests end


@cache
def reference(family: str) -> Reference:
    """The reference pipeline of a family and its files."""
    folder, pipe = Path(FOLDER.name), pipeline(family)
    files = Reference(pipe, original(pipe), folder / f"{family}.safetensors", folder / "tokenizer")
    save_file({name: value.half().contiguous() for name, value in files.weights.items()}, files.checkpoint)
    tokenizer().save_pretrained(files.tokenizer)
    return files
