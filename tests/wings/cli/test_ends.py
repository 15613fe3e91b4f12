"""How runs end that are killed, interrupted or no longer read."""

import random
import signal
import subprocess
import sys
import time

import kills
import pytest

COMMAND = [sys.executable, str(kills.ROOT / "sample.py"), "--steps", "2", "--device", "cpu", "--batch", "1"]


@pytest.mark.slow
def test_killed_runs_lose_nothing_and_are_resumed():
    assert "24 pictures after it, right" in kills.check_sample(4, 12, None, random.Random(0), steps=4)


@pytest.mark.slow
def test_killed_evaluations_lose_nothing_and_go_on():
    assert "equal to" in kills.check_evaluation(2, 16, 8.0, random.Random(0))


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_do_not_matter(tmp_path, closed):
    shell = ["sh", "-c", f'"$@" {closed}', "sh"]
    done = subprocess.run([*shell, *COMMAND, "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert len(list(tmp_path.glob("*.png"))) == 2


@pytest.mark.slow
def test_a_reader_that_goes_is_one_line_and_loses_nothing(tmp_path):
    with subprocess.Popen(
        [*COMMAND, "--count", "20", "--out", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read().splitlines()
    assert process.returncode == 2 and "nobody reads its output any more" in said[-1]
    assert not any("Traceback" in line or "Exception ignored" in line for line in said)
    assert len(kills.pictures(tmp_path)) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.5, 1.0, 2.0, 3.0])
def test_an_interrupt_while_modules_load_is_no_traceback(tmp_path, after):
    process = subprocess.Popen(
        [*COMMAND, "--steps", "1000", "--out", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode in (130, -signal.SIGINT) and "Traceback" not in said  # -2: a shell says 130
