"""What is compared: one guided step, ours and diffusers', on the same random weights and the same inputs.

diffusers' U-Net is built and ours takes over its tensors, so that both fit into memory and must give one result.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from einops import rearrange
from torch import Tensor, nn

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "parity"), str(TESTS.parent)]
import original  # noqa: E402

import scfg  # noqa: E402
import scfg.cpu as cpu  # noqa: E402
from scfg import CFG, SCFG, Maps, Outputs, Prompt, segment_maps  # noqa: E402
from scfg.config import SD1, SDXL, Config  # noqa: E402
from scfg.unet import UNet  # noqa: E402

GAMMA, SIGMA = 7.5, 3.0
RULE, PAPER_RULE = SCFG(GAMMA), SCFG.paper(GAMMA)
MOMENT = SD1.schedule.moment(SIGMA)  # of every family here
Step = Callable[[], Tensor]  # one guided step -> x0 (1 c h w)
FAMILIES: dict[str, tuple[Config, dict[str, Any]]] = {  # ours, and what diffusers calls the same
    "sd1": (SD1, {"cross_attention_dim": 768, "attention_head_dim": 8}),
    "sdxl": (
        SDXL,
        {
            "block_out_channels": (320, 640, 1280),
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        },
    ),
}


def reference_unet(family: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """diffusers' U-Net at full size, with the random weights that it starts from."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(device):
        unet = UNet2DConditionModel(**FAMILIES[family][1])
    torch.set_default_dtype(before)
    return unet.eval().requires_grad_(False)


def ours_of(reference: nn.Module, config: Config) -> scfg.Diffusion:
    """Our U-Net around the very tensors of diffusers'."""
    with torch.device("meta"):
        unet = UNet(config.unet)
    unet.load_state_dict(original.unet(reference), strict=True, assign=True)
    return scfg.Diffusion(config, unet.eval().requires_grad_(False), vae=None, text=None)


def inputs(config: Config, side: int, device: str = "cpu") -> tuple[Tensor, Prompt]:
    """A noisy latent (1 4 side side) and a prompt, random."""
    generator = torch.Generator().manual_seed(1)

    def rows(*shape: int) -> dict[str, Tensor]:
        return {row: torch.randn(1, *shape, generator=generator).to(device) for row in ("uncond", "cond")}

    x = SIGMA * torch.randn(1, 4, side, side, generator=generator).to(device)
    pooled = rows(config.unet.vector_dim - 6 * 256) if config.unet.vector_dim else {}
    return x, Prompt(context=rows(77, config.unet.context_dim), pooled=pooled)


class Explicit:
    """Attention as hook-based programs do it: every block's probabilities are made, those of small grids kept."""

    def __init__(self, pixels: int):
        self.pixels, self.kept = pixels, []

    def __call__(
        self, attention: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **unused
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            attention.head_to_batch_dim(to(of))
            for to, of in ((attention.to_q, hidden_states), (attention.to_k, context), (attention.to_v, context))
        )
        probabilities = attention.get_attention_scores(q, k)
        if q.shape[1] <= self.pixels:
            by_head = rearrange(probabilities, "(b heads) n m -> b heads n m", heads=attention.heads)
            self.kept.append(by_head.float().mean(1))
        return attention.to_out[0](attention.batch_to_head_dim(probabilities @ v))

    def maps(self) -> list[Maps]:
        """What was kept, which is then forgotten; the blocks' self and cross maps came in turns."""
        kept, self.kept = self.kept, []
        side = [math.isqrt(cross.shape[1]) for cross in kept[1::2]]
        return [Maps(of_self, cross, (n, n)) for of_self, cross, n in zip(kept[::2], kept[1::2], side)]


def our_step(model: scfg.Diffusion, guidance: CFG | SCFG, x: Tensor, prompt: Prompt) -> Step:
    denoise = model.denoiser(prompt, guidance)
    return lambda: denoise(x, SIGMA).x0


def their_step(unet: nn.Module, config: Config, x: Tensor, prompt: Prompt, explicit: Explicit | None = None) -> Step:
    """A step of diffusers' network by plain CFG; or, with explicit attention, by official S-CFG from its maps."""
    side = x.shape[-1]
    context = torch.cat([prompt.context["uncond"], prompt.context["cond"]]).to(unet.dtype)
    sizes = torch.tensor([[8 * side, 8 * side, 0, 0, 8 * side, 8 * side]] * 2, device=x.device, dtype=unet.dtype)
    added = None
    if prompt.pooled:
        added = {"text_embeds": torch.cat([*prompt.pooled.values()]).to(unet.dtype), "time_ids": sizes}
    t = torch.tensor(MOMENT.t, device=x.device)

    def step() -> Tensor:
        scaled = (x / math.sqrt(SIGMA**2 + 1)).to(unet.dtype)
        out = unet(torch.cat([scaled] * 2), t, encoder_hidden_states=context, added_cond_kwargs=added).sample
        uncond, cond = out.float().chunk(2)
        outputs = Outputs(x, cond, uncond, None, cond - uncond, MOMENT.to_x0(x, cond), MOMENT.dx0_dout)
        scale = RULE(outputs, segment_maps(explicit.maps()), MOMENT) if explicit else GAMMA
        return MOMENT.to_x0(x, uncond + scale * outputs.difference)

    return step


class OpenVINO(nn.Module):
    """diffusers' network, converted, on the CPU: what people take for speed there."""

    def __init__(self, unet: nn.Module, config: Config, side: int):
        super().__init__()
        import openvino

        class Plain(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.unet = unet

            def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
                return self.unet(x, t, encoder_hidden_states=context, return_dict=False)[0]

        given = torch.randn(2, 4, side, side), torch.tensor(500.0), torch.randn(2, 77, config.unet.context_dim)
        model = openvino.convert_model(Plain(), example_input=given, input=[one.shape for one in given])
        exact = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        self.compiled, self.dtype = openvino.Core().compile_model(model, "CPU", exact), unet.dtype

    def forward(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor, added_cond_kwargs: None) -> SimpleNamespace:
        found = self.compiled([x.numpy(), t.numpy(), encoder_hidden_states.numpy()])
        return SimpleNamespace(sample=torch.from_numpy(found[0].copy()))


def steps(reference: nn.Module, config: Config, side: int, compiled: bool = False) -> dict[str, Step]:
    """Every contender by name, on a latent of side x side."""
    if compiled:
        reference.to(memory_format=torch.channels_last)  # as ours are laid out then
    model, (x, prompt) = ours_of(reference, config), inputs(config, side, reference.device)
    explicit = Explicit((side // config.map_divisor) ** 2)
    with torch.device("meta"):
        hooked = type(reference)(**reference.config)
    hooked.load_state_dict(reference.state_dict(), assign=True)
    hooked.set_attn_processor(explicit)
    if compiled:
        model = model.compiled()
        reference.compile(fullgraph=True)
    ours = {
        name: our_step(model, guidance, x, prompt)
        for name, guidance in (("CFG", CFG(GAMMA)), ("S-CFG", RULE), ("S-CFG, paper", PAPER_RULE))
    }
    if str(reference.device) == "cpu" and not compiled:
        packed = ours_of(reference, config)
        assert cpu.can_pack(reference.dtype)
        cpu.pack_layers(packed.unet)
        ours |= {"CFG, packed": our_step(packed, CFG(GAMMA), x, prompt)}
        ours |= {"S-CFG, packed": our_step(packed, RULE, x, prompt)}
    return ours | {
        "diffusers CFG": their_step(reference, config, x, prompt),
        "diffusers S-CFG, explicit": their_step(hooked.eval(), config, x, prompt, explicit),
    }
