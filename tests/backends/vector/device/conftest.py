"""What searches a device takes what [local] installs, as in CI."""

import importlib.util
import os

if importlib.util.find_spec("faiss") is None and not os.environ.get("CI"):
    collect_ignore_glob = ["test_*.py"]
