"""Embedders take what [local] installs; without it their tests are left out, except in CI."""

import importlib.util
import os

if importlib.util.find_spec("tokenizers") is None and not os.environ.get("CI"):
    collect_ignore = ["test_hashing.py", "test_sentence.py"]
