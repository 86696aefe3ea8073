import os
import signal
import time

import pytest

# no test may wait for a network
os.environ["HF_HUB_OFFLINE"] = "1"
# the numbers are a CPU's
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# the models are tiny: a second thread only gets in the way of the simulators
os.environ.setdefault("OMP_NUM_THREADS", "1")
# a processor that torch is told to take for a smaller one must be that for oneDNN, too
if os.environ.get("ATEN_CPU_CAPABILITY", "avx512") != "avx512":
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")
# programs that tests start print the same in every locale
os.environ["PYTHONUTF8"] = "1"
# what a shell starts in the background ignores Ctrl-C, and so would these programs
signal.signal(signal.SIGINT, signal.default_int_handler)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            state = file.read().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.fixture
def gone():
    """gone(pids): whether all these processes end. One that stays is waited for, then it fails."""

    def wait(pids, seconds=120):
        deadline = time.time() + seconds
        while any(map(alive, pids)) and time.time() < deadline:
            time.sleep(0.05)
        return not any(map(alive, pids))

    return wait
