"""Kill runs that write into one folder, two at a time, and check what is left: python tests/kills.py --times 50.

Every finished picture must be whole, none written twice or over another, and `--resume` must make exactly the rest.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
SAMPLE = [sys.executable, str(ROOT / "sample.py"), "--batch", "2", "--resume", "--device", "cpu"]
EVALUATE = [sys.executable, "-m", "scfg.evaluate", "flatland", "--scale", "2", "--steps", "2", "--device", "cpu"]
OWN = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "cwd": ROOT, "text": True}


def start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(command, **OWN)


def kill_pairs(commands: list[list[str]], times: int, longest: float, rng: random.Random) -> int:
    """Start both, kill them after a random time each, so many times; returns how many were killed at work."""
    killed = 0
    for _ in tqdm(range(times // 2), desc=commands[0][1], unit="pair"):
        running = [start(command) for command in commands]
        began = time.monotonic()
        for process, after in sorted(zip(running, (rng.uniform(0, longest) for _ in running)), key=lambda one: one[1]):
            time.sleep(max(0, after - (time.monotonic() - began)))
            killed += process.poll() is None
            process.kill()
            process.wait()
    return killed


def finish(commands: list[list[str]]) -> None:
    for process in [start(command) for command in commands]:
        _, said = process.communicate()
        assert process.returncode == 0, said


def pictures(folder: Path) -> dict[str, tuple[str, np.ndarray]]:
    """By file name, the text and the pixels of every whole picture; all must be whole."""
    found = {}
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            found[path.name] = image.text["parameters"], np.asarray(image.convert("RGB")).astype(int)
    return found


def check_sample(times: int, count: int, longest: float | None, rng: random.Random, steps: int = 30) -> str:
    """Two runs of other seeds in one folder, killed and resumed, against the same two in peace."""
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        killed_in, peaceful = (
            [
                [*SAMPLE, "--steps", str(steps), "--count", str(count), "--seed", str(seed), "--out", folder]
                for seed in (0, count)
            ]
            for folder in (one, other)
        )
        began = time.monotonic()
        finish(peaceful)
        killed = kill_pairs(killed_in, times, longest or (time.monotonic() - began) * 10 / count, rng)
        before = {path.name: path.read_bytes() for path in Path(one).glob("*.png")}
        assert before, "no run got as far as a picture before it was killed: give a longer --longest"
        finish(killed_in)
        after, expected = pictures(Path(one)), pictures(Path(other))
        kept = all((Path(one) / name).read_bytes() == content for name, content in before.items())
        assert kept, "a finished picture was overwritten"
        made, wanted = ([value for name, value in some.items() if "-regions" not in name] for some in (after, expected))
        assert sorted(text for text, _ in made) == sorted(text for text, _ in wanted), "not every picture is there once"
        assert all(abs(pixels - dict(wanted)[text]).max() <= 1 for text, pixels in made), "a picture is another"
        assert not list(Path(one).glob(".*")), "unfinished files were left"
        return f"sample: {killed} kills, {len(before)} files before the last run, {len(made)} pictures after it, right"


def alike(one: Path, other: Path) -> bool:
    """Whether two files hold the same; pictures up to a step of 256, as sums round by where numbers lie in memory."""
    if one.suffix == ".json":
        return one.read_text() == other.read_text()
    read = np.load if one.suffix == ".npy" else lambda path: np.asarray(Image.open(path))
    found, expected = (read(path).astype(int) for path in (one, other))
    return found.shape == expected.shape and abs(found - expected).max() <= 1


def check_evaluation(times: int, count: int, longest: float | None, rng: random.Random) -> str:
    """Two evaluations of the same in one folder, killed and run to their end, against one in peace."""
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        both, peaceful = ([*EVALUATE, "--count", str(count), "--output", folder] for folder in (one, other))
        began = time.monotonic()
        finish([peaceful])
        killed = kill_pairs([both, both], times, longest or time.monotonic() - began, rng)
        finish([both, both])
        found, expected = (
            {path.relative_to(folder): path for path in Path(folder).rglob("*") if path.is_file()}
            for folder in (one, other)
        )
        assert found.keys() == expected.keys(), f"files are missing or left: {sorted(found.keys() ^ expected.keys())}"
        for name, path in found.items():
            assert alike(path, expected[name]), f"{name} is not that of an undisturbed evaluation"
        return f"evaluation: {killed} kills, {len(found)} files, equal to an undisturbed evaluation's"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=50, help="runs of each that are killed (default: %(default)s)")
    parser.add_argument("--count", type=int, default=64, help="pictures of a run (default: %(default)s)")
    parser.add_argument("--longest", type=float, help="seconds until a kill (default: those of ten pictures)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills (default: %(default)s)")
    args = parser.parse_args()
    for check in (check_sample, check_evaluation):
        print(check(args.times, args.count, args.longest, random.Random(args.seed)), flush=True)


if __name__ == "__main__":
    main()
