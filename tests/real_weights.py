"""A published checkpoint by scfg and by diffusers: `python tests/real_weights.py FILE [--tokenizer FOLDER]`.

tests/parity/requirements.txt must be installed; nothing is downloaded. diffusers' networks are built by its own classes
from the sizes of the file and get the file's tensors, so that a difference is one of computation. Both take the text
states of scfg, whose towers are transformers' own. Writes OUT/report.md, both pictures and S-CFG's regions.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).parent / "parity"), str(Path(__file__).parent.parent)]
import original  # noqa: E402
from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: E402
from schedulers import scheduler  # noqa: E402

import scfg  # noqa: E402
from scfg import cli  # noqa: E402
from scfg.report import Record, sheet, to_image, watch  # noqa: E402

TEXT = "a photo of a red cat on a green sofa, a blue vase behind it"
TIMES = (981, 501, 21)


def filled(module: nn.Module, names: dict[str, Tensor], tensors: dict[str, Tensor]) -> nn.Module:
    """diffusers' module, built on meta, with our tensors; `names` has the original names in its own order."""
    wanted = module.state_dict()
    found = {theirs: tensors[ours].reshape(wanted[theirs].shape) for theirs, ours in zip(wanted, names, strict=True)}
    module.load_state_dict(found, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def their_unet(model: scfg.Diffusion) -> nn.Module:
    """diffusers' U-Net around the same tensors."""
    own = model.config.unet
    widths = [own.model_channels * factor for factor in own.channel_mult]
    depths = [depth or 1 for depth in own.transformer_depth]
    options: dict[str, Any] = {}
    if own.vector_dim:
        options = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
        options["projection_class_embeddings_input_dim"] = own.vector_dim
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            in_channels=own.in_channels,
            out_channels=own.out_channels,
            block_out_channels=widths,
            layers_per_block=own.res_blocks,
            cross_attention_dim=own.context_dim,
            attention_head_dim=[own.heads or width // own.head_channels for width in widths],
            transformer_layers_per_block=depths,
            use_linear_projection=own.linear_projections,
            down_block_types=["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in own.transformer_depth],
            up_block_types=["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(own.transformer_depth)],
            **options,
        )
    return filled(unet, original.unet(unet), model.unet.state_dict())


def their_vae(model: scfg.Diffusion) -> nn.Module:
    """diffusers' VAE around the same tensors."""
    own = model.config.vae
    levels = len(own.channel_mult)
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=[own.channels * factor for factor in own.channel_mult],
            layers_per_block=own.res_blocks,
            latent_channels=own.latent_channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
        )
    return filled(vae, original.vae(vae), model.vae.state_dict())


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference in units of the largest value."""
    return ((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()).item()


class Comparison:
    """Both programs on one checkpoint, prompt and noise."""

    def __init__(self, model: scfg.Diffusion, size: tuple[int, int], steps: int):
        self.model, self.unet, self.vae = model, their_unet(model), their_vae(model)
        self.prompt, self.size, self.steps = model.prompt(TEXT), size, steps
        self.noise = model.noise([0], size)()
        conditioner = self.prompt.conditioner(model.config, model.device, model.dtype)
        rows = scfg.guidance.UNCOND, scfg.guidance.COND
        self.given = conditioner.condition(rows, model.config.schedule.moment(1.0), None, self.noise.shape)
        self.added = None
        if self.given.vector is not None:
            pooled = self.prompt.pooled["cond"].shape[-1]
            scores, (w, h) = model.config.aesthetic_scores, size
            ids = [[h, w, 0, 0, *((score,) if scores else (h, w))] for score in scores or (0, 0)]
            ids = torch.tensor(ids, device=model.device, dtype=model.dtype)
            self.added = {"text_embeds": self.given.vector[:, :pooled], "time_ids": ids}

    def theirs(self, x: Tensor, t: float) -> Tensor:
        """diffusers' output for both rows of x (1 c h w)."""
        t = torch.tensor(t, device=x.device)
        both = torch.cat([x] * 2).to(self.model.dtype)
        return self.unet(both, t, encoder_hidden_states=self.given.tokens, added_cond_kwargs=self.added).sample.float()

    def their_run(self) -> Tensor:
        """The latent of diffusers' DDIM with plain guidance."""
        schedule = scheduler("ddim", "trailing", self.model.config.schedule.prediction)
        schedule.set_timesteps(self.steps)
        x = self.noise.clone()
        for t in tqdm(schedule.timesteps, desc="diffusers", leave=False):
            uncond, cond = self.theirs(x, float(t)).chunk(2)
            x = schedule.step(uncond + self.model.config.scale * (cond - uncond), t, x).prev_sample
        return x

    def our_run(self, rule: scfg.CFG | scfg.SCFG) -> tuple[Tensor, Record, list[scfg.Step]]:
        """The latent of our DDIM, with what the report wing records, and some of its steps."""
        sigmas, record, kept = self.model.sigmas(self.steps, "ddim", "trailing"), Record(), []
        denoise = watch(self.model.denoiser(self.prompt, rule), sigmas)
        x = self.noise * (sigmas[0] ** 2 + 1) ** 0.5
        run = scfg.run(denoise, "ddim", x, sigmas, lambda: torch.zeros_like(x))
        for step in tqdm(run, desc="scfg", total=self.steps, leave=False):
            record.add(step)
            kept += [step] if step.index in (0, self.steps // 2, self.steps - 1) else []
        return step.latent, record, kept


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def compared(both: Comparison, out: Path) -> list[tuple[str, str]]:
    """The figures, a line each; writes the pictures."""
    model, lines, ratios = both.model, [], []
    for t in TIMES:
        x, ours = both.noise, None
        times = torch.full((1,), float(t), device=model.device)
        took = seconds(lambda: both.theirs(x, float(t)))  # noqa: B023
        ours, _ = model.unet(x.to(model.dtype), times, both.given)
        ratios.append(seconds(lambda: model.unet(x.to(model.dtype), times, both.given)) / took)  # noqa: B023
        lines.append(
            (f"U-Net at timestep {t}, largest difference / largest value", f"{apart(ours, both.theirs(x, t)):.1e}")
        )
    lines.append(("seconds of a CFG step, ours / diffusers' (median)", f"{sorted(ratios)[1]:.2f}"))
    ours, record, _ = both.our_run(scfg.CFG(model.config.scale))
    theirs, scale, dtype = both.their_run(), model.config.latent_scale, both.vae.dtype
    lines.append((f"latent after {both.steps} steps of DDIM with CFG", f"{apart(ours, theirs):.1e}"))
    picture = model.decode(ours)
    their_picture = (both.vae.decode((theirs / scale).to(dtype)).sample.float() / 2 + 0.5).clamp(0, 1)
    lines.append(("VAE decoding of one latent", f"{apart(model.decode(theirs), their_picture):.1e}"))
    encoded = both.vae.encode((picture * 2 - 1).to(dtype)).latent_dist.mean.float() * scale
    lines.append(("VAE encoding of one picture", f"{apart(model.encode(picture), encoded):.1e}"))
    off = (picture - their_picture).abs().amax(1) * 255
    for limit in (1, 2):
        lines.append((f"pixels within {limit}/255", f"{(off <= limit + 1e-3).float().mean():.2%}"))
    to_image(picture[0]).save(out / "scfg-cfg.png")
    to_image(their_picture[0]).save(out / "diffusers-cfg.png")
    return lines


def regions(both: Comparison, out: Path) -> list[tuple[str, str]]:
    """What S-CFG finds and does, which has no counterpart; writes the picture with its regions."""
    latent, record, steps = both.our_run(scfg.SCFG(both.model.config.scale))
    picture, words = to_image(both.model.decode(latent)[0]), both.prompt.words[0]
    sheet(picture, record.scores[0], record.scale[0], words, TEXT, both.prompt.chunk).save(out / "scfg-regions.png")
    lines = []
    for step in steps:
        scale, found = step.denoised.scale, step.denoised.regions
        text = f"scale {scale.min():.2f} to {scale.max():.2f}, mean {scale.mean():.2f}; foreground "
        text += f"{found.foreground.mean():.0%}; contrast {found.contrast().item():.2f}"
        lines.append((f"S-CFG at step {step.index + 1}", text))
        shares = [f"{word.text} {found.tokens[0, word.start : word.stop].mean():.0%}" for word in words]
        lines.append((f"share of the picture by word at step {step.index + 1}", ", ".join(shares)))
    return lines


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", help="WxH in pixels (default: the family's own)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--out", type=Path, default=Path("out/real_weights"))
    args = parser.parse_args()
    with cli.reporting_errors("real_weights.py"):
        dtype = args.dtype and getattr(torch, args.dtype)
        model = scfg.load(args.file, device=args.device, dtype=dtype, tokenizer=args.tokenizer)
        size = tuple(map(int, args.size.split("x"))) if args.size else model.config.size
        args.out.mkdir(parents=True, exist_ok=True)
        both = Comparison(model, size, args.steps)
        count = sum(len(network.state_dict()) for network in (model.unet, model.vae, model.towers()))
        lines = [
            ("file", args.file.name),
            ("family", f"{model.config.name}, predicts {model.config.schedule.prediction}, {count} tensors"),
            (
                "run",
                f"{size[0]}x{size[1]}, {args.steps} steps, {model.device}, {model.dtype}, torch {torch.__version__}",
            ),
            *compared(both, args.out),
            *regions(both, args.out),
        ]
        table = "\n".join(f"| {what} | {value} |" for what, value in lines)
        (args.out / "report.md").write_text(f"| what | figure |\n| --- | --- |\n{table}\n", encoding="utf-8")
        print(table, f"\n{args.out / 'report.md'}")


if __name__ == "__main__":
    main()
