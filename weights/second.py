"""Train the second Flatland checkpoint: `python weights/second.py vae`, then `judge`, `unet` and `export`.

Every phase resumes. `keep` writes what was trained so far into one file, from which `restore` goes on elsewhere.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from loop import How, train
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from train import natural, start_as_identity, to_image
from transformers import CLIPTokenizer

from scfg.config import Config, TextConfig, UNetConfig, VAEConfig
from scfg.data import config_to_json
from scfg.evaluate.clauses import GRID, HEADS, Judge, as_arrays
from scfg.flatland import draw, scenes
from scfg.formats import vocabulary
from scfg.schedule import Schedule
from scfg.text import Text, Tower
from scfg.unet import Conditioning, UNet
from scfg.vae import VAE

HERE = Path(__file__).parent
RUN = HERE / "run"  # rendered scenes and unfinished trainings
FLATLAND = Config(  # latent_scale and vocabulary are filled in by training
    "Flatland",
    UNetConfig(
        context_dim=192,
        model_channels=64,
        channel_mult=(1, 2),
        transformer_depth=(1, 1),
        res_blocks=2,
        head_channels=32,
    ),
    VAEConfig(channels=32, channel_mult=(1, 2, 2, 2), res_blocks=1),
    (TextConfig(width=192, layers=4, heads=6, length=32),),
    Schedule("v"),
    latent_scale=1.0,
    map_divisor=1,
    size=(128, 128),
    scale=2.0,
)
EMPTY_SHARE = 0.1  # captions replaced by the empty prompt, for guidance
SCALED_BY = 512  # scenes by whose latents these are scaled
BLOCK = 3000  # steps of the U-Net's training after which other scenes are drawn
KL_WEIGHT = 1e-3
LAYOUT_WEIGHT = 0.1
CELLS = 8  # along each side of the grid on which a caption's things are placed
PLACED = ("object", "colour", "size", "pattern")  # what is told of a cell of that grid


class Drawn(NamedTuple):
    """Scenes as they are drawn; things are numbered from back to front."""

    pictures: np.ndarray  # (n 128 128 3) uint8, or latents of them (n 4 16 16)
    owners: np.ndarray  # (n 64 64) uint8: 0, or 1 + the number of the thing that is seen there
    things: np.ndarray  # (n 5 7) float32: the indices of its HEADS, and its centre (x, y) in 0..1
    grounds: np.ndarray  # (n) uint8
    captions: Sequence[str]


def draw_one(job: tuple[int, bool]) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, str]:
    scene = scenes.compose(*job)
    picture, masks = draw.render(scene, FLATLAND.size)
    return (picture, *as_arrays(scene, masks), list(scenes.GROUNDS).index(scene.ground), scene.caption)


def drawn(first: int, count: int, seen: bool, what: str) -> Iterator[tuple]:
    """The scenes of so many seeds, drawn by all cores."""
    with multiprocessing.get_context("spawn").Pool() as pool:
        jobs = [(seed, seen) for seed in range(first, first + count)]
        yield from tqdm(pool.imap(draw_one, jobs, chunksize=32), total=count, desc=what)


def stacked(rows: list[tuple]) -> Drawn:
    pictures, owners, things, grounds, captions = zip(*rows)
    return Drawn(np.stack(pictures), np.stack(owners), np.stack(things), np.array(grounds, np.uint8), list(captions))


def save(path: Path, values: Drawn) -> None:
    with path.with_suffix(".part").open("wb") as file:
        np.savez(file, **values._replace(captions=np.array(values.captions))._asdict())
    path.with_suffix(".part").replace(path)


def digest(parts: Iterable[bytes]) -> str:
    """Names what files depend on."""
    return hashlib.sha256(b"".join(parts)).hexdigest()[:8]


@cache
def world() -> str:
    """Changes with what is drawn."""
    folder = Path(draw.__file__).parent
    return digest((folder / f"{name}.py").read_bytes() for name in ("world", "icons", "grounds", "scenes", "draw"))


def encoder(config: Config, device: str) -> tuple[VAE, str]:
    """The VAE that was trained, and a name of it."""
    vae = trained_vae(config, device)
    return vae, digest(value.cpu().numpy().tobytes() for value in vae.state_dict().values())


def pictures(count: int, seen: bool = True) -> Drawn:
    """The scenes of the seeds from 0 on, drawn once and kept."""
    path = RUN / f"pictures-{world()}-{'seen' if seen else 'unseen'}-{count}.npz"
    if not path.exists():
        save(path, stacked(list(drawn(0, count, seen, "scenes"))))
    return Drawn(**np.load(path))


@torch.no_grad()
def latents(config: Config, block: int, count: int, device: str) -> Drawn:
    """The scenes of a block of the U-Net's training, with unscaled latents for pictures; encoded once and kept."""
    path = RUN / f"latents-{world()}-{block}-{count}.npz"
    if not path.exists():
        vae, rows, every = (
            trained_vae(config, device),
            [],
            drawn(block * count, count, True, f"scenes of block {block}"),
        )
        while some := list(islice(every, 64)):
            encoded = vae.encode(to_image(np.stack([row[0] for row in some]), device))[0].half().cpu().numpy()
            rows += [(latent, *row[1:]) for latent, row in zip(encoded, some)]
        save(path, stacked(rows))
    return Drawn(**np.load(path))


def merges_of(words: Sequence[str]) -> list[tuple[str, str]]:
    """Merges that make words one token each, letter after letter; those of the first words come first."""
    merges = {}
    for word in words:
        letters = list(word[:-1]) + [word[-1] + "</w>"]
        for i in range(1, len(letters)):
            merges["".join(letters[:i]), letters[i]] = None
    return list(merges)


@cache
def world_merges() -> list[tuple[str, str]]:
    """Merges that make each of the world's words one token.

    A word's merge breaks into others ("on" into "moon"), which then have to come before it.
    """
    words = sorted(scenes.WORDS, key=len, reverse=True)
    while True:
        tokenizer = CLIPTokenizer(vocab=vocabulary(merges_of(words)), merges=merges_of(words))
        broken = [word for word in words if len(tokenizer.tokenize(word)) > 1]
        if not broken:
            return merges_of(words)
        words = broken + [word for word in words if word not in broken]


def world_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer(vocab=vocabulary(world_merges()), merges=world_merges())


def world_config() -> Config:
    return replace(FLATLAND, text=(replace(FLATLAND.text[0], vocabulary=len(vocabulary(world_merges()))),))


def train_vae(config: Config, steps: int, count: int, batch: int, how: How) -> None:
    torch.manual_seed(0)
    rgb, vae = pictures(count).pictures, VAE(config.vae).to(how.device)
    start_as_identity(vae)
    if how.compile:
        vae.encoder.compile()
        vae.decoder.compile()

    def loss_of(rng: np.random.Generator, done: float) -> Tensor:
        image = to_image(rgb[np.sort(rng.choice(count, batch, replace=False))], how.device)
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


def train_judge(config: Config, steps: int, count: int, batch: int, how: How) -> None:
    """Half of the pictures are as drawn, of either kind of composition; half are decoded from latents with some noise,
    as samples have it."""
    torch.manual_seed(0)
    seen, unseen = pictures(count), pictures(count // 4, seen=False)
    vae, model = trained_vae(config, how.device), Judge().to(how.device)
    if how.compile:
        model.compile()

    @torch.no_grad()
    def as_decoded(image: Tensor, rng: np.random.Generator) -> Tensor:
        latent, _ = vae.encode(image)
        levels = torch.from_numpy(rng.uniform(0, 0.3, (len(latent), 1, 1, 1))).float().to(how.device)
        return vae.decode(latent + latent.std() * levels * torch.randn_like(latent))

    def loss_of(rng: np.random.Generator, done: float) -> Tensor:
        parts = [(some, np.sort(rng.choice(len(some.grounds), batch // 2, replace=False))) for some in (seen, unseen)]
        images = torch.cat([to_image(some.pictures[which], how.device) for some, which in parts])
        every_other = torch.arange(batch) % 2 == 0
        images[every_other] = as_decoded(images[every_other], rng)
        owners, things, grounds = (
            np.concatenate([getattr(some, name)[which] for some, which in parts])
            for name in ("owners", "things", "grounds")
        )
        return judge_loss(model, images.clamp(-1, 1) / 2 + 0.5, owners, things, grounds)

    train(RUN / "judge.pt", model, loss_of, steps, 4e-3, how)


def at_cells(owners: np.ndarray, things: np.ndarray) -> np.ndarray:
    """What things (b 5 7) has of the one that owns each cell (b h w): (b h w 7), nothing where none does."""
    with_none = np.concatenate([np.zeros_like(things[:, :1]), things], 1)
    return with_none[np.arange(len(owners))[:, None, None], owners]


def judge_loss(model: Judge, images: Tensor, owners: np.ndarray, things: np.ndarray, grounds: np.ndarray) -> Tensor:
    logits, way, ground = model(images)
    truth = torch.from_numpy(at_cells(owners, things)).to(images.device)
    inside = torch.from_numpy(owners > 0).to(images.device)
    loss = F.cross_entropy(ground, torch.from_numpy(grounds).long().to(images.device))
    for i, head in enumerate(HEADS):
        wanted = truth[..., i].long()  # an object of 0 is none, and the rest is not asked there
        loss = loss + F.cross_entropy(logits[head], wanted if head == "object" else wanted.where(inside, -100))
    ys, xs = torch.meshgrid(*(2 * [torch.arange(GRID, device=images.device) + 0.5]), indexing="ij")
    wanted = truth[..., 5:].movedim(-1, 1) * GRID - torch.stack([xs, ys])
    return loss + ((way - wanted).abs() * inside[:, None]).sum() / inside.sum().clamp_min(1) / 8


class Layout(nn.Module):
    """Reads from a caption's states what stands where, on a grid of cells.

    As CLIP's towers learned from pictures what words mean, ours learns the order of "left of" here: the picture alone
    teaches it only once tower and U-Net both half know it.
    """

    def __init__(self, width: int):
        super().__init__()
        self.cells = nn.Parameter(torch.randn(CELLS**2, width))
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mix = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU())
        self.out = nn.Linear(2 * width, sum(len(HEADS[head]) for head in PLACED))

    def forward(self, context: Tensor) -> Tensor:
        """(b m c) to logits (b cells n)."""
        cells = self.cells.expand(len(context), -1, -1)
        return self.out(self.mix(self.attention(cells, context, context, need_weights=False)[0]))


class Denoiser(nn.Module):
    """What the second phase trains together."""

    def __init__(self, config: Config):
        super().__init__()
        self.unet = UNet(config.unet)
        self.text = Text(map(Tower, config.text), world_tokenizer())
        self.layout = Layout(config.unet.context_dim)

    def states(self, ids: list[list[int]]) -> Tensor:
        (of_tower,), _ = self.text.encode(ids, self.layout.cells.device)
        return of_tower


def layout_loss(logits: Tensor, owners: np.ndarray, things: np.ndarray, told: np.ndarray) -> Tensor:
    """told: which captions were read, and not the empty one in their place."""
    every = GRID // CELLS
    middles = owners[:, every // 2 :: every, every // 2 :: every]
    truth = rearrange(torch.from_numpy(at_cells(middles, things)[told]), "b h w n -> b (h w) n").to(logits.device)
    logits = logits[torch.from_numpy(told).to(logits.device)]
    inside, loss = truth[..., 0] > 0, torch.zeros((), device=logits.device)
    for i, of_head in enumerate(torch.split(logits, [len(HEADS[head]) for head in PLACED], dim=-1)):
        wanted = truth[..., i].long()
        loss = loss + F.cross_entropy(of_head.mT, wanted if i == 0 else wanted.where(inside, -100))
    return loss


def train_unet(config: Config, steps: int, count: int, batch: int, how: How) -> None:
    torch.manual_seed(0)
    model = Denoiser(config).to(how.device)
    if how.compile:
        model.unet.compile()
    start_as_identity(model.unet)
    nn.init.zeros_(model.unet.out[2].weight)
    scale = latent_scale(config, how.device)
    alphas = torch.tensor(1 / (config.schedule.sigmas**2 + 1), dtype=torch.float32, device=how.device)
    empty = model.text.tokenize("")[0]

    @lru_cache(1)
    def of_block(block: int) -> tuple[Drawn, list[list[int]]]:
        some = latents(config, block, count, how.device)
        return some, [model.text.tokenize(str(caption))[0] for caption in tqdm(some.captions, "captions")]

    def loss_of(rng: np.random.Generator, done: float) -> Tensor:
        some, tokens = of_block(round(done * steps) // BLOCK)
        chosen = rng.choice(count, batch, replace=False)
        dropped = rng.random(batch) < EMPTY_SHARE
        ids = [empty if drop else tokens[i] for i, drop in zip(chosen, dropped)]
        # half of them noisy: what stands where is decided in noise
        anywhere, noisy = rng.integers(0, 1000, batch), rng.integers(700, 1000, batch)
        t = torch.from_numpy(np.where(rng.random(batch) < 0.5, anywhere, noisy)).to(how.device)
        clean = torch.from_numpy(some.pictures[chosen]).to(how.device).float() * scale
        a = alphas[t].view(-1, 1, 1, 1)
        noise = torch.from_numpy(rng.standard_normal(clean.shape, dtype=np.float32)).to(how.device)
        x, v = a.sqrt() * clean + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * clean
        states = model.states(ids)
        error = model.unet(x, t, Conditioning(states))[0] - v
        stands = layout_loss(model.layout(states), some.owners[chosen], some.things[chosen], ~dropped)
        return error.square().mean() + LAYOUT_WEIGHT * stands

    train(RUN / "unet.pt", model, loss_of, steps, 8e-3, how)


@torch.no_grad()
def latent_scale(config: Config, device: str) -> float:
    """What makes latents deviate by one, by the VAE that was trained."""
    vae, name = encoder(config, device)
    path = RUN / f"scale-{world()}-{name}"
    if not path.exists():
        rgb = np.stack([row[0] for row in drawn(0, SCALED_BY, True, "scale")])
        encoded = torch.cat([vae.encode(to_image(some, device))[0] for some in np.array_split(rgb, SCALED_BY // 32)])
        path.write_text(str(1 / encoded.std().item()))
    return float(path.read_text())


def trained(name: str) -> tuple[dict[str, Tensor], int]:
    """The average of a phase's network, and the steps it took."""
    state = torch.load(RUN / f"{name}.pt", map_location="cpu", weights_only=True)
    return state["average"], int(state["step"])


def keep(path: Path) -> None:
    """Write the averages of all phases that were begun into one fp16 file."""
    tensors, steps = {}, {}
    for name in ("vae", "judge", "unet"):
        if (RUN / f"{name}.pt").exists():
            average, steps[name] = trained(name)
            tensors |= {f"{name}/{key}": value.half().contiguous() for key, value in average.items()}
    save_file(tensors, path, {"steps": json.dumps(steps)})
    tqdm.write(f"{path}: {path.stat().st_size / 1e6:.1f} MB, steps {steps}")


def restore(path: Path) -> None:
    """Go on from a kept file: from the averages, with an optimiser that knows nothing yet."""
    with safe_open(path, "pt") as file:
        steps = json.loads(file.metadata()["steps"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    for name, step in steps.items():
        values = {key.split("/")[1]: value for key, value in tensors.items() if key.startswith(f"{name}/")}
        values = {key: value.float() if value.is_floating_point() else value for key, value in values.items()}
        torch.save({"model": values, "optimizers": [], "average": values, "step": step}, RUN / f"{name}.pt")


def export(config: Config, path: Path) -> None:
    """Write a checkpoint: fp16, original key layout, config and vocabulary in its metadata; and the judge."""
    vae, denoiser = trained("vae")[0], trained("unet")[0]
    tensors = {f"first_stage_model.{k}": v for k, v in vae.items()}
    for name, value in denoiser.items():
        part, rest = name.split(".", 1)
        if part == "unet":
            tensors[f"model.diffusion_model.{rest}"] = value
        elif part == "text":
            tensors[f"{config.text[0].prefix}text_model.{rest.removeprefix('towers.0.transformer.')}"] = value
    config = replace(config, latent_scale=latent_scale(config, "cpu"))
    merges = world_merges()
    vocab = {"scfg.vocab": vocabulary(merges), "scfg.merges": merges, "scfg.words": scenes.WORDS}
    metadata = {"scfg.config": config_to_json(config)} | {k: json.dumps(v) for k, v in vocab.items()}
    save_file({k: v.half().contiguous() for k, v in tensors.items()}, path, metadata)
    judge = path.with_name("judge-second.safetensors")
    save_file({k: v.half().contiguous() for k, v in trained("judge")[0].items()}, judge)
    for written in (path, judge):
        tqdm.write(f"{written}: {written.stat().st_size / 1e6:.1f} MB")


def main() -> None:
    usual = {"vae": (train_vae, 2000, 8, 12288), "judge": (train_judge, 1500, 32, 12288)}
    usual |= {"unet": (train_unet, 9000, 32, 24576)}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("phase", choices=[*usual, "keep", "restore", "export"])
    parser.add_argument("--steps", type=natural, help="of the whole training")
    parser.add_argument("--batch", type=natural)
    parser.add_argument("--scenes", type=natural, help="scenes to train on; of the U-Net, at a time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bfloat16", action="store_true", help="products in bfloat16")
    parser.add_argument("--compile", action="store_true", help="compile the networks")
    parser.add_argument("--minutes", type=float, default=math.inf, help="save and leave after so many")
    parser.add_argument("--file", type=Path, default=HERE / "second.safetensors")
    args = parser.parse_args()
    RUN.mkdir(exist_ok=True)
    if args.phase == "keep":
        keep(args.file)
    elif args.phase == "restore":
        restore(args.file)
    elif args.phase == "export":
        export(world_config(), args.file)
    else:
        phase, steps, batch, count = usual[args.phase]
        how = How(args.device, args.bfloat16, args.compile, args.minutes)
        phase(world_config(), args.steps or steps, args.scenes or count, args.batch or batch, how)


if __name__ == "__main__":
    main()
