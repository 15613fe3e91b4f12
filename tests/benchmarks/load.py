"""From a full-size file to a warm network, ours beside diffusers' single-file loading, each in a process of its own.

The price of a start is the time of loading and of the first step less that of a later one: what lazy loading puts off
is counted.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import contenders
import families
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import save_file
from timing import ratio
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import scfg
from scfg import cpu
from scfg.config import SD1
from scfg.formats import vocabulary

STORED = (
    "float16",
    "float32",
)  # in the file; the network is float32, since a CPU's float16 steps take twenty times as long


def local_config(folder: Path) -> Path:
    """The description of SD 1.5 that diffusers otherwise asks a hub for; its networks' weights are never made."""
    with torch.device("meta"):
        pipe = StableDiffusionPipeline(
            unet=contenders.UNet2DConditionModel(sample_size=64, **contenders.FAMILIES["sd1"][1]),
            vae=AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                latent_channels=4,
                sample_size=512,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
            ),
            text_encoder=CLIPTextModel(
                CLIPTextConfig(
                    hidden_size=768,
                    intermediate_size=3072,
                    num_hidden_layers=12,
                    num_attention_heads=12,
                    projection_dim=768,
                    bos_token_id=49406,
                    eos_token_id=49407,
                )
            ),
            tokenizer=CLIPTokenizer(vocab=vocabulary([]), merges=[]),
            scheduler=DDIMScheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.save_config(folder)
    for name in ("unet", "vae", "scheduler"):
        getattr(pipe, name).save_config(folder / name)
    pipe.text_encoder.config.save_pretrained(folder / "text_encoder")
    pipe.tokenizer.save_pretrained(folder / "tokenizer")
    return folder


@torch.no_grad()
def start(who: str, file: Path, config: Path) -> dict[str, float]:
    """Load into float32 and take steps, in this process."""
    x, prompt = contenders.inputs(
        SD1, 16
    )  # every weight is touched at any size; long steps would drown what is measured
    if who == "ours, memory kept":  # as sample.py runs
        cpu.keep_freed_memory()
    started = time.perf_counter()
    if who != "diffusers":
        model = scfg.load(file, dtype=torch.float32)
        step = contenders.our_step(model, scfg.CFG(contenders.GAMMA), x, prompt)
    else:
        pipe = StableDiffusionPipeline.from_single_file(
            str(file), config=str(config), torch_dtype=torch.float32, safety_checker=None, local_files_only=True
        )
        step = contenders.their_step(pipe.unet, SD1, x, prompt)
    marks = [started, time.perf_counter()]
    for _ in range(6):
        step()
        marks.append(time.perf_counter())
    load, cold, *others = (after - before for before, after in zip(marks, marks[1:]))
    warm = median(others)
    return {"load": load, "cold": cold, "warm": warm, "price": load + cold - warm}


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    """The price of a start and its ratio, from files of either precision."""
    found = {
        "device": "cpu",
        "accelerate": importlib.metadata.version("accelerate"),
    }  # without it diffusers starts from random weights
    with tempfile.TemporaryDirectory(dir=folder) as place:
        config = local_config(Path(place) / "config")
        for stored in STORED:
            file = Path(place) / f"{stored}.safetensors"
            save_file(families.original(SD1, getattr(torch, stored)), file)
            os.sync()
            file.read_bytes()  # on disk, and in the cache for both
            runs = {"ours, memory kept": [], "ours": [], "diffusers": []}
            for turn in range(rounds):
                for who in list(runs)[:: 1 if turn % 2 else -1]:
                    done = subprocess.run(
                        [sys.executable, __file__, who, file, config], capture_output=True, text=True, check=True
                    )
                    runs[who].append(json.loads(done.stdout.splitlines()[-1]))
                    tqdm.write(f"load {stored}, {who}: {runs[who][-1]}")
            prices = {who: [run["price"] for run in several] for who, several in runs.items()}
            found[stored] = {
                "ratios": {f"{who} / diffusers": ratio(prices[who], prices["diffusers"]) for who in list(runs)[:2]},
                "seconds": {
                    who: {k: median(run[k] for run in several) for k in several[0]} for who, several in runs.items()
                },
            }
            file.unlink()
    return found


if __name__ == "__main__":
    print(json.dumps(start(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))))
