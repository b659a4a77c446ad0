"""Shared by all tests: the repository on sys.path, one thread, a tiny tokenizer, tiny models, a saved model folder."""
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import run as run_file
import sft
from data.folders import locks
from data.tokenizer import train_tokenizer
from model import ModelConfig, Tokenizer, Transformer, save_model

torch.set_num_threads(1)
# A file that needs more than ../requirements.txt is collected only if this package is installed (requirements-peers.txt,
# requirements-dev.txt).
PEERS = {"test_peers.py": "trl", "test_reference.py": "transformers", "test_notebooks.py": "nbclient"}
collect_ignore = [file for file, peer in PEERS.items() if not importlib.util.find_spec(peer)]


@pytest.fixture(autouse=True)
def own_device_and_precision(monkeypatch):
    """What a program chose with --device and --precision in one test does not hold in the next."""
    monkeypatch.setattr(run_file, "chosen", dict(run_file.chosen))


@pytest.fixture(autouse=True)
def a_program_ends_with_its_test():
    """So its locks on run folders end, too."""
    yield
    locks.clear()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A tokenizer of 420 ids, trained on some conversations of each role."""
    records, _ = sft.teach(0, worlds=1)
    texts = []
    for role in sft.ROLES:
        for record in records[role][:60]:
            prompt, turns = sft.split_conversation(record)
            texts.append("".join(prompt))
            texts += ["".join(pieces) for turn in turns for pieces in turn]
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(texts, 420, folder)
    return Tokenizer(folder)


def build_tiny(vocab=40, heads=4, kv_heads=2, tied=True, dtype=torch.float64, known_ids=None, seed=0):
    """A random Transformer without trivial values: biases and norm weights are random too, theta and eps are unusual,
    and the logits spread over several units."""
    config = ModelConfig(vocab, 8 * heads, 24, 2, heads, kv_heads, 256, 1e-2, 100.0, tied)
    model, rng = Transformer(config, known_ids), torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=rng)
        scale = 0.5 if weight.dim() == 1 or "embed" in name or "lm_head" in name else weight.shape[-1] ** -0.5
        weight.data = scale * noise + float("norm" in name)
    return model.to(dtype)


@pytest.fixture
def tiny():
    """A function that builds a tiny random Transformer."""
    return build_tiny


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A saved model folder. As in Qwen2.5, the embedding has more rows than the tokenizer has ids."""
    save_model(build_tiny(tokenizer.size + 4, dtype=torch.float32), tokenizer, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="session")
def guard(tmp_path_factory):
    """guard.cpp, compiled: it makes PyTorch accept fake CUDA tensors (fake_cuda.py)."""
    if not shutil.which("g++"):
        pytest.skip("g++ is missing: the device guard of fake CUDA tensors can't be compiled")
    packages = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    library = tmp_path_factory.mktemp("guard") / "guard.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-std=c++20", f"-I{packages / 'include'}", Path(__file__).with_name("guard.cpp"),
                    "-o", library, f"-L{packages / 'lib'}", f"-Wl,-rpath,{packages / 'lib'}", "-lc10", "-ltorch_cpu"], check=True)
    return library
