"""What torchrun leaves; that it is followed when it is killed is in `test_distributed`."""

import pytest

from utils.runtime import launcher


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """As torchrun makes it for two processes; this one has rank 0."""
    for rank in "01":
        (tmp_path / "torchelastic_x" / "none_y" / "attempt_0" / rank).mkdir(parents=True)
    attempt = tmp_path / "torchelastic_x" / "none_y" / "attempt_0"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(attempt / "0" / "error.json"))
    return attempt


def test_the_last_process_removes_what_all_share(folder, tmp_path, monkeypatch):
    launcher._remove_folder()
    assert [path.name for path in folder.iterdir()] == ["1"]
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "1" / "error.json"))
    launcher._remove_folder()
    assert not list(tmp_path.iterdir())
    launcher._remove_folder()


def test_logs_stay(folder):
    (folder / "0" / "stderr.log").touch()
    launcher._remove_folder()
    assert (folder / "0" / "stderr.log").exists()


def test_a_folder_of_the_user_stays(folder, tmp_path, monkeypatch):
    own = (tmp_path / "torchelastic_x").rename(tmp_path / "logs")
    file = own / "none_y" / "attempt_0" / "0" / "error.json"
    for text in (str(file), "", "error.json"):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", text)
        launcher._remove_folder()
    assert file.parent.exists()
