"""Train the embedded Flatland checkpoint: `python weights/train.py vae`, then `judge`, `unet` and `export`.

Every phase resumes.
"""

import argparse
import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from loop import How, train
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm, trange
from transformers import CLIPTokenizer

from scfg import flatland
from scfg.config import Config
from scfg.data import config_to_json
from scfg.evaluate.judge import SIDE, Judge
from scfg.flatland import FLATLAND
from scfg.formats import vocabulary
from scfg.text import Text, Tower
from scfg.unet import Conditioning, UNet
from scfg.vae import VAE

HERE = Path(__file__).parent
RUN = HERE / "run"  # rendered scenes and unfinished trainings
EMPTY_SHARE = 0.1  # captions replaced by the empty prompt, for guidance
UNSEEN_SCENES = 4096  # which only the judge is shown
KL_WEIGHT = 1e-3
LAYOUT_WEIGHT = 0.3
CELLS = 8  # along each side of the grid on which a caption's things are placed


def world_merges() -> list[tuple[str, str]]:
    """Merges that make each of the world's words one token, letter after letter.

    The longest words come first, so that no short word's merge ("on") breaks into a longer one ("moon").
    """
    merges = {}
    for word in sorted(flatland.WORDS, key=len, reverse=True):
        letters = list(word[:-1]) + [word[-1] + "</w>"]
        for i in range(1, len(letters)):
            merges["".join(letters[:i]), letters[i]] = None
    return list(merges)


def world_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer(vocab=vocabulary(world_merges()), merges=world_merges())


def world_config() -> Config:
    return replace(FLATLAND, text=(replace(FLATLAND.text[0], vocabulary=len(vocabulary(world_merges()))),))


def scenes(count: int, seen: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (count h w 3) of the scenes 0 .. count - 1 and what stands where (count h w), both uint8.

    What stands where is 0, or 1 + 8 * object + colour.
    """
    world = hashlib.sha256(Path(flatland.world.__file__).read_bytes()).hexdigest()[:8]
    paths = [RUN / f"{kind}-{world}-{'seen' if seen else 'unseen'}-{count}.npy" for kind in ("pictures", "things")]
    if not paths[1].exists():
        pictures, things = [], []
        for seed in trange(count, desc="scenes"):
            scene = flatland.compose(seed, seen)
            picture, masks = flatland.render(scene, FLATLAND.size)
            labels = [
                1 + 8 * flatland.OBJECTS.index(t.name) + list(flatland.COLOURS).index(t.colour) for t in scene.things
            ]
            pictures.append(picture)
            things.append(sum(label * mask for label, mask in zip(labels, masks)).astype(np.uint8))
        for path, values in zip(paths, (pictures, things)):
            np.save(path.with_suffix(".part.npy"), np.stack(values))
            path.with_suffix(".part.npy").replace(path)
    return tuple(np.load(path, mmap_mode="r") for path in paths)


def to_image(pictures: np.ndarray, device: str) -> Tensor:
    return rearrange(torch.from_numpy(pictures).to(device), "b h w c -> b c h w").float() / 127.5 - 1


def start_as_identity(model: nn.Module) -> None:
    """Zero the last layer of every residual branch: a deep network then begins as its short path and learns at once."""
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("conv2.", "proj_out.", "out_layers.3.", "to_out.0.", "ff.net.2.")):
            nn.init.zeros_(parameter)


def train_vae(config: Config, steps: int, count: int, batch: int, how: How) -> None:
    torch.manual_seed(0)
    pictures, vae = scenes(count)[0], VAE(config.vae).to(how.device)
    start_as_identity(vae)
    if how.compile:
        vae.encoder.compile()
        vae.decoder.compile()

    def loss_of(rng: np.random.Generator, done: float) -> Tensor:
        image = to_image(pictures[np.sort(rng.choice(count, batch, replace=False))], how.device)
        mean, log_variance = vae.encode(image)
        error = vae.decode(mean + (log_variance / 2).exp() * torch.randn_like(mean)) - image
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2
        absolute = min(1, 4 * done) * error.abs().mean()  # L1 alone greys colours
        return error.square().mean() + absolute + KL_WEIGHT * divergence

    train(RUN / "vae.pt", vae, loss_of, steps, 8e-3, how)


def trained_vae(config: Config, device: str) -> VAE:
    vae = VAE(config.vae).to(device).eval()
    vae.load_state_dict(torch.load(RUN / "vae.pt", map_location=device, weights_only=True)["average"])
    return vae


@torch.no_grad()
def latents(config: Config, count: int, device: str) -> Tensor:
    """Unscaled latents (count c h w) of the training scenes, encoded once and kept."""
    path = RUN / f"latents-{count}.pt"
    if not path.exists():
        vae, pictures = trained_vae(config, device), scenes(count)[0]
        parts = [
            vae.encode(to_image(np.array(pictures[i : i + 32]), device))[0].cpu()
            for i in trange(0, count, 32, desc="latents")
        ]
        torch.save(torch.cat(parts), path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    return torch.load(path, weights_only=True)


class Drawn(NamedTuple):
    """Scenes as they are drawn."""

    pictures: np.ndarray  # (n h w 3)
    things: np.ndarray  # (n h w)
    backgrounds: Tensor  # (n)


def drawn_scenes(count: int, seen: bool) -> Drawn:
    names = list(flatland.BACKGROUNDS)
    backgrounds = [names.index(flatland.compose(seed, seen).background) for seed in trange(count, desc="backgrounds")]
    return Drawn(*scenes(count, seen), torch.tensor(backgrounds))


def train_judge(config: Config, steps: int, count: int, batch: int, how: How) -> None:
    """Half of the pictures are as drawn, of either kind of composition; half are decoded from latents with some noise,
    as samples have it."""
    torch.manual_seed(0)
    drawn = drawn_scenes(count, seen=True), drawn_scenes(UNSEEN_SCENES, seen=False)
    z, vae, every = latents(config, count, how.device), trained_vae(config, how.device), FLATLAND.size[0] // SIDE
    model, deviation = Judge().to(how.device), z.std()
    if how.compile:
        model.compile()

    @torch.no_grad()
    def batch_of(rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        parts = [(drawn[0], batch // 2), (drawn[0], batch // 4), (drawn[1], batch // 4)]
        chosen = [(some, np.sort(rng.choice(len(some.pictures), n, replace=False))) for some, n in parts]
        decoded, levels = z[chosen[0][1]], torch.from_numpy(rng.uniform(0, 0.3, (batch // 2, 1, 1, 1)))
        decoded = vae.decode((decoded + deviation * levels * torch.randn(decoded.shape)).float().to(how.device))
        as_drawn = [to_image(some.pictures[which], how.device) for some, which in chosen[1:]]
        pictures = torch.cat([decoded, *as_drawn]).clamp(-1, 1)
        things = np.concatenate([some.things[which] for some, which in chosen])[:, ::every, ::every]
        backgrounds = torch.cat([some.backgrounds[which] for some, which in chosen])
        pictures = F.interpolate(pictures / 2 + 0.5, size=(SIDE, SIDE), mode="area")
        return pictures, torch.from_numpy(things).long().to(how.device), backgrounds.to(how.device)

    def loss_of(rng: np.random.Generator, done: float) -> Tensor:
        pictures, things, backgrounds = batch_of(rng)
        found_objects, found_colours, found_backgrounds = model(pictures)
        objects = torch.where(things > 0, (things - 1) // 8 + 1, 0)
        colours = torch.where(things > 0, (things - 1) % 8, -100)  # none where nothing stands
        of_things = F.cross_entropy(found_objects, objects) + F.cross_entropy(found_colours, colours)
        return of_things + F.cross_entropy(found_backgrounds, backgrounds)

    train(RUN / "judge.pt", model, loss_of, steps, 4e-3, how)


class Layout(nn.Module):
    """Reads from a caption's states what stands where, on a grid of cells.

    As CLIP's towers learned from pictures what words mean, ours learns the order of "left of" here: the picture alone
    teaches it only once tower and U-Net both half know it, and neither had begun after 4,700 steps.
    """

    def __init__(self, width: int):
        super().__init__()
        self.cells = nn.Parameter(torch.randn(CELLS**2, width))
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.out = nn.Linear(width, 1 + len(flatland.OBJECTS))

    def forward(self, context: Tensor) -> Tensor:
        """(b m c) to logits (b objects cells)."""
        cells = self.cells.expand(len(context), -1, -1)
        return self.out(self.attention(cells, context, context, need_weights=False)[0]).mT


class Denoiser(nn.Module):
    """What the second phase trains together."""

    def __init__(self, config: Config):
        super().__init__()
        self.unet = UNet(config.unet)
        self.text = Text(map(Tower, config.text), world_tokenizer())
        self.layout = Layout(config.unet.context_dim)


def train_unet(config: Config, steps: int, count: int, batch: int, how: How) -> None:
    torch.manual_seed(0)
    z = latents(config, count, how.device).to(how.device)
    z = z / z.std()
    model = Denoiser(config).to(how.device)
    if how.compile:
        model.unet.compile()
    start_as_identity(model.unet)
    nn.init.zeros_(model.unet.out[2].weight)
    tokens = [model.text.tokenize(flatland.compose(seed).caption)[0] for seed in trange(count, desc="captions")]
    empty = model.text.tokenize("")[0]
    every = FLATLAND.size[0] // CELLS
    things = scenes(count)[1][:, every // 2 :: every, every // 2 :: every].reshape(count, -1).astype(int)
    cells = torch.from_numpy((things + 7) // 8).to(how.device)  # 0, or 1 + object
    alphas = torch.tensor(1 / (config.schedule.sigmas**2 + 1), dtype=torch.float32, device=how.device)

    def states(ids: list[list[int]]) -> Tensor:
        (of_tower,), _ = model.text.encode(ids, model.layout.cells.device)
        return of_tower

    def loss_of(rng: np.random.Generator, done: float) -> Tensor:
        chosen = rng.choice(count, batch, replace=False)
        ids = [empty if dropped else tokens[i] for i, dropped in zip(chosen, rng.random(batch) < EMPTY_SHARE)]
        # half of them noisy: what stands where is decided in noise
        anywhere, noisy = rng.integers(0, 1000, batch), rng.integers(700, 1000, batch)
        t = torch.from_numpy(np.where(rng.random(batch) < 0.5, anywhere, noisy)).to(how.device)
        a, clean = alphas[t].view(-1, 1, 1, 1), z[torch.from_numpy(chosen).to(how.device)]
        drawn = torch.from_numpy(rng.standard_normal(clean.shape, dtype=np.float32)).to(how.device)
        x, v = a.sqrt() * clean + (1 - a).sqrt() * drawn, a.sqrt() * drawn - (1 - a).sqrt() * clean
        error = model.unet(x, t, Conditioning(states(ids)))[0] - v
        others = rng.choice(count, 2 * batch, replace=False)  # the tower is small: more captions cost nothing
        stands = model.layout(states([tokens[i] for i in others]))
        there = cells[torch.from_numpy(others).to(how.device)]
        return error.square().mean() + LAYOUT_WEIGHT * F.cross_entropy(stands, there)

    train(RUN / "unet.pt", model, loss_of, steps, 8e-3, how)


def export(config: Config, count: int) -> None:
    """Write weights/flatland.safetensors: fp16, original key layout, config and vocabulary in its metadata."""
    vae = torch.load(RUN / "vae.pt", map_location="cpu", weights_only=True)["average"]
    denoiser = torch.load(RUN / "unet.pt", map_location="cpu", weights_only=True)["average"]
    tensors = {f"first_stage_model.{k}": v for k, v in vae.items()}
    for name, value in denoiser.items():
        part, rest = name.split(".", 1)
        if part == "unet":
            tensors[f"model.diffusion_model.{rest}"] = value
        elif part == "text":
            tensors[f"{config.text[0].prefix}text_model.{rest.removeprefix('towers.0.transformer.')}"] = value
    config = replace(config, latent_scale=1 / latents(config, count, "cpu").std().item())
    merges = world_merges()
    vocab = {"scfg.vocab": vocabulary(merges), "scfg.merges": merges, "scfg.words": flatland.WORDS}
    metadata = {"scfg.config": config_to_json(config)} | {k: json.dumps(v) for k, v in vocab.items()}
    save_file({k: v.half().contiguous() for k, v in tensors.items()}, HERE / "flatland.safetensors", metadata)
    judge = torch.load(RUN / "judge.pt", map_location="cpu", weights_only=True)["average"]
    save_file({k: v.half().contiguous() for k, v in judge.items()}, HERE / "judge.safetensors")
    for path in (HERE / "flatland.safetensors", HERE / "judge.safetensors"):
        tqdm.write(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def natural(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 up")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("phase", choices=["vae", "judge", "unet", "export"])
    parser.add_argument(
        "--steps", type=natural, help="of the whole training (default: 1400 for vae, 1000 for judge, 6000 for unet)"
    )
    parser.add_argument("--batch", type=natural, help="(default: 8 for vae, 32 for the others)")
    parser.add_argument("--scenes", type=natural, default=16384, help="scenes to train on (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--bfloat16", action="store_true", help="products in bfloat16, which GPUs and newer CPUs are faster at"
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile the networks, which takes a minute and needs a C++ compiler"
    )
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="save and leave after so many; the same command goes on"
    )
    args = parser.parse_args()
    RUN.mkdir(exist_ok=True)
    for before in {"vae": (), "judge": ("vae",), "unet": ("vae",), "export": ("vae", "judge", "unet")}[args.phase]:
        if not (RUN / f"{before}.pt").exists():
            parser.error(f"{args.phase} needs what {before} leaves in {RUN}: run that phase first")
    later = [path.name for path in (*RUN.glob("latents-*.pt"), RUN / "judge.pt", RUN / "unet.pt") if path.exists()]
    if args.phase == "vae" and later:
        what = f"{', '.join(later)} in {RUN} came of the VAE that is there"
        parser.error(f"{what}: move them away before another is trained")
    config = world_config()
    if args.phase == "export":
        export(config, args.scenes)
    else:
        usual = {"vae": (train_vae, 1400, 8), "judge": (train_judge, 1000, 32), "unet": (train_unet, 6000, 32)}
        phase, steps, batch = usual[args.phase]
        how = How(args.device, args.bfloat16, args.compile, args.minutes)
        phase(config, args.steps or steps, args.scenes, args.batch or batch, how)


if __name__ == "__main__":
    main()
