"""Folders as diffusers writes them: scfg.load with no option against the pipelines that wrote them, at small width.

Every file here is written by diffusers and transformers, but for the scheduler's, which has what published folders say.
"""

import json
from collections.abc import Mapping
from copy import copy, deepcopy
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from compare import TEXT, close, no_gradients, normal  # noqa: E402, F401
from diffusers import DDIMScheduler, DiffusionPipeline, LCMScheduler, UNet2DConditionModel  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from schedulers import BETAS, Euler  # noqa: E402
from small import FOLDER, MERGES, enliven, reference, tokenizer  # noqa: E402

import scfg  # noqa: E402

pytestmark = pytest.mark.slow

STEPS, GUIDANCE, LIMIT, NOISE = 4, 5.0, 1e-5, normal(1, 4, 8, 12, seed=3)
PUBLISHED = {**BETAS, "clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1}
PNDM = {"_class_name": "PNDMScheduler"}  # SD 1.x's and 2.x's, which leave the spacing to the scheduler
EULER = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}  # XL's
DDIM = {"_class_name": "DDIMScheduler"}
V, ZERO_SNR = {"prediction_type": "v_prediction"}, {"rescale_betas_zero_snr": True}
KINDS = {
    "safetensors": {},
    "fp16": {"variant": "fp16"},
    "bin": {"safe_serialization": False},
    "sharded": {"max_shard_size": "10MB"},
    "fp16-sharded": {"variant": "fp16", "max_shard_size": "10MB"},
}
DOWN, UP = "transformer_layers_per_block", "reverse_transformer_layers_per_block"
NO_MIDDLE = {"mid_block_type": "UNetMidBlock2D"}  # transformer
RELATIVES: dict[str, tuple[str, dict[str, Any]]] = {  # of a family, and in what their U-Nets differ from its own
    "ssd_1b": ("sdxl", NO_MIDDLE | {DOWN: [1, [2, 2], [4, 4]], UP: [[4, 4, 10], [2, 1, 1], 1]}),
    "vega": ("sdxl", NO_MIDDLE | {DOWN: [1, 1, 2]}),
    "lcm": ("sd1", {"time_cond_proj_dim": 256}),
}


class Exact(Euler):
    """Euler, whose step from the sigma 4096 of zero terminal SNR keeps all digits of the latent that it leads to.

    diffusers computes x - (x - x0) * (1 - target / sigma) in single precision, of which few are left.
    """

    def step(self, *args: Any, return_dict: bool = True, **options: Any) -> tuple[Tensor, Tensor]:
        """The next x, and x0."""
        x0, x = super().step(*args, **options).pred_original_sample, args[2]
        sigma, target = self.sigmas[self.step_index - 1 : self.step_index + 1]
        return x0 + (x - x0) * (target / sigma), x0


SAMPLERS = {"euler": Exact, "ddim": DDIMScheduler}


def changed(pipe: DiffusionPipeline, **parts: Any) -> DiffusionPipeline:
    """A pipeline with other parts."""
    other = copy(pipe)
    other.register_modules(**parts)
    return other


@cache
def pipeline(name: str) -> DiffusionPipeline:
    """A family's or a relative's."""
    if name not in RELATIVES:
        return reference(name).pipe
    family, changes = RELATIVES[name]
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(reference(family).pipe.unet.config, **changes).eval().requires_grad_(False)
    enliven(unet)
    return changed(reference(family).pipe, unet=unet)


def write(pipe: DiffusionPipeline, folder: Path, kind: str = "safetensors") -> Path:
    """A pipeline's folder with weights of a kind; halves are exact, as weights of a family are."""
    networks = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    for network in networks if "fp16" in kind else ():
        network.half()
    pipe.save_pretrained(folder, **KINDS[kind])
    for network in networks:
        network.float()
    for file in folder.glob("text_encoder*/model.safetensors") if kind == "bin" else ():  # transformers writes no .bin
        torch.save(load_file(file), file.with_name("pytorch_model.bin"))
        file.unlink()
    assert bool([*folder.glob("unet/*.index*.json")]) == ("sharded" in kind)
    return folder


@cache
def written(name: str, kind: str = "safetensors") -> Path:
    """A family's or a relative's folder."""
    return write(pipeline(name), Path(FOLDER.name) / f"{name} {kind}", kind)


def scheduled(folder: Path, place: Path, schedule: Mapping[str, Any]) -> Path:
    """A folder's parts with a scheduler_config.json of its own."""
    place.mkdir()
    for part in folder.iterdir():
        if part.name != "scheduler":
            (place / part.name).symlink_to(part)
    (place / "scheduler").mkdir()
    (place / "scheduler" / "scheduler_config.json").write_text(json.dumps(PUBLISHED | dict(schedule)))
    return place


def encoded(pipe: DiffusionPipeline, negative: str | None, text: str = TEXT) -> tuple[Tensor, ...]:
    """diffusers' states of the text and of the negative, and the same of XL's pooled text."""
    guided = {"num_images_per_prompt": 1, "do_classifier_free_guidance": True, "negative_prompt": negative}
    return pipe.encode_prompt(text, device="cpu", **guided)


def theirs(pipe: DiffusionPipeline, folder: Path, sampler: str, negative: str | None = None) -> Tensor:
    """The latent of diffusers' run with the folder's scheduler; XL's sizes are by default those of the picture."""
    pipe = changed(pipe, scheduler=SAMPLERS[sampler].from_pretrained(folder, subfolder="scheduler"))
    if pipe.text_encoder is None:
        return refined(pipe, negative)
    options = {"latents": NOISE, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "latent"}
    return pipe(TEXT, negative_prompt=negative, height=64, width=96, **options).images


def refined(pipe: DiffusionPipeline, negative: str | None) -> Tensor:
    """A refiner's run from noise, for which diffusers has no pipeline; aesthetic scores are 2.5 and 6."""
    cond, uncond, pooled, pooled_uncond = encoded(pipe, negative)
    ids = torch.tensor([[64, 96, 0, 0, 2.5], [64, 96, 0, 0, 6.0]])
    added = {"text_embeds": torch.cat([pooled_uncond, pooled]), "time_ids": ids}
    pipe.scheduler.set_timesteps(STEPS)
    x = NOISE * pipe.scheduler.init_noise_sigma
    for t in pipe.scheduler.timesteps:
        both = pipe.scheduler.scale_model_input(torch.cat([x, x]), t)
        out = pipe.unet(both, t, torch.cat([uncond, cond]), added_cond_kwargs=added).sample
        x, *_ = pipe.scheduler.step(out[:1] + GUIDANCE * (out[1:] - out[:1]), t, x, return_dict=False)
    return x


def ours(model: scfg.Diffusion, sampler: str, negative: str | None = None) -> Tensor:
    """The latent of scfg's run from the same noise."""
    prompt = model.prompt(TEXT, negative)
    *_, last = model.sample(prompt, scfg.CFG(GUIDANCE), sampler=sampler, steps=STEPS, latent=NOISE)
    return last.latent


def check(pipe: DiffusionPipeline, folder: Path, sampler: str, negative: str | None = None) -> scfg.Diffusion:
    """Text, latent and picture of both; the folder's scheduler is what both go by."""
    model = scfg.load(folder)
    prompt = model.prompt(TEXT, negative)
    rows = [states[text] for states in (prompt.context, prompt.pooled) if states for text in ("cond", "uncond")]
    for row, expected in zip(rows, encoded(pipe, negative), strict=True):
        close(row, expected, LIMIT)
    latent = theirs(pipe, folder, sampler, negative)
    close(ours(model, sampler, negative), latent, LIMIT)
    picture = pipe.vae.decode(latent / pipe.vae.config.scaling_factor).sample
    close(model.decode(latent), pipe.image_processor.postprocess(picture, output_type="pt"), LIMIT)
    return model


def label(value: Any) -> str | None:
    return "-".join(map(str, value.values())).replace("True", "zero_snr") if isinstance(value, dict) else None


@pytest.mark.parametrize("negative", [None, "blue dog"], ids=["no_negative", "negative"])
@pytest.mark.parametrize(
    "name, kind, schedule, sampler, known_as",
    [
        ("sd1", "fp16", PNDM, "ddim", "SD 1.x"),
        ("sd1", "fp16-sharded", PNDM, "euler", "SD 1.x"),
        ("sd2", "bin", PNDM, "ddim", "SD 2.x base"),
        ("sd2", "safetensors", DDIM | V, "ddim", "SD 2.x"),
        ("sdxl", "sharded", EULER, "euler", "SDXL"),
        ("sdxl_refiner", "safetensors", EULER, "euler", "SDXL refiner"),
        ("ssd_1b", "safetensors", EULER, "euler", "SDXL"),
        ("vega", "safetensors", EULER, "euler", "SDXL"),
    ],
    ids=label,
)
def test_family(
    name: str, kind: str, schedule: dict, sampler: str, known_as: str, negative: str | None, tmp_path: Path
) -> None:
    """Every family and relative with a scheduler as published folders have it, and as every kind of file."""
    folder = scheduled(written(name, kind), tmp_path / "folder", schedule)
    assert check(pipeline(name), folder, sampler, negative).config.name == known_as


def test_encoded_empty_prompt(tmp_path: Path) -> None:
    """An XL folder whose model_index.json says that an absent negative is the empty text, not zeros."""
    pipe = changed(pipeline("sdxl"))
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    check(pipe, scheduled(write(pipe, tmp_path / "written"), tmp_path / "folder", EULER), "euler")


CLASSES = {"euler": EULER, "ddim": DDIM}
SPACINGS = [{"timestep_spacing": spacing} for spacing in ("leading", "linspace", "trailing")]
SCHEDULES = [spacing | said for said in ({}, V, V | ZERO_SNR) for spacing in SPACINGS]


@pytest.mark.filterwarnings("ignore:4 such steps start")
@pytest.mark.parametrize("schedule", SCHEDULES, ids=label)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_scheduler(sampler: str, schedule: dict, tmp_path: Path) -> None:
    """What scheduler_config.json says of prediction, zero terminal SNR and spacing."""
    spacing = schedule["timestep_spacing"]
    if (sampler, spacing) == ("ddim", "linspace"):
        pytest.skip("diffusers' DDIM goes down by a fixed number of timesteps, whatever linspace's next one is")
    ends = {"set_alpha_to_one": spacing != "leading"}  # at 0, or at the lowest sigma, as scfg's runs do
    folder = scheduled(written("sd2"), tmp_path / "folder", CLASSES[sampler] | schedule | ends)
    check(pipeline("sd2"), folder, sampler)


@pytest.mark.filterwarnings("ignore:4 such steps start")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_word_of_a_scheduler_counts(sampler: str, tmp_path: Path) -> None:
    """With all else equal, no two of these configs give one latent."""
    configs = [CLASSES[sampler] | said for said in SCHEDULES]
    folders = [scheduled(written("sd2"), tmp_path / str(i), config) for i, config in enumerate(configs)]
    latents = [ours(scfg.load(folder), sampler) for folder in folders]
    for one, other in combinations(latents, 2):
        assert (one - other).abs().max() > 1e-2 * torch.maximum(one.abs().max(), other.abs().max())


TRAILING, ENDS_AT_ZERO = {"timestep_spacing": "trailing"}, {"set_alpha_to_one": True}
REST = {
    "karras": ("sd1", "euler", EULER | {"timestep_spacing": "linspace", "use_karras_sigmas": True}),
    "betas": ("sd1", "euler", EULER | {"beta_start": 0.001, "beta_end": 0.02}),
    "no_offset": ("sd1", "euler", EULER | {"steps_offset": 0}),
    "leading_to_zero": ("sd1", "ddim", DDIM | ENDS_AT_ZERO),
    "trailing_to_lowest": ("sd1", "ddim", DDIM | TRAILING),
    "xl_without_spacing": ("sdxl", "euler", PNDM),
    "euler_of_ddim": ("sd1", "euler", DDIM | TRAILING | V | ZERO_SNR),
    "ddim_of_euler": ("sd1", "ddim", EULER | TRAILING | V | ZERO_SNR | ENDS_AT_ZERO),
}


@pytest.mark.filterwarnings("ignore:4 such steps start")
@pytest.mark.parametrize("name, sampler, schedule", REST.values(), ids=REST)
def test_rest_of_the_scheduler(name: str, sampler: str, schedule: dict, tmp_path: Path) -> None:
    """Karras' sigmas, betas, leading's offset, where a run ends, and the spacing where none is said.

    Also zero terminal SNR's last alpha: 0 for DDIM, nearly 0 for Euler, whichever of them the config was written for.
    """
    check(pipeline(name), scheduled(written(name), tmp_path / "folder", schedule), sampler)


ADDED = "<cat-toy>"


def older_files(folder: Path) -> None:
    """A tokenizer's files as transformers wrote them before its version 5."""
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    for name, content in ("vocab", vocabulary), ("added_tokens", {ADDED: len(vocabulary)}):
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, MERGES), ""]))
    settings = {"tokenizer_class": "CLIPTokenizer", "do_lower_case": True, "model_max_length": 77}
    ends = dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | ends | {"bos_token": "<|startoftext|>"}))
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize("files", ["tokenizer.json", "added_tokens.json"])
def test_added_token(files: str, tmp_path: Path) -> None:
    """A token beyond CLIP's vocabulary, whose embedding is a row more; the end token is not the last number then."""
    tokens, tower = tokenizer(), deepcopy(pipeline("sd1").text_encoder)
    tokens.add_tokens([ADDED])
    tower.resize_token_embeddings(len(tokens))
    tower.get_input_embeddings().weight[-1] = normal(tower.config.hidden_size)
    pipe = changed(pipeline("sd1"), tokenizer=tokens, text_encoder=tower.eval().requires_grad_(False))
    folder = write(pipe, tmp_path / "folder")
    if files != "tokenizer.json":
        older_files(folder / "tokenizer")
    model = scfg.load(folder)
    for text in f"a red {ADDED} on a cat", f"dog{ADDED}", TEXT:
        context, (cond, _) = model.prompt(text).context, encoded(pipe, None, text)
        close(context["cond"], cond, LIMIT)


def test_lcm(tmp_path: Path) -> None:
    """An LCM, whose network is told the guidance scale, by its sampler over its own timesteps."""
    folder = scheduled(written("lcm"), tmp_path / "folder", {"_class_name": "LCMScheduler"})
    scheduler = LCMScheduler.from_config(PUBLISHED)
    pipe, model = changed(pipeline("lcm"), scheduler=scheduler), scfg.load(folder)
    assert model.config.unet.guidance_dim == 256 and model.config.spacing == "lcm"
    latents = []
    for scale in (GUIDANCE, 1.5):
        fresh = torch.Generator().manual_seed(0)
        expected = pipe(
            TEXT, num_inference_steps=STEPS, guidance_scale=scale, latents=NOISE, generator=fresh, output_type="latent"
        ).images
        sigmas, fresh = model.sigmas(STEPS), torch.Generator().manual_seed(0)
        assert [model.config.schedule.time(sigma) for sigma in sigmas[:-1]] == pytest.approx(
            scheduler.timesteps.tolist()
        )
        denoiser, x = model.denoiser(model.prompt(TEXT), scfg.CFG(scale)), NOISE * (sigmas[0] ** 2 + 1) ** 0.5
        *_, step = scfg.run(denoiser, scfg.lcm, x, sigmas, lambda g=fresh: torch.randn(NOISE.shape, generator=g))
        close(step.latent, expected, LIMIT)
        assert step.denoised.outputs.uncond is None
        latents.append(step.latent)
    assert (latents[0] - latents[1]).abs().max() > 1e-3 * latents[0].abs().max()
