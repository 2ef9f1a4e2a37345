"""What worker machines fetch of a conversion goes with it, and never while somebody there uses it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scdl_zarr.conversion import fetched
from scdl_zarr.conversion.fetched import OWN, leave_folder, used_folder
from scdl_zarr.errors import StoreBusyError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="nobody can tell there who uses a folder")

OTHER = """
import sys
from pathlib import Path
from scdl_zarr.conversion.fetched import leave_folder, used_folder
root = Path(sys.argv[1])
with used_folder(root, lambda: False):
    (root / "column").touch()
for line in sys.stdin:
    if line.startswith("leave"):
        leave_folder(str(root))
    print(root.exists(), flush=True)
"""


class Sibling:
    """Another process of the machine, which has done a task."""

    def __init__(self, root: Path) -> None:
        pipe: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", OTHER, str(root)], **pipe)

    def say(self, word: str = "") -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        return str(self.process.stdout.readline().strip())

    def end(self) -> None:
        self.process.communicate()


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "scratch/scdl-zarr-1"
    fetched._leave_all()


def do_task(root: Path, *, over: bool = False) -> None:
    with used_folder(root, lambda: over):
        (root / "own column").touch()


def test_the_last_process_to_leave_removes_a_folder(root: Path) -> None:
    siblings = [Sibling(root) for _ in range(3)]
    try:
        assert [sibling.say() for sibling in siblings] == ["True"] * 3
        do_task(root)
        siblings[0].end()
        assert root.exists(), "it ended, and others go on"
        assert siblings[1].say("leave") == "True"
        siblings[2].process.kill()
        siblings[2].process.wait()
        assert (root / "column").exists() and (root / "own column").exists()
        leave_folder(str(root))
        assert list(root.parent.iterdir()) == []
        assert siblings[1].say() == "False"
    finally:
        for sibling in siblings:
            sibling.process.kill()
            sibling.end()


def test_a_folder_is_not_removed_under_a_task(root: Path) -> None:
    with used_folder(root, lambda: False), used_folder(root, lambda: False):
        leave_folder(str(root))
        assert root.exists()
    assert list(root.parent.iterdir()) == []


def test_a_refused_task_is_the_last_one(root: Path) -> None:
    with pytest.raises(StoreBusyError), used_folder(root, lambda: False):
        raise StoreBusyError("it is built by another plan")
    assert list(root.parent.iterdir()) == []
    with pytest.raises(OSError, match="the disk"), used_folder(root, lambda: False):
        raise OSError("the disk")
    assert root.exists()


def test_what_earlier_conversions_fetched_goes_when_the_next_one_begins(root: Path) -> None:
    at_work, goes_on, ended = (root.with_name(f"scdl-zarr-{k}") for k in (2, 3, 4))
    do_task(goes_on)
    do_task(ended, over=True)
    with used_folder(at_work, lambda: True):
        do_task(root)
        assert at_work.exists()
    assert sorted(path.name for path in root.parent.iterdir() if not path.name.startswith(".")) == [root.name, goes_on.name]


def test_what_killed_processes_left_goes_when_the_next_one_begins(root: Path) -> None:
    sibling = Sibling(root.with_name("scdl-zarr-2"))
    assert sibling.say() == "True"
    do_task(root)
    assert (root.parent / "scdl-zarr-2/column").exists()
    leave_folder(str(root))
    sibling.process.kill()
    sibling.end()
    do_task(root)
    assert {path.name.strip(".").removesuffix(".scdl-used") for path in root.parent.iterdir()} == {root.name}


def test_the_folder_of_the_parent_is_left_to_it(root: Path) -> None:
    (root / OWN).parent.mkdir(parents=True)
    (root / OWN).touch()
    do_task(root)
    leave_folder(str(root))
    assert {path.name for path in root.parent.iterdir()} == {root.name, f".{root.name}.scdl-used"}, (
        "the lock is the parent's, too"
    )
    with used_folder(root, lambda: False):
        shutil.rmtree(root)  # the parent is gone, and a task that nobody waits for goes on
        root.mkdir()
    assert list(root.parent.iterdir()) == []


def test_what_a_killed_parent_left_goes_when_the_next_one_begins(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from scdl_zarr.conversion.fetched import own_folder
with own_folder(Path(sys.argv[1])) as root:
    (root / "column").touch()
    print(root, flush=True)
    sys.stdin.read()
"""
    pipe: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    parents = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], **pipe) for _ in range(3)]
    first, second, third = (Path(parent.stdout.readline().strip()) for parent in parents if parent.stdout is not None)
    try:
        for parent in parents[:2]:
            parent.kill()
            parent.wait()
        with used_folder(second, lambda: False), fetched.own_folder(tmp_path) as own:  # a task on its machine goes on
            assert not first.exists() and second.exists() and third.exists() and own.exists()
        with fetched.own_folder(tmp_path) as own:
            assert not second.exists() and third.exists()
    finally:
        for parent in parents:
            parent.communicate()
            parent.kill()
    assert list(tmp_path.iterdir()) == []


def test_nothing_else_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("atlas", "scdl-zarr-linked", "scdl-zarr-of-another"):
        (tmp_path / f".{name}.scdl-used").touch()
    (tmp_path / "atlas").mkdir()
    (tmp_path / "scdl-zarr-linked").symlink_to(tmp_path / "atlas")
    (tmp_path / "scdl-zarr-of-another").mkdir()
    mine = fetched._is_mine
    monkeypatch.setattr(fetched, "_is_mine", lambda path: mine(path) and "another" not in path.name)
    before = sorted(tmp_path.iterdir())
    with fetched.own_folder(tmp_path):
        pass
    assert sorted(tmp_path.iterdir()) == before


def test_a_forked_child_removes_nothing(root: Path) -> None:
    with used_folder(root, lambda: False):
        child = os.fork()
        if not child:
            fetched._leave_all()
            os._exit(0)
        os.waitpid(child, 0)
        assert root.exists()
    leave_folder(str(root))
    assert list(root.parent.iterdir()) == []


def test_many_come_and_go(root: Path) -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(50):
                with used_folder(root, lambda: False):
                    (root / threading.current_thread().name).touch()
                leave_folder(str(root))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and list(root.parent.iterdir()) == []
