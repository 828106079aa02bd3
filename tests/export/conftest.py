import gguf_files
import pytest


@pytest.fixture
def converter_in_process():
    with gguf_files.converter_in_process():
        yield
