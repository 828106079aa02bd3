"""`ptl export`: what it writes and says."""

from pathlib import Path

import pytest
from gguf_files import converter_in_process, needs_llama_cpp

from ptl.cli.results import export
from ptl.errors import InputError

REASONER = Path(__file__).parents[2] / "examples/tiny_reasoner/checkpoint"


@needs_llama_cpp
def test_bytes_and_notes_are_printed(tmp_path, capsys):
    file = tmp_path / "model.gguf"
    with converter_in_process():
        export(REASONER, file, "gguf", "q4_k_m")
    wrote, *notes = capsys.readouterr().out.strip().splitlines()
    assert wrote == f"wrote {file}: {file.stat().st_size:,} bytes"
    assert [note.split()[:2] for note in notes] == [["note:", "llama.cpp"], ["note:", "q4_k_m"]]


def test_an_unknown_type_is_named(tmp_path):
    with pytest.raises(InputError, match="--type: 'q4' is no type of gguf; use auto, f32, f16"):
        export(REASONER, tmp_path / "model.gguf", "gguf", "q4")


def test_a_file_that_exists_is_not_overwritten(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(InputError, match=r"model\.gguf exists"):
        export(REASONER, tmp_path / "model.gguf", "gguf", "f16")
