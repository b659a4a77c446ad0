"""pytest exercises                 tests your own functions: red until they are solved
pytest exercises --solutions     tests the solutions: all green"""
import importlib.util
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--solutions", action="store_true", help="test exercises/solutions")


@pytest.fixture(scope="module")
def exercise(request):
    """The module that a test is about: mask.py, or solutions/mask.py, for test_mask.py."""
    folder = HERE / "solutions" if request.config.getoption("--solutions") else HERE
    name = request.module.__name__.removeprefix("test_")
    spec = importlib.util.spec_from_file_location(f"{folder.name}.{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
