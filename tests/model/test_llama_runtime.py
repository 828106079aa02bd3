"""An own build of llama.cpp in place of the package's."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from gguf_files import needs_llama_cpp

from ptl.errors import InputError
from ptl.model import llama_runtime

pytestmark = needs_llama_cpp


def test_an_own_build_is_loaded_in_place_of_the_packages_unless_its_structures_differ(
    tmp_path, monkeypatch
):
    import llama_cpp_py_sync

    for path in Path(llama_cpp_py_sync.__file__).parent.glob("lib*.so*"):
        shutil.copy(path, tmp_path)
    build = str(tmp_path / "libllama.so")
    code = "from ptl.model.llama_runtime import library; library(); print(open('/proc/self/maps').read())"
    environment = {**os.environ, llama_runtime.OWN_LIBRARY: build}
    maps = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    )
    loaded = {line.split()[-1] for line in maps.stdout.splitlines() if "libllama.so" in line}
    assert {Path(path).parent for path in loaded} == {tmp_path}
    monkeypatch.setattr("llama_cpp_py_sync.__llama_cpp_commit__", "1234567")
    with pytest.raises(
        InputError,
        match=r"PTL_LLAMA_CPP: .* the declarations of 1234567; build llama.cpp's tag b\d+$",
    ):
        llama_runtime._check_build(build)
