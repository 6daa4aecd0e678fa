"""Several processes that train together, and programs that outlive a process."""

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.cpu("JAX's processes on one host, on the CPU")

WORKER = Path(__file__).with_name("worker.py")


def start(seed=0, **job):
    environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
    return subprocess.Popen(
        [sys.executable, WORKER, json.dumps(job)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process):
    """Output of a worker."""
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]
    return json.loads(output.splitlines()[-1])


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def run_together(num, **job):
    """Processes with different hash seeds."""
    coordinator = f"localhost:{free_port()}"
    workers = [
        start(seed=at + 1, num_processes=num, process_id=at, coordinator=coordinator, **job)
        for at in range(num)
    ]
    return [finish(worker) for worker in workers]


@functools.cache
def alone(mode):
    """One process with all devices."""
    return finish(start(mode=mode, devices=4))


@pytest.mark.parametrize("mode", ["auto", "explicit"])
def test_processes_train_as_one_does(mode):
    """To the same losses, by the same program."""
    expected = alone(mode)
    assert expected["calls"] > 0
    assert expected["losses"][-1] < 0.95 * expected["losses"][0]
    results = run_together(4 if mode == "auto" else 2, mode=mode, devices=4)
    for result in results:
        np.testing.assert_allclose(result["losses"], expected["losses"], rtol=1e-5)
        assert result["losses"] == results[0]["losses"]
    assert len({result["program"] for result in results}) == 1


@pytest.mark.parametrize("mode", ["auto", "explicit"])
def test_a_second_start_finds_its_program(mode, tmp_path):
    """In JAX's persistent cache; another config finds another program."""
    job = {"mode": mode, "devices": 4, "cache": str(tmp_path), "steps": 2}
    first, second, other = (
        finish(start(seed=seed, **job, **more))
        for seed, more in enumerate([{}, {}, {"post_scale": 1.9}])
    )
    assert first["cache"] == {"hits": 0, "misses": 1}
    assert second["cache"] == {"hits": 1, "misses": 0}
    assert second["losses"] == first["losses"]
    assert other["cache"] == {"hits": 0, "misses": 1}
    assert other["losses"] != first["losses"]
