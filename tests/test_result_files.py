"""Result files: written, read back, refused in one line."""

import pytest

from utils import result_files
from utils.errors import InputError


def test_write_json(tmp_path):
    path = result_files.write_json(tmp_path / "deep", "x.json", {"k": {1: 2.5}})
    assert path.read_text() == '{\n  "k": {\n    "1": 2.5\n  }\n}\n'
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--save"):
        result_files.write_json(tmp_path / "file", "x.json", {})


def test_read_json(tmp_path):
    path = result_files.write_json(tmp_path, "x.json", {"a": [1, 2]})
    assert result_files.read_json(path) == {"a": [1, 2]}
    assert result_files.read_json(tmp_path / "none.json") == {}
    for text in ("[1]", '{"a"'):
        path.write_text(text)
        with pytest.raises(InputError, match="x.json: no result file"):
            result_files.read_json(path)
