"""Feed every loader and public function what nobody meant: python tests/fuzz.py --minutes 10.

Each case must end in a result or in one line that says what is wrong, within HANG seconds and ROOM bytes beyond FACTOR
times the size of what was given; nothing that a file names may be run. The same seed gives the same cases.
"""

import argparse
import contextlib
import gzip
import io
import json
import pickle
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import families
import torch
from conftest import DATA
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from safetensors import safe_open
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # where sample.py is
import sample  # noqa: E402
import scfg  # noqa: E402
from scfg import CFG, SCFG, cli  # noqa: E402
from scfg.cli import infotext  # noqa: E402
from scfg.diffusion import embedded_checkpoint  # noqa: E402
from scfg.formats.tokenizer import read_tokenizer  # noqa: E402
from scfg.prompting import encode  # noqa: E402
from scfg.regional.picture import lightness, opened  # noqa: E402

HANG, FACTOR, ROOM, LONGEST = 10, 4, 200e6, 2000
TINY = DATA / "tiny_sd1.safetensors"
Strategy = st.SearchStrategy
WHOLE = scfg.Guidance(
    scale=SCFG(3.0), direction=scfg.APG(), perturb=scfg.PAG(2.0), rescale=scfg.Rescale(0.5), when=scfg.Interval(1, 5)
)


class Target(NamedTuple):
    """Something that reads what strangers give."""

    cases: Strategy
    run: Callable[[object], object]
    size: Callable[[object], int] = lambda case: 0  # bytes of a case


class Bomb:
    """What leaves a trace if unpickling runs it."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


# ---- what is tried


numbers = st.one_of(
    st.integers(), st.floats(), st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**9, 1e308, float("nan"), float("inf")])
)
plain = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=8,
)
anything = st.one_of(
    plain,
    st.binary(max_size=20),
    st.sampled_from([object(), torch.ones(2), torch.ones(1, 4, 8, 8), torch.ones(()), int, Path("x"), {1}, 1j]),
)
words = st.text("abc (){}[]:|,~&\\\"'01.5ANDBREAK<>\n\0é漢", max_size=60)
edits = st.lists(
    st.tuples(st.sampled_from(["set", "insert", "delete", "cut", "repeat"]), st.floats(0, 1), st.binary(max_size=9)),
    min_size=1,
    max_size=6,
)


def damaged(content: bytes, changes: list[tuple[str, float, bytes]], reach: int | None = None) -> bytes:
    """Bytes with changes at shares of their length, or of their first `reach`."""
    for kind, where, own in changes:
        at = int(where * min(len(content), reach or len(content)))
        if kind == "cut":
            content = content[:at] if reach is None or at % 2 else content[: len(content) - at]
        elif kind == "repeat":
            content = content[:at] + own * 1000 + content[at:]
        else:
            removed = {"set": len(own), "insert": 0, "delete": 1 + len(own)}[kind]
            content = content[:at] + (b"" if kind == "delete" else own) + content[at + removed :]
    return content


def nested(value: object, path: list[float], new: object) -> object:
    """JSON data with one value, found by shares of the number of entries at every level, exchanged."""
    if not path or not isinstance(value, dict | list) or not value:
        return new
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = keys[min(int(path[0] * len(keys)), len(keys) - 1)]
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[key] = nested(value[key], path[1:], new)
    return copied


places = st.lists(st.floats(0, 1), min_size=1, max_size=4)


# ---- who is tried


def file_targets(folder: Path, model: scfg.Diffusion) -> dict[str, Target]:
    """The loaders of files; a case is the content of one."""
    whole, trace = TINY.read_bytes(), folder / "trace"
    header = int.from_bytes(whole[:8], "little")
    said = json.loads(whole[8 : 8 + header])
    with safe_open(embedded_checkpoint(), "pt") as file:
        metadata = file.metadata()

    def with_header(case: tuple[list[float], object]) -> bytes:
        text = json.dumps(nested(said, *case)).encode()
        return len(text).to_bytes(8, "little") + text + whole[8 + header :]

    def with_metadata(case: tuple[str, list[float], object]) -> bytes:
        name, path, new = case
        own = metadata | {name: json.dumps(nested(json.loads(metadata[name]), path, new))}
        text = json.dumps({**said, "__metadata__": own}).encode()
        return len(text).to_bytes(8, "little") + text + whole[8 + header :]

    old = {"state_dict": {"a": torch.ones(3), "b": torch.ones(2, 2)[:, :1], "n": 3}, "more": [None, "x", 1.5]}
    pickles = [io.BytesIO(), io.BytesIO()]
    for place, zipped in zip(pickles, (True, False)):
        torch.save(old, place, _use_new_zipfile_serialization=zipped)
    pickled = st.one_of(
        st.builds(damaged, st.sampled_from([place.getvalue() for place in pickles]), edits),
        st.builds(lambda value: pickle.dumps(value, protocol=2), plain),
        st.builds(lambda value: pickle.dumps({"x": value, "bomb": Bomb(trace)}, protocol=2), plain),
        st.builds(lambda value, kind: zipped_pickle(pickle.dumps(value, 2), kind), plain, st.sampled_from([0, 8, 12])),
        st.builds(lambda value: zipped_pickle(pickle.dumps([value, Bomb(trace)], 2), 0), plain),
        st.builds(lambda tail: b"\x80\x02" + tail, st.binary(max_size=200)),
    )

    def load(content: bytes) -> None:
        path = folder / "case.safetensors"
        path.write_bytes(content)
        try:
            scfg.load(path, prediction="eps")
        finally:
            assert not trace.exists(), "a payload ran"

    def load_vae(content: bytes) -> None:
        (folder / "vae.safetensors").write_bytes(content)
        scfg.load(TINY, vae=folder / "vae.safetensors")

    safetensors = st.one_of(
        st.builds(damaged, st.just(whole), edits, st.just(8 + header)),
        st.builds(with_header, st.tuples(places, plain)),
        st.builds(with_metadata, st.tuples(st.sampled_from(sorted(metadata)), places, plain)),
    )
    return {
        "safetensors": Target(safetensors, load, len),
        "ckpt": Target(pickled, load, len),
        "vae": Target(st.builds(damaged, st.just(whole), edits, st.just(8 + header)), load_vae, len),
        **tokenizer_targets(folder),
        **picture_targets(folder, model),
    }


def zipped_pickle(content: bytes, kind: int) -> bytes:
    place = io.BytesIO()
    with zipfile.ZipFile(place, "w", kind) as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/data/0", b"\0" * 12)
    return place.getvalue()


def tokenizer_targets(folder: Path) -> dict[str, Target]:
    merges = [("c", "a"), ("ca", "t</w>")]
    vocab = json.dumps(families.vocabulary(merges)).encode()
    listed = "#version\n" + "\n".join(map(" ".join, merges))

    def folder_of(case: tuple[bytes, bytes, bytes]) -> None:
        place = folder / "tokenizer"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        for name, content in zip(("vocab.json", "merges.txt", "tokenizer_config.json"), case):
            (place / name).write_bytes(content)
        read_tokenizer(place)

    def gz(content: bytes) -> None:
        (folder / "vocabulary.txt.gz").write_bytes(content)
        read_tokenizer(folder / "vocabulary.txt.gz")

    def damage(content: bytes) -> Strategy:
        return st.one_of(st.just(content), st.builds(damaged, st.just(content), edits))

    settings_of = st.builds(lambda value: json.dumps(value).encode(), plain)
    texts = st.one_of(damage(listed.encode()), st.builds(lambda text: text.encode(errors="replace"), st.text()))
    return {
        "tokenizer folder": Target(st.tuples(damage(vocab), damage(listed.encode()), settings_of), folder_of),
        "tokenizer gz": Target(
            st.one_of(
                damage(gzip.compress(listed.encode(), mtime=0)), st.builds(gzip.compress, texts, mtime=st.just(0))
            ),
            gz,
            len,
        ),
    }


def picture_targets(folder: Path, model: scfg.Diffusion) -> dict[str, Target]:
    def made(mode: str, kind: str, size: tuple[int, int], text: str) -> bytes:
        place, info = io.BytesIO(), PngImagePlugin.PngInfo()
        info.add_text("parameters", text)
        Image.new(mode, size).save(place, kind, **({"pnginfo": info} if kind == "png" else {}))
        return place.getvalue()

    pictures = st.builds(
        made,
        st.sampled_from(["L", "RGB"]),
        st.sampled_from(["png", "jpeg", "bmp", "webp", "gif", "tiff", "ppm", "eps"]),
        st.tuples(st.integers(1, 40), st.integers(1, 40)),
        st.just(""),
    ).filter(bool)

    def mask(content: bytes) -> None:
        (folder / "mask.png").write_bytes(content)
        with opened(folder / "mask.png") as image:
            lightness(image)

    def said(text: str) -> None:
        (folder / "said.png").write_bytes(made("RGB", "png", (8, 8), text))
        found = infotext.read_picture(folder / "said.png")
        command([*infotext.options(found.facts), "--", found.prompt])

    fact = st.sampled_from(["Steps", "Sampler", "Seed", "Size", "Guidance", "CFG scale", "Batch pos", "Prompts", "Eta"])
    lines = st.lists(st.tuples(fact, st.one_of(words, st.builds(json.dumps, plain))), min_size=3, max_size=8)
    texts = st.builds(
        lambda prompt, facts: prompt + "\n" + ", ".join(f"{name}: {infotext.quote(value)}" for name, value in facts),
        words,
        lines,
    ).filter(lambda text: "\0" not in text)
    return {
        "mask": Target(st.one_of(pictures, st.builds(damaged, pictures, edits)), mask, len),
        "picture's text": Target(texts, said),
    }


def command(argv: list[str]) -> None:
    """sample.py's parser: arguments, or one line and exit status 2."""
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        try:
            sample.parse(argv)
        except SystemExit as end:
            if end.code:
                assert end.code == 2 and len(said.getvalue().splitlines()) == 1, said.getvalue()


def text_targets(model: scfg.Diffusion) -> dict[str, Target]:
    """What is written by hand: prompts, areas, guidance as data, options."""
    sigmas = model.sigmas(4)
    names = sorted(set(re.findall(r'add\(\s*"(--[a-z-]+)"', Path(cli.arguments.__file__).read_text())) - {"--from"})
    options = st.lists(
        st.tuples(st.sampled_from(names), st.lists(st.one_of(words, st.builds(str, numbers)), max_size=2))
    )
    data = scfg.to_dict(WHOLE)
    return {
        "prompt": Target(st.tuples(words, words), lambda case: encode(model, *case, sigmas=sigmas)),
        "area": Target(words, scfg.parse_area),
        "guidance as data": Target(
            st.one_of(plain, st.builds(lambda path, new: nested(data, path, new), places, plain)), scfg.from_dict
        ),
        "options": Target(options, lambda case: command([word for name, own in case for word in (name, *own)])),
    }


def call_targets(model: scfg.Diffusion) -> dict[str, Target]:
    """Python callers: one argument at a time is anything."""
    text, x = "a red car on grass", torch.zeros(1, 4, 16, 16)

    def sampled(case: tuple[str, object]) -> None:
        given = {"prompt": text, "steps": 1, "size": (64, 64), case[0]: case[1]}
        run = model.sample(**given)
        if case[0] != "steps":  # a thousand are allowed
            list(run)

    def denoised(case: tuple[object, object]) -> None:
        model.denoiser(text, CFG(2.0))(*case)

    def built(case: tuple[str, list[object]]) -> None:
        name, own = case
        with contextlib.suppress(TypeError):  # Python's own, for a wrong number of arguments
            rule = getattr(scfg, name)(*own)
            list(model.sample(text, rule, steps=1, size=(64, 64)))

    argument = st.sampled_from(["prompt", "guidance", "sampler", "steps", "size", "seeds", "sigmas", "latent"])
    rules = st.sampled_from(["CFG", "SCFG", "Guidance", "Product", "APG", "FDG", "PAG", "SEG", "Interval", "ByRegion"])
    parts = st.sampled_from([CFG(2.0), SCFG(2.0), scfg.APG(), scfg.PAG(2.0), scfg.Interval(1, 5), scfg.Rescale(0.5)])
    return {
        "sample": Target(st.tuples(argument, anything), sampled),
        "denoiser": Target(st.tuples(st.one_of(anything, st.just(x)), st.one_of(anything, st.just(5.0))), denoised),
        "decode and encode": Target(anything, lambda case: refused_both(model, case)),
        "rules": Target(st.tuples(rules, st.lists(st.one_of(anything, parts), max_size=3)), built),
        "save": Target(st.tuples(anything, anything), lambda case: scfg.save(*case)),
        "load": Target(
            st.tuples(st.sampled_from(["path", "device", "dtype", "prediction", "vae", "tokenizer"]), anything),
            lambda case: scfg.load(**{case[0]: case[1]}),
        ),
    }


def refused_both(model: scfg.Diffusion, case: object) -> None:
    with contextlib.suppress(scfg.BadInput):
        model.decode(case)
    model.encode(case)


def targets(folder: Path) -> dict[str, Target]:
    model = scfg.load()
    return file_targets(folder, model) | text_targets(model) | call_targets(model)


# ---- what must hold


def resident(name: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM the most since `forget`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def forget() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def attempt(target: Target, case: object) -> None:
    """Run one case; whatever is neither a result nor one line is an error of the test."""

    def late(*_: object) -> None:
        raise AssertionError(f"this took over {HANG} s")

    forget()
    before = resident("VmRSS")
    signal.signal(signal.SIGALRM, late)
    signal.alarm(HANG)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.run(case)
    except (scfg.BadInput, FloatingPointError) as error:
        line = str(error)
        assert line and line.isprintable() and len(line) <= LONGEST, f"no clean line: {line!r}"
    finally:
        signal.alarm(0)
    taken = resident("VmHWM") - before
    assert taken <= FACTOR * target.size(case) + ROOM, f"this took {taken / 1e6:.0f} MB"


def fuzz(target: Target, number: int, examples: int) -> None:
    """So many cases of a target; the first that fails is made small and raised."""

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
    )
    @given(target.cases)
    def run(case: object) -> None:
        attempt(target, case)

    run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--minutes",
        type=float,
        default=10,
        help="in all; a target that fails is told and left out (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first round (default: %(default)s)")
    parser.add_argument("--only", nargs="*", help="names of targets (default: all)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = targets(Path(folder))
        names = args.only or list(found)
        counts, failed = dict.fromkeys(names, 0), list[str]()
        end, number = time.monotonic() + 60 * args.minutes, args.seed
        with tqdm(desc="fuzzing", unit="case") as progress:
            while time.monotonic() < end and len(failed) < len(names):
                for name in [name for name in names if name not in failed]:
                    progress.set_postfix_str(name)
                    try:
                        fuzz(found[name], number, 20)
                    except Exception:
                        failed.append(name)
                        tqdm.write(traceback.format_exc())
                    counts[name] += 20
                    progress.update(20)
                number += 1
    print(f"seeds {args.seed} to {number - 1}: {sum(counts.values())} cases", counts)
    print(f"failed: {', '.join(failed)}" if failed else "each was a result or one line")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
