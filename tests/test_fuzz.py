"""A few cases of every target of tests/fuzz.py, and the cases that once failed."""

import mmap
from pathlib import Path

import fuzz
import pytest

NAMES = sorted(
    ["area", "ckpt", "decode and encode", "denoiser", "guidance as data", "load", "mask", "options", "picture's text"]
    + ["prompt", "rules", "safetensors", "sample", "save", "tokenizer folder", "tokenizer gz", "vae"]
)


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    found = fuzz.targets(tmp_path_factory.mktemp("fuzz"))
    assert sorted(found) == NAMES
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_few_cases_are_results_or_one_line(targets, name):
    fuzz.fuzz(targets[name], 0, 25)


FAILED = {
    "an unprintable dtype in a header": ("safetensors", lambda: unprintable_header()),
    "a memo of one value in a far place": ("ckpt", lambda: b"\x80\x02]r\xff\xff\xff\x0f."),
    "a memo counted in digits": ("ckpt", lambda: b"\x80\x02]p268435455\n."),
    "a line break in an option": ("options", lambda: [("--ema", ["", "\n"])]),
    "a class as sigma": ("denoiser", lambda: (fuzz.torch.zeros(1, 4, 16, 16), int)),
    "a class as guidance": ("sample", lambda: ("guidance", int)),
    "a class as sampler": ("sample", lambda: ("sampler", int)),
    "a device in bytes": ("load", lambda: ("device", b"\x80")),
    "tensors as layers": ("rules", lambda: ("PAG", [b"", fuzz.torch.ones(2)])),
    "a scale beyond 64 bits": ("rules", lambda: ("CFG", [-(2**63) - 1])),
    "bytes as recipe": ("rules", lambda: ("SCFG", [fuzz.torch.ones(()), b""])),
}


def unprintable_header() -> bytes:
    content = fuzz.TINY.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = content[8:end].replace(b'"F16"', '"\U00018cd6"'.encode(), 1)
    return len(header).to_bytes(8, "little") + header + content[end:]


def test_what_cannot_be_printed_is_escaped_in_messages(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(unprintable_header())
    with pytest.raises(fuzz.scfg.BadInput, match=r"unknown variant `\\U00018cd6`"):
        fuzz.scfg.load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("case", FAILED)
def test_what_once_failed_is_a_result_or_one_line(targets, case):
    name, make = FAILED[case]
    fuzz.attempt(targets[name], make())


def test_what_is_wrong_is_noticed(tmp_path, monkeypatch):
    """The checks of tests/fuzz.py act: errors, broken lines, hangs, memory; and a payload would leave its trace."""

    def raising(error: Exception):
        def run(case: object) -> None:
            raise error

        return fuzz.Target(fuzz.st.none(), run)

    broken = fuzz.scfg.BadInput("x")
    broken.args = ("two\nlines",)
    for error, expected in ((ValueError("x"), ValueError), (broken, AssertionError)):
        with pytest.raises(expected):
            fuzz.attempt(raising(error), None)
    monkeypatch.setattr(fuzz, "HANG", 1)
    with pytest.raises(AssertionError, match="this took over 1 s"):
        fuzz.attempt(fuzz.Target(fuzz.st.none(), lambda case: fuzz.time.sleep(5)), None)
    monkeypatch.setattr(fuzz, "HANG", 60)  # writing takes over a second where the machine has other work
    with mmap.mmap(-1, 4 * 10**8) as fresh, pytest.raises(AssertionError, match="this took (39|40). MB"):
        fuzz.attempt(fuzz.Target(fuzz.st.none(), lambda case: [fresh.write(b"x" * 10**6) for _ in range(400)]), None)
    Path(tmp_path / "x").write_bytes(fuzz.pickle.dumps(fuzz.Bomb(tmp_path / "trace")))
    fuzz.pickle.loads((tmp_path / "x").read_bytes())
    assert (tmp_path / "trace").exists()
