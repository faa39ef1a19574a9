"""Locks of DeepSpeed's compiler: kept while somebody has them, gone when nobody does."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ispen_dist.config import ConfigError
from ispen_dist.distributed import extensions
from ispen_dist.distributed.extensions import STALE_SECONDS, check_extensions


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A lock in the folder of this installation; nothing points at another one."""
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(extensions, "_PAUSE_SECONDS", 0.01)
    check_extensions()
    lock = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "deepspeed_shm_comm" / "lock"
    # Set by the first look, as it stays for what a rank starts; a new process begins without.
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    lock.parent.mkdir(parents=True)
    return lock


def test_a_lock_of_a_killed_compiler_is_removed_however_young(own, capsys):
    own.touch()
    check_extensions()
    assert not own.exists()
    assert f"{own}: removed, left" in capsys.readouterr().err


HOLDERS = {
    "open": "import os, sys, time; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL)",
    "at work": (
        "import os, sys; open(sys.argv[1], 'x').close(); os.chdir(os.path.dirname(sys.argv[1]))"
    ),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_lock_is_kept_while_a_process_compiles_and_not_after_its_kill(own, holder):
    code = f"{HOLDERS[holder]}; print(flush=True); import time; time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(own)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    check_extensions()
    assert own.exists()
    process.kill()
    process.wait()
    os.environ.pop("TORCH_EXTENSIONS_DIR")
    check_extensions()
    assert not own.exists()


def test_a_lock_in_a_given_folder_is_named_when_it_is_old(tmp_path, monkeypatch):
    """Other machines may share that folder, and what they hold cannot be seen here."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(extensions, "_PAUSE_SECONDS", 0.01)
    check_extensions()
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    check_extensions(now=time.time() + 60.0)
    with pytest.raises(ConfigError, match=r"deepspeed_shm_comm.lock: expected no lock.*delete"):
        check_extensions(now=time.time() + STALE_SECONDS + 1.0)
    assert lock.exists()
