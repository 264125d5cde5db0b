"""Runs at URLs: sent whole or not at all, resumed, replaced, and read from checked copies."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest
from run_builder import FINGERPRINT, contents, fill, write

from polyseme.errors import RunError
from polyseme.remote import RemotePath
from polyseme.store import RunFolder, RunWriter, local_run


def files_at(url: str) -> dict[str, bytes]:
    return {name: file.read(1 << 30) for name, file in RemotePath(url).files().items()}


def files_in(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def put(url: str, content: bytes) -> None:
    with fsspec.open(url, "wb") as file:
        file.write(content)


@pytest.fixture(params=["memory", "s3"])
def url(request: Any) -> str:
    return f"{request.getfixturevalue(request.param)}/runs/new"


class Killed(BaseException):
    """A process that ends."""


class Puts:
    """What is sent, in order; the sending ends before the file of a number, if one is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: BaseException | None = None) -> None:
        self.names: list[str] = []
        self.error, self.at = error, -1
        true = RemotePath.put

        def counted(remote: RemotePath, file: Path) -> None:
            if len(self.names) == self.at and self.error:
                raise self.error
            self.names.append(str(remote).partition("/new/")[2])
            true(remote, file)

        monkeypatch.setattr(RemotePath, "put", counted)


def test_a_run_at_a_url_is_the_same_as_a_local_one(url: str, tmp_path: Path) -> None:
    local = write(tmp_path / "run")
    assert str(write(url)) == url
    ours, theirs = files_at(url), files_in(local)
    about = json.loads(ours.pop("run.json")), json.loads(theirs.pop("run.json"))
    assert ours == theirs
    for content in about:
        del content["created"], content["sha256"]
    assert about[0] == about[1]
    there, here = RunFolder(url), RunFolder(local)
    there.verify()
    assert there.path.name == "new"
    assert there.neurons.equals(here.neurons)
    assert (there.site(0)["weights"] == here.site(0)["weights"]).all()


def test_a_run_is_copied_once_and_anew_when_it_has_changed(
    memory: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{memory}/run"
    write(url)
    assert [path.name for path in cache.glob("outputs/*/*")] == []
    copied: list[str] = []
    true = RemotePath.copy
    monkeypatch.setattr(
        RemotePath, "copy", lambda path, *rest: copied.append(path.name) or true(path, *rest)
    )
    first = local_run(url)
    assert copied == []  # what was sent is the copy
    write(url, contents(seed=1), overwrite=True)
    second = local_run(url)
    assert second != first
    assert files_in(second) == files_at(url)
    shutil.rmtree(cache)
    third = local_run(url)
    names = [Path(name).name for name in files_in(third) if name != "run.json"]
    assert sorted(copied) == sorted(names)
    assert files_in(third) == files_at(url)
    assert local_run(url) == third
    assert len(copied) == len(names)


def test_no_run_is_there_before_its_run_json(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    puts = Puts(monkeypatch)
    write(url)
    assert puts.names[-1] == "run.json"
    assert len(puts.names) == 8
    for at in range(len(puts.names)):
        target = f"{url.removesuffix('/new')}/{at}/new"
        puts.names, puts.error, puts.at = [], Killed(), at
        with pytest.raises(Killed):
            write(target)
        assert len(files_at(target)) == at
        with pytest.raises(RunError, match=r"nothing at .*complete run has a run\.json"):
            RunFolder(target)
        with pytest.raises(RunError, match=r"is finished but not yet sent to .*--resume"):
            write(target)
        puts.error = None
        with RunWriter(target, fingerprint=FINGERPRINT, resume=True) as writer:
            assert writer.finished
        # Nothing was sent twice.
        assert len(puts.names) == 8
        assert len(set(puts.names)) == 8
        RunFolder(target).verify()


def test_a_process_that_is_killed_while_it_sends(s3: str) -> None:
    script = (
        "import os\nfrom polyseme.remote import RemotePath\nfrom run_builder import write\n"
        "true, sent = RemotePath.put, []\n"
        "def put(remote, file):\n"
        "    if len(sent) == 3: os._exit(86)\n"
        "    sent.append(true(remote, file))\n"
        f"RemotePath.put = put\nwrite({s3 + '/killed'!r})"
    )
    folder = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, *sys.path])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, check=False)
    assert done.returncode == 86
    assert len(files_at(f"{s3}/killed")) == 3
    with RunWriter(f"{s3}/killed", fingerprint=FINGERPRINT, resume=True) as writer:
        assert writer.finished
    RunFolder(f"{s3}/killed").verify()


def test_foreign_or_changed_files_are_sent_again(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{memory}/new"
    puts = Puts(monkeypatch, Killed())
    puts.at = 5
    with pytest.raises(Killed):
        write(url)
    name = puts.names[2]
    size = len(files_at(url)[name])
    put(f"{url}/{name}", b"x" * size)
    puts.error = None
    with RunWriter(url, fingerprint=FINGERPRINT, resume=True):
        pass
    assert puts.names.count(name) == 2
    RunFolder(url).verify()


def test_a_storage_that_refuses_for_a_while(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{memory}/new"
    storage = fsspec.filesystem("memory")
    true, failures = storage.put_file, [2]

    def flaky(*arguments: Any, **named: Any) -> None:
        if failures[0]:
            failures[0] -= 1
            raise OSError("SlowDown")
        true(*arguments, **named)

    monkeypatch.setattr(storage, "put_file", flaky)
    with pytest.warns(UserWarning, match=r"could not be written \(SlowDown\)\. Trying again"):
        write(url)
    RunFolder(url).verify()
    failures[0] = 1000
    other = f"{memory}/other"
    said = (
        r"could not be written after 3 attempts \(SlowDown\).*Nothing is lost: the result is in "
        r".*; then send it with resume=True \(--resume\)\."
    )
    with pytest.warns(UserWarning, match="SlowDown"), pytest.raises(RunError, match=said):
        write(other)
    failures[0] = 0
    with RunWriter(other, fingerprint=FINGERPRINT, resume=True) as writer:
        assert writer.finished
    RunFolder(other).verify()


def test_an_unfinished_analysis_is_resumed(memory: str, tmp_path: Path) -> None:
    url, made = f"{memory}/new", contents()
    with RunWriter(url, fingerprint=FINGERPRINT) as writer:
        writer.write_site(0, made.sites[0])
        writer.save_state("pass", {}, {"n": 3})
    assert files_at(url) == {}
    with pytest.raises(RunError, match=r"holds an unfinished analysis\. Continue it with resume"):
        RunWriter(url, fingerprint=FINGERPRINT)
    with RunWriter(url, fingerprint=FINGERPRINT, resume=True) as writer:
        assert writer.resumed
        assert writer.load_state("pass") == ({}, {"n": 3})
        fill(writer, made)
        writer.finish(made.metadata)
    RunFolder(url).verify()


def test_a_run_that_is_there(url: str, cache: Path) -> None:
    write(url)
    before = files_at(url)
    with pytest.raises(RunError, match=rf"{url} already exists\. Replace it with overwrite=True"):
        RunWriter(url, fingerprint=FINGERPRINT)
    with pytest.raises(RunError, match=r"is the result of a different analysis.*model was \"m\""):
        RunWriter(url, fingerprint={**FINGERPRINT, "model": "other"}, resume=True)
    with RunWriter(url, fingerprint=FINGERPRINT, resume=True) as writer:
        assert writer.finished
    assert files_at(url) == before
    # A smaller one in its place leaves nothing of it.
    made = contents(counts=((3, 1),))
    with RunWriter(url, fingerprint=FINGERPRINT, overwrite=True) as writer:
        fill(writer, made)
        assert files_at(url) == before
        writer.finish(made.metadata)
    assert files_at(url).keys() == before.keys() - {"sites/1.safetensors"}
    RunFolder(url).verify()


def test_a_replacement_that_is_interrupted(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url, made = f"{memory}/new", contents(seed=1, counts=((3, 1),))
    for at in range(7):
        write(url, overwrite=True)
        with monkeypatch.context() as patch:
            puts = Puts(patch, Killed())
            puts.at = at
            with pytest.raises(Killed):
                write(url, made, overwrite=True)
            with pytest.raises(RunError, match="nothing at"):
                RunFolder(url)
        with RunWriter(url, fingerprint=FINGERPRINT, resume=True) as writer:
            assert writer.finished
        run = RunFolder(url)
        run.verify()
        assert len(run.sites) == 1


def test_anything_else_is_refused(memory: str) -> None:
    url = f"{memory}/new"
    put(f"{url}/thesis.tex", b"\\begin")
    with pytest.raises(RunError, match=r"already exists"):
        RunWriter(url, fingerprint=FINGERPRINT)
    with pytest.raises(RunError, match=r"is not a polyseme run, so it will not be replaced"):
        RunWriter(url, fingerprint=FINGERPRINT, overwrite=True)
    with pytest.raises(RunError, match=r"is not a polyseme run, so it cannot be resumed"):
        RunWriter(url, fingerprint=FINGERPRINT, resume=True)
    other = f"{memory}/other"
    write(other)
    put(f"{other}/thesis.tex", b"\\begin")
    with pytest.raises(RunError, match=r"holds 'thesis.tex', which is not part of a polyseme run"):
        RunWriter(other, fingerprint=FINGERPRINT, overwrite=True)
    for flat in ("memory://new", "s3://bucket", "memory://a/*"):
        with pytest.raises(ValueError, match=r"not a folder in a bucket\. Give one such as s3://"):
            RunWriter(flat, fingerprint=FINGERPRINT)
    assert set(files_at(url)) == {"thesis.tex"}


def test_a_run_that_appears_meanwhile_is_not_replaced(memory: str, tmp_path: Path) -> None:
    url, made = f"{memory}/new", contents()
    with RunWriter(url, fingerprint=FINGERPRINT) as writer:
        fill(writer, made)
        put(f"{url}/run.json", b"{}\n")
        with pytest.raises(RunError, match=r"memory://tests/new appeared while the analysis ran"):
            writer.finish(made.metadata)
    assert files_at(url) == {"run.json": b"{}\n"}
    RemotePath(f"{url}/run.json").remove()
    with RunWriter(url, fingerprint=FINGERPRINT, resume=True) as writer:
        assert writer.finished
    RunFolder(url).verify()


def test_a_bucket_that_is_not_there_is_found_before_the_work(s3: str) -> None:
    with pytest.raises(RunError, match=r"nothing at s3://none/run \(The specified bucket does not"):
        RunWriter("s3://none/run", fingerprint=FINGERPRINT)
    with pytest.raises(RunError, match=r"nothing at s3://none/run/run.json"):
        RunFolder("s3://none/run")


def test_damaged_and_hostile_runs(memory: str, cache: Path, pristine: Path) -> None:
    url = f"{memory}/run"
    for name, content in files_in(pristine).items():
        put(f"{url}/{name}", content)
    RunFolder(url).verify()
    damaged = bytearray((pristine / "features.parquet").read_bytes())
    damaged[50] ^= 1
    put(f"{url}/features.parquet", bytes(damaged))
    with pytest.raises(
        RunError, match=r"memory://tests/run/features.parquet has changed since it was written"
    ):
        local_run(url, again=True)
    metadata = json.loads((pristine / "run.json").read_bytes())
    metadata["files"]["../../evil"] = {"bytes": 1, "sha256": "0"}
    put(f"{url}/run.json", (json.dumps(metadata) + "\n").encode())
    put(f"{url}/features.parquet", (pristine / "features.parquet").read_bytes())
    assert "evil" not in {path.name for path in local_run(url).parents[2].rglob("*")}
    metadata["format_version"] = 999
    put(f"{url}/run.json", (json.dumps(metadata) + "\n").encode())
    with pytest.raises(RunError, match=r"memory://tests/run/run.json has format version 999"):
        RunFolder(url)
    put(f"{url}/run.json", b"nonsense")
    with pytest.raises(RunError, match=r"memory://tests/run/run.json: the end is missing"):
        RunFolder(url)
    assert [path.name for path in (cache / "copies").glob(".*")] == []


def test_credentials_are_in_no_file(s3: str, cache: Path) -> None:
    write(f"{s3}/run")
    for content in [*files_at(f"{s3}/run").values(), *files_in(cache).values()]:
        assert b"a-secret" not in content
        assert b"AKIATEST" not in content
