"""The explorer on the command line: addresses, warnings, and models that are loaded late."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

import polyseme as ps
from polyseme import cli, explorer
from polyseme.cli.explorer import PACKAGED, _about
from polyseme.errors import RunError
from polyseme.explorer import Explorer
from polyseme.store.run_json import write_run_json
from views import runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return runs.analyse_grey(tmp_path_factory.mktemp("grey") / "run", sites="first")


@pytest.fixture
def explored(monkeypatch):
    """What `explore` is called with; the server that it makes is closed at once."""
    calls, real = [], explorer.explore

    def explore(*given, **options):
        calls.append((given, options))
        return real(*given, **{**options, "open_browser": False})

    monkeypatch.setattr(explorer, "explore", explore)
    monkeypatch.setattr(Explorer, "wait", Explorer.close)
    return calls


def renamed(run, tmp_path, **changes):
    """A run that says other things of itself."""
    folder = tmp_path / "renamed"
    folder.mkdir()
    for entry in run.path.iterdir():
        if entry.name != "run.json":
            (folder / entry.name).symlink_to(entry)
    metadata = json.loads((run.path / "run.json").read_text("utf-8"))
    for part, values in changes.items():
        metadata[part] |= values
    (folder / "run.json").write_text(json.dumps(metadata), "utf-8")
    return folder


def test_the_address_is_told(run, explored, capsys):
    assert cli.main(["explore", str(run.path), "--no-browser"]) == 0
    said = capsys.readouterr()
    assert re.fullmatch(
        r"The explorer is at http://127\.0\.0\.1:\d+/ until you press Ctrl-C\.\n", said.out
    )
    assert said.err == ""
    ((given, options),) = explored
    assert given == (str(run.path),)
    assert options == {
        "port": 0,
        "host": "127.0.0.1",
        "open_browser": False,
        "probe": None,
        "classify": None,
        "importances": None,
    }


def test_a_host_for_others_is_warned_of(run, explored, capsys):
    assert cli.main(["explore", str(run.path), "--no-browser", "--host", "0.0.0.0"]) == 0
    said = capsys.readouterr()
    assert said.err.startswith("polyseme: The explorer listens on every address of this machine: ")


def test_no_run(tmp_path, explored, capsys):
    assert cli.main(["explore", str(tmp_path / "nothing"), "--no-browser"]) == 1
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("about", "arguments", "functions"),
    [
        ({"data": {}}, [], set()),
        ({"data": {}}, ["--model", "mine.py:load"], {"classify"}),
        ({"data": {"kind": "text"}}, [], set()),
        ({"data": {"kind": "text"}}, ["--model", "somebody/model"], {"probe", "importances"}),
        ({"data": {"kind": "text"}, "model": {"name": "somebody/model"}}, [], set()),
        ({"data": {"kind": "text"}, "model": {"name": ["smollm2"]}}, [], set()),
        ({"data": {"kind": "text"}, "model": {"name": "smollm2"}}, [], {"probe", "importances"}),
        ({"data": {"kind": "text"}, "model": {"name": "minilm"}}, [], {"probe", "importances"}),
    ],
)
def test_live_functions(run, tmp_path, monkeypatch, about, arguments, functions):
    """A stranger's run names a model, which is loaded only if it comes as a package."""
    calls = []
    monkeypatch.setattr(explorer, "explore", lambda *_, **options: calls.append(options) or 1 / 0)
    folder = renamed(run, tmp_path, **about)
    with pytest.raises(ZeroDivisionError):
        cli.main(["explore", str(folder), "--no-browser", *arguments])
    assert {name for name in ("probe", "classify", "importances") if calls[0][name]} == functions


def test_saes_are_refused_where_nothing_reads_them(run, tmp_path, capsys):
    assert cli.main(["explore", str(run.path), "--sae", "mine"]) == 1
    said = capsys.readouterr().err
    assert f"--sae is given, but {run.path} is not a run on texts; leave it out." in said
    texts = renamed(run, tmp_path, data={"kind": "text"})
    assert cli.main(["explore", str(texts), "--sae", "mine"]) == 1
    assert "--sae requires --model; give the model that was analysed." in capsys.readouterr().err


def test_the_packaged_models_are_these():
    language = pytest.importorskip("polyseme.sites.language")
    assert set(PACKAGED) == set(language.PACKAGED)


def test_classifying_loads_the_model_once(run, tmp_path, explored, monkeypatch):
    source = tmp_path / "mine.py"
    source.write_text(
        "from views import runs\nmade = []\ndef load():\n"
        "    made.append(1)\n    return runs.model()\n"
    )
    assert cli.main(["explore", str(run.path), "--no-browser", "--model", f"{source}:load"]) == 0
    classify = explored[0][1]["classify"]
    for index in (0, 1):
        answer = classify(run, index=int(run.folder.inputs["index"][index]))
        assert len(answer["logits"]) == 3
    assert sys.modules["mine"].made == [1]


def test_a_process_serves_until_it_is_interrupted(run, tmp_path):
    """The command itself, and no torch in it."""
    command = [sys.executable, "-X", "importtime", "-m", "polyseme.cli", "explore"]
    told = tmp_path / "imports"
    with (
        told.open("w") as imports,
        subprocess.Popen(
            [*command, str(run.path), "--no-browser"],
            stdout=subprocess.PIPE,
            stderr=imports,
            text=True,
        ) as process,
    ):
        try:
            url = re.search(r"http://\S+", process.stdout.readline())[0]
            with urllib.request.urlopen(f"{url}data/0/packs/0.safetensors", timeout=20) as answer:
                assert answer.status == 200
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=20) == 0
        finally:
            process.kill()
    assert " pandas" in told.read_text()
    assert not re.search(r"\| +torch\b", told.read_text())


def test_a_pipe_in_the_place_of_a_run_is_not_read(tmp_path):
    """Whoever opens a pipe waits for another to write to it."""
    os.mkfifo(tmp_path / "run.json")
    assert _about(tmp_path) == (None, None)


def test_a_run_is_verified(run, tmp_path, capsys):
    folder = shutil.copytree(run.path, tmp_path / "run")
    assert cli.main(["verify", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder} is intact.\n"
    assert run.verify() is None
    raw = bytearray((folder / "features.parquet").read_bytes())
    raw[40] ^= 8
    (folder / "features.parquet").write_bytes(raw)
    (folder / "neurons.parquet").unlink()
    assert cli.main(["verify", str(folder)]) == 1
    assert capsys.readouterr().err.startswith(
        f"polyseme: {folder}: neurons.parquet and features.parquet are not as written: the SHA-256"
    )


def test_a_forged_run_is_still_checked(run, tmp_path, capsys):
    """Its digests are right, so what they are of has to be looked at."""
    folder = shutil.copytree(run.path, tmp_path / "run")
    arrays = load_file(folder / "sites" / "0.safetensors")
    arrays["histogram"][0, 0] = -1
    save_file(arrays, folder / "sites" / "0.safetensors")
    raw = (folder / "sites" / "0.safetensors").read_bytes()
    metadata = json.loads((folder / "run.json").read_text("utf-8"))
    entry = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    metadata["files"]["sites/0.safetensors"] = entry
    write_run_json(folder, metadata, resumable=False)
    assert cli.main(["verify", str(folder)]) == 1
    assert "'histogram' holds a negative count" in capsys.readouterr().err


@pytest.fixture
def hurry():
    """No command waits for a pipe that nobody writes to."""

    def stop(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("hurry")
@pytest.mark.parametrize("name", ["run.json", "neurons.parquet", "sites/0.safetensors"])
@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda p: p.symlink_to("/dev/zero")])
def test_what_is_no_file_is_not_waited_for(run, tmp_path, capsys, name, make):
    folder = shutil.copytree(run.path, tmp_path / "run")
    (folder / name).unlink()
    make(folder / name)
    commands = [["verify"], ["explore", "--no-browser", "--port", "0"], ["export"]]
    for command in commands if name != "sites/0.safetensors" else commands[:1]:
        out = [str(tmp_path / "site")] if command == ["export"] else []
        assert cli.main([*command, str(folder), *out]) == 1
        assert name in capsys.readouterr().err
    with pytest.raises(RunError, match=name):
        ps.open_run(folder)
