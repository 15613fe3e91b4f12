"""The command, from text and seed to final latents, against diffusers' own pipelines."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import sample  # noqa: E402
from compare import TEXT, close, no_gradients, normal  # noqa: E402, F401
from schedulers import scheduler  # noqa: E402
from small import reference  # noqa: E402

pytestmark = pytest.mark.slow

SEED, SCALE, STEPS = 3, 5.0, 6


def command(family: str, folder: Path, size: tuple[int, int], negative: str | None, **options: object) -> Tensor:
    """The final latents of the command, as a user would give it."""
    options = {
        "checkpoint": reference(family).checkpoint,
        "tokenizer": reference(family).tokenizer,
        "guidance": "cfg",
        "scale": SCALE,
        "seed": SEED,
        "steps": STEPS,
        "size": f"{size[0]}x{size[1]}",
        "negative": negative,
        "out": folder,
        **options,
    }
    words = [
        word
        for name, value in options.items()
        if value is not None
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    return sample.run(sample.parse([TEXT, *words])).cpu()


def noise(size: tuple[int, int], count: int = 1) -> Tensor:
    """What pictures start from, each drawn from its own seed."""
    return torch.cat([normal(1, 4, size[1] // 8, size[0] // 8, seed=SEED + i) for i in range(count)])


def piped(
    family: str, scheme: diffusers.SchedulerMixin, start: Tensor, negative: str | None, **options: object
) -> Tensor:
    """The final latents of diffusers' pipeline, to which the refiner's are a picture whose noise is not yet removed."""
    pipe, count, (height, width) = reference(family).pipe, len(start), start.shape[-2:]
    pipe.scheduler = scheme
    options |= (
        {"image": start} if family == "sdxl_refiner" else {"latents": start, "height": 8 * height, "width": 8 * width}
    )
    return pipe(
        [TEXT] * count,
        negative_prompt=None if negative is None else [negative] * count,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        output_type="latent",
        **options,
    ).images


SQUARE, TALL, WIDE, LARGE = (
    (128, 128),
    (104, 152),
    (152, 104),
    (208, 304),
)  # the last three as 832x1216; 104 pixels are 13 of a latent


@pytest.mark.parametrize(
    "family, sampler, spacing, prediction, size, negative, count",
    [
        ("sd1", "ddim", "leading", None, SQUARE, None, 2),
        ("sd1", "ddim", "leading", "v", TALL, "blue dog", 1),
        ("sd1", "dpmpp_2m", "linspace", "eps", WIDE, "blue dog", 1),
        ("sd1", "dpmpp_2m", "linspace", "v", SQUARE, None, 1),
        ("sd2", "ddim", "leading", "eps", SQUARE, None, 2),
        ("sd2", "dpmpp_2m", "linspace", "eps", TALL, "blue dog", 1),
        ("sd2", "ddim", "leading", None, TALL, None, 1),
        ("sd2", "euler", "trailing", None, SQUARE, "blue dog", 1),
        ("sdxl", "ddim", "leading", None, SQUARE, None, 2),
        ("sdxl", "ddim", "leading", None, TALL, "", 1),
        ("sdxl", "euler", "trailing", None, TALL, None, 1),
        ("sdxl", "dpmpp_2m", "trailing", None, LARGE, "blue dog", 1),
    ],
)
def test_command(
    tmp_path: Path,
    family: str,
    sampler: str,
    spacing: str,
    prediction: str | None,
    size: tuple[int, int],
    negative: str | None,
    count: int,
) -> None:
    """Every family from noise to the end; the small SD 2.x is taken to predict v unless told."""
    ours = command(
        family, tmp_path, size, negative, sampler=sampler, spacing=spacing, prediction=prediction, count=count
    )
    scheme = scheduler(sampler, spacing, prediction or {"sd2": "v"}.get(family, "eps"))
    close(ours, piped(family, scheme, noise(size, count), negative))


@pytest.mark.parametrize(
    "sampler, spacing, size, negative, count",
    [
        ("ddim", "leading", SQUARE, None, 2),
        ("ddim", "leading", TALL, "blue dog", 1),
        ("euler", "trailing", TALL, None, 1),
        ("dpmpp_2m", "trailing", WIDE, "", 1),
    ],
)
def test_refiner_alone(
    tmp_path: Path, sampler: str, spacing: str, size: tuple[int, int], negative: str | None, count: int
) -> None:
    """The refiner as a checkpoint of its own; the millionth that diffusers leaves out of its part holds no step."""
    ours = command("sdxl_refiner", tmp_path, size, negative, sampler=sampler, spacing=spacing, count=count)
    scheme = scheduler(sampler, spacing)
    scheme.set_timesteps(STEPS)
    close(
        ours,
        piped("sdxl_refiner", scheme, noise(size, count) * scheme.init_noise_sigma, negative, denoising_start=1e-6),
    )


@pytest.mark.parametrize(
    "sampler, spacing, size, negative, count, share",
    [
        ("euler", "trailing", TALL, None, 1, None),
        ("euler", "trailing", SQUARE, "blue dog", 2, 0.5),
        ("ddim", "leading", TALL, "", 1, 0.75),
    ],
)
def test_hand_over(
    tmp_path: Path,
    sampler: str,
    spacing: str,
    size: tuple[int, int],
    negative: str | None,
    count: int,
    share: float | None,
) -> None:
    """The base for a share of the timesteps, 0.8 unless told, and then the refiner."""
    ours = command(
        "sdxl",
        tmp_path,
        size,
        negative,
        sampler=sampler,
        spacing=spacing,
        count=count,
        refiner=reference("sdxl_refiner").checkpoint,
        refiner_from=share,
    )
    share = share or 0.8
    halfway = piped("sdxl", scheduler(sampler, spacing), noise(size, count), negative, denoising_end=share)
    close(ours, piped("sdxl_refiner", scheduler(sampler, spacing), halfway, negative, denoising_start=share))
