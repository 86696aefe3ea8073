import os
import signal
import time

import pytest

# no test may wait for a network
os.environ["HF_HUB_OFFLINE"] = "1"
# the numbers are a CPU's
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# the models are tiny: a second thread only gets in the way of the simulators
os.environ["OMP_NUM_THREADS"] = "1"
# what a shell starts in the background ignores Ctrl-C, and so would the programs that tests start
signal.signal(signal.SIGINT, signal.default_int_handler)

import torch  # noqa: E402

torch.set_num_threads(1)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            state = file.read().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.fixture
def gone():
    """gone(pids): whether all these processes end within `seconds`."""

    def wait(pids, seconds=20):
        deadline = time.time() + seconds
        while any(map(alive, pids)) and time.time() < deadline:
            time.sleep(0.05)
        return not any(map(alive, pids))

    return wait
