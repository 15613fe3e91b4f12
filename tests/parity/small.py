"""A small Stable Diffusion 1.x of random weights, built from diffusers' and transformers' own modules.

`pipeline` returns the reference; `save_original` writes the same weights as one file in the original layout.
"""

import re
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

CONTEXT = 128
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
MERGES = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("r", "e"), ("re", "d</w>"), ("o", "n</w>")]

# Renamings from diffusers' names to the original ones, tried on every name in this order.
RESNET = [("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"), ("norm2", "out_layers.0"),
          ("conv2", "out_layers.3"), ("conv_shortcut", "skip_connection")]
UNET = [
    (r"^conv_in", lambda m: "input_blocks.0.0"),
    (r"^time_embedding\.linear_(\d)", lambda m: f"time_embed.{2 * int(m[1]) - 2}"),
    (r"^down_blocks\.(\d)\.resnets\.(\d)", lambda m: f"input_blocks.{3 * int(m[1]) + int(m[2]) + 1}.0"),
    (r"^down_blocks\.(\d)\.attentions\.(\d)", lambda m: f"input_blocks.{3 * int(m[1]) + int(m[2]) + 1}.1"),
    (r"^down_blocks\.(\d)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{3 * int(m[1]) + 3}.0.op"),
    (r"^mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}"),
    (r"^mid_block\.attentions\.0", lambda m: "middle_block.1"),
    (r"^up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"output_blocks.{3 * int(m[1]) + int(m[2])}.0"),
    (r"^up_blocks\.(\d)\.attentions\.(\d)", lambda m: f"output_blocks.{3 * int(m[1]) + int(m[2])}.1"),
    (r"^up_blocks\.(\d)\.upsamplers\.0", lambda m: f"output_blocks.{3 * int(m[1]) + 2}.{1 if m[1] == '0' else 2}"),
    (r"^conv_norm_out", lambda m: "out.0"),
    (r"^conv_out", lambda m: "out.2"),
    *((rf"^((?:input|middle|output)_blocks?\.[\d.]+)\.{theirs}\.", rf"\1.{ours}.") for theirs, ours in RESNET),
]
VAE = [
    (r"down_blocks\.(\d)\.", lambda m: f"down.{m[1]}."),
    (r"up_blocks\.(\d)\.", lambda m: f"up.{3 - int(m[1])}."),
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"mid_block\.attentions\.0", lambda m: "mid.attn_1"),
    (r"resnets", "block"), (r"(down|up)samplers\.0", r"\1sample"), (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"), (r"group_norm", "norm"), (r"to_([qkv])\.", r"\1."), (r"to_out\.0", "proj_out"),
]
TEXT = [(r"^(?!text_model\.)", "text_model.")]


def enliven(module: nn.Module) -> None:
    """Scale matrices so that signals keep their size, and move every bias and norm away from its trivial value.

    What is added to the residual stream is kept quiet, so that an epsilon of 1e-5 in a group norm differs from 1e-6.
    """
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.mul_(0.05 * 3**0.5 if re.search(r"(conv_in|conv2|proj_out|attentions\.0\.to_out\.0)\.", name) else 3**0.5)
        else:
            parameter.add_((0.2 if "norm" in name else 0.01) * torch.randn_like(parameter))


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer of bytes and a handful of merges."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge) for merge in MERGES)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=MERGES, model_max_length=77)


def text_encoder(size: int) -> CLIPTextModel:
    """A text tower of two layers with heads of 64 channels; its start and end tokens are the last two numbers."""
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=size, hidden_size=CONTEXT, intermediate_size=4 * CONTEXT, num_hidden_layers=2,
        num_attention_heads=CONTEXT // 64, max_position_embeddings=77, hidden_act="quick_gelu", bos_token_id=size - 2,
        eos_token_id=size - 1, pad_token_id=size - 1))


def unet() -> UNet2DConditionModel:
    """A U-Net of SD 1.x's structure; diffusers' attention_head_dim is the number of heads."""
    return UNet2DConditionModel(
        sample_size=32, block_out_channels=(32, 64, 128, 128), layers_per_block=2, cross_attention_dim=CONTEXT,
        attention_head_dim=8, norm_num_groups=32, down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)


def vae() -> AutoencoderKL:
    """An autoencoder of SD's structure."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 128, 128), layers_per_block=2, latent_channels=4, norm_num_groups=32, sample_size=256,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, scaling_factor=0.18215)


class UnroundedDPM(DPMSolverMultistepScheduler):
    """DPM-Solver++ that gives the network each Karras sigma's own timestep, where diffusers rounds it."""

    def set_timesteps(self, *args, **kwargs) -> None:
        """Set diffusers' sigmas and, for Karras spacing, fractional timesteps."""
        super().set_timesteps(*args, **kwargs)
        if self.config.use_karras_sigmas:
            table = np.log(((1 - self.alphas_cumprod.double()) / self.alphas_cumprod.double()).sqrt().numpy())
            self.timesteps = torch.tensor([float(self._sigma_to_t(sigma, table)) for sigma in self.sigmas[:-1].double().numpy()])


def scheduler(sampler: str, spacing: str, prediction: str = "eps") -> DDIMScheduler | DPMSolverMultistepScheduler:
    """diffusers' scheduler for a sampler and a spacing."""
    common = {**BETAS, "prediction_type": {"eps": "epsilon", "v": "v_prediction"}[prediction]}
    if sampler == "ddim":
        return DDIMScheduler(**common, clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing=spacing)
    if spacing == "karras":
        return UnroundedDPM(**common, use_karras_sigmas=True)
    return UnroundedDPM(**common, timestep_spacing=spacing)


def pipeline() -> StableDiffusionPipeline:
    """The seeded reference pipeline."""
    torch.manual_seed(0)
    words = tokenizer()
    parts = {"unet": unet(), "vae": vae(), "text_encoder": text_encoder(len(words))}
    for part in parts.values():
        enliven(part.eval().requires_grad_(False))
    pipe = StableDiffusionPipeline(**parts, tokenizer=words, scheduler=scheduler("ddim", "leading"), safety_checker=None,
                                   feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def renamed(weights: dict[str, Tensor], rules: list, prefix: str) -> dict[str, Tensor]:
    """Apply every rule to every name."""
    result = {}
    for name, value in weights.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        result[prefix + name] = value
    assert len(result) == len(weights), "two weights got one name"
    return result


def original(pipe: StableDiffusionPipeline) -> dict[str, Tensor]:
    """The pipeline's weights under the original names and shapes; the VAE's attention is made of 1x1 convolutions."""
    autoencoder = renamed(pipe.vae.state_dict(), VAE, "first_stage_model.")
    for name, value in autoencoder.items():
        if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name):
            autoencoder[name] = value[:, :, None, None]
    tower = {name: value for name, value in pipe.text_encoder.state_dict().items() if "position_ids" not in name}
    return {**renamed(pipe.unet.state_dict(), UNET, "model.diffusion_model."), **autoencoder,
            **renamed(tower, TEXT, "cond_stage_model.transformer.")}


def save_original(pipe: StableDiffusionPipeline, path: Path) -> Path:
    """Write the pipeline as one file in the original layout."""
    save_file({name: value.contiguous() for name, value in original(pipe).items()}, path)
    return path
