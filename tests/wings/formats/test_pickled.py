"""Pickled checkpoints that were repacked, torn or made to do harm."""

import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import DATA
from safetensors.torch import load_file
from torch import Tensor

import scfg
from scfg.formats.pickled import read_pickled

SOME = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.float16), "empty": torch.zeros(0, 4)}


def repacked(path: Path, place: Path, kind: int = zipfile.ZIP_DEFLATED, shift: str = "") -> Path:
    """A .ckpt as a zip program writes it again; shift: a comment's worth of bytes before every record."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(place, "w", kind) as new:
        for name in old.namelist():
            info = zipfile.ZipInfo(name)
            info.compress_type = kind
            info.extra = b"" if not shift else b"\xff\xff" + len(shift).to_bytes(2, "little") + shift.encode()
            new.writestr(info, old.read(name))
    return place


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_repacked_file_is_the_same_checkpoint(tmp_path, kind, tiny):
    tensors = load_file(DATA / "tiny_sd1.safetensors")
    path = repacked(saved(tmp_path / "old.ckpt", {"state_dict": tensors}), tmp_path / "new.ckpt", kind)
    assert equal(read_pickled(path), tensors)
    model = scfg.load(path, prediction="eps")
    own, expected = model.unet.state_dict(), tiny.unet.state_dict()
    assert all(torch.equal(own[name], expected[name]) for name in expected)


def test_records_at_odd_places_are_read(tmp_path):
    for shift in ("x", "xx", "xxx"):
        path = repacked(saved(tmp_path / "old.ckpt", SOME), tmp_path / "new.ckpt", zipfile.ZIP_STORED, shift)
        assert equal(read_pickled(path), SOME)


def test_tensors_that_share_a_record_or_are_transposed_are_read(tmp_path):
    whole = torch.arange(12.0)
    content = {"first": whole[:4], "second": whole[4:], "turned": whole.reshape(3, 4).T, "none": torch.tensor(3.0)}
    assert equal(read_pickled(saved(tmp_path / "model.ckpt", content)), content)


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_record_cut_short_is_refused(tmp_path, kind):
    saved(tmp_path / "old.ckpt", SOME)
    with zipfile.ZipFile(tmp_path / "old.ckpt") as old, zipfile.ZipFile(tmp_path / "new.ckpt", "w", kind) as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, content[:-4] if name.endswith("data/0") else content)
    with pytest.raises(scfg.BadInput, match="is no whole .ckpt file"):
        scfg.load(tmp_path / "new.ckpt")


def test_the_format_before_zip_is_read_and_refused_where_it_is_cut(tmp_path):
    whole = torch.arange(12.0)
    content = SOME | {"first": whole[:4], "turned": whole.reshape(3, 4).T, "whole": torch.arange(3)}
    torch.save({"state_dict": content}, tmp_path / "model.ckpt", _use_new_zipfile_serialization=False)
    assert equal(read_pickled(tmp_path / "model.ckpt"), content)
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "model.ckpt").read_bytes()[:-4])
    with pytest.raises(scfg.BadInput, match="is no whole .ckpt file"):
        read_pickled(tmp_path / "cut.ckpt")


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors", "model.zip"])
def test_scripts_and_tar_archives_of_torch_are_not_run_or_unpacked(tmp_path, monkeypatch, name):
    """torch.load hands the one to its compiler, and unpacks the other into a folder."""

    class Script(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    for function in ("load", "jit.load"):
        monkeypatch.setattr(f"torch.{function}", lambda *_, **__: pytest.fail("this runs or unpacks what a file holds"))
    torch.jit.script(Script()).save(tmp_path / name)
    with pytest.raises(scfg.BadInput):
        scfg.load(tmp_path / name)
    with tarfile.open(tmp_path / name, "w") as archive:
        info = tarfile.TarInfo("\x80storages")
        archive.addfile(info)
    with pytest.raises(scfg.BadInput):
        scfg.load(tmp_path / name)


def test_what_unpacks_to_many_times_its_size_is_not_read(tmp_path):
    path = repacked(saved(tmp_path / "old.ckpt", {"a": torch.zeros(1_000_000)}), tmp_path / "new.ckpt")
    with pytest.raises(scfg.BadInput, match="unpacks to over 4 times its size, as no weights do"):
        scfg.load(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before zip"])
def test_a_tensor_that_repeats_its_numbers_is_refused(tmp_path, zipped):
    content = {"a": torch.ones(1).expand(1000, 1000, 1000)}
    torch.save(content, tmp_path / "model.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(scfg.BadInput, match=r"a is no plain tensor \(sparse, quantised, repeated or on meta\)"):
        scfg.load(tmp_path / "model.ckpt")


def test_archives_of_other_kinds_and_machines_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("model.safetensors", b"x" * 100)
    with pytest.raises(scfg.BadInput, match="is a zip archive, not a checkpoint: unpack it first"):
        scfg.load(tmp_path / "model.zip")
    saved(tmp_path / "little.ckpt", SOME)
    with zipfile.ZipFile(tmp_path / "little.ckpt") as old, zipfile.ZipFile(tmp_path / "big.ckpt", "w") as new:
        for name in old.namelist():
            new.writestr(name, b"big" if name.endswith("byteorder") else old.read(name))
    with pytest.raises(scfg.BadInput, match="has the order of bytes of another kind of machine"):
        scfg.load(tmp_path / "big.ckpt")


def test_weights_are_found_in_wrappers_within_wrappers(tmp_path):
    assert equal(read_pickled(saved(tmp_path / "model.ckpt", {"checkpoint": {"net": SOME}, "epoch": 3})), SOME)


@pytest.mark.parametrize("kind", ["key", "value", "set"])
def test_values_nested_a_million_deep_are_refused(tmp_path, kind):
    """A tuple of a tuple of ..., which overflows the stack where it is hashed."""
    nested = b"\x80\x02)" + b"\x85" * 1_000_000
    content = {
        "key": b"\x80\x02}" + nested[2:] + b"K\x01s.",
        "value": nested + b".",
        "set": b"\x80\x04\x8f(" + nested[2:] + b"\x90.",
    }
    with zipfile.ZipFile(tmp_path / "model.ckpt", "w") as file:
        file.writestr("model/data.pkl", content[kind])
    with pytest.raises(scfg.BadInput, match="is no whole .ckpt file"):
        scfg.load(tmp_path / "model.ckpt")


def test_values_nested_as_programs_nest_them_are_read(tmp_path):
    settings: object = {"rate": 1e-5}
    for _ in range(20):
        settings = {"inner": [settings, (1, 2)]}
    long = [[i] for i in range(500)]
    for protocol in (2, 3, 4, 5):
        torch.save(SOME | {"settings": settings, "long": long}, tmp_path / "model.ckpt", pickle_protocol=protocol)
        assert equal(read_pickled(tmp_path / "model.ckpt"), SOME)
    assert pickle.loads(pickle.dumps(settings)) == settings


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before zip"])
def test_every_cut_and_many_flips_of_a_file_are_read_or_refused(tmp_path, zipped):
    """Never another exception."""
    torch.save(SOME, tmp_path / "whole.ckpt", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "whole.ckpt").read_bytes()
    generator = torch.Generator().manual_seed(0)
    for i in range(300):
        content, place = bytearray(whole), int(torch.randint(len(whole), (1,), generator=generator))
        if i % 2:
            content[place] ^= 1 << (i // 2 % 8)
        else:
            del content[place:]
        (tmp_path / "model.ckpt").write_bytes(content)
        try:
            found = read_pickled(tmp_path / "model.ckpt")
        except scfg.BadInput as error:
            assert "\n" not in str(error)
        else:
            assert all(isinstance(tensor, Tensor) for tensor in found.values())


@pytest.mark.parametrize(
    "odd",
    [
        torch.ones(2, 2).to_sparse(),
        torch.ones(2, 2).to_sparse_csr(),
        torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        torch.ones(2, device="meta"),
    ],
    ids=["sparse", "csr", "quantised", "meta"],
)
def test_tensors_that_are_not_plain_are_named(tmp_path, odd):
    path = saved(tmp_path / "model.ckpt", {"state_dict": SOME | {"odd": odd}})
    with pytest.raises(scfg.BadInput, match=r"model.ckpt: odd is no plain tensor"):
        scfg.load(path)


def test_numbers_of_eight_bits_are_read(tmp_path):
    content = {kind: torch.arange(6.0).to(getattr(torch, kind)) for kind in ("float8_e4m3fn", "float8_e5m2")}
    found = read_pickled(saved(tmp_path / "model.ckpt", content))
    assert all(found[kind].dtype == content[kind].dtype for kind in content)
    assert all(torch.equal(found[kind].float(), torch.arange(6.0)) for kind in content)
