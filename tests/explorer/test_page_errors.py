"""No page is told where on this machine anything lies, whatever goes wrong."""

from __future__ import annotations

import gzip
import http.client
import json
import os
import shutil

import pytest

import polyseme as ps
from polyseme.errors import InputError, RunError
from polyseme.explorer.page_errors import page_message


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("/srv/me/run/features.parquet: it is cut.", "features.parquet: it is cut."),
        ("Cannot read /srv/me/run: Input/output error.", "Cannot read run: Input/output error."),
        (
            "it cannot be decoded ('/srv/My Name/a b/f.parquet')",
            "it cannot be decoded ('f.parquet')",
        ),
        ("opening:/srv/me/f.parquet", "opening:f.parquet"),
        ("see file:///srv/me/f.parquet", "see file:f.parquet"),
        (r"C:\Users\me\run\run.json: cut; D:/a/run.json", "run.json: cut; run.json"),
        (r"\\server\share\run.json", "run.json"),
        ("(/secret)", "(secret)"),
        ("/srv/mé/läuft", "läuft"),
        # And what is not an absolute path stays.
        ("sites/0.safetensors: it is cut.", "sites/0.safetensors: it is cut."),
        ("and/or, 3 / 4, './runs/new', ~/runs, '/'", "and/or, 3 / 4, './runs/new', ~/runs, '/'"),
        ("see https://example.org/a/b", "see https://example.org/a/b"),
        ("<b>bold</b>", "<b>bold</b>"),
    ],
)
def test_folders_are_left_out(sentence, expected):
    assert page_message(sentence) == expected
    assert page_message(InputError(sentence)) == expected


def answers(explorer, paths):
    """What is sent for each path, unpacked."""
    connection = http.client.HTTPConnection(explorer.url.removeprefix("http://").rstrip("/"))
    for path in paths:
        connection.request("GET", f"/{path}")
        answer = connection.getresponse()
        body = answer.read()
        yield answer.status, gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body
    connection.close()


def gone(file):
    file.unlink()


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def garbled(file):
    file.write_bytes(bytes(file.stat().st_size))


def a_folder(file):
    file.unlink()
    file.mkdir()


def a_pipe(file):
    file.unlink()
    os.mkfifo(file)


def a_link(file):
    file.rename(file.parent.parent / "elsewhere")
    file.symlink_to(file.parent.parent / "elsewhere")


@pytest.mark.parametrize("harm", [gone, cut, garbled, a_folder, a_pipe, a_link])
@pytest.mark.parametrize("opened", [False, True], ids=["before", "while open"])
def test_no_answer_names_the_folder(text_run, tmp_path, harm, opened):
    """Of two runs with all but one file harmed, before they are opened or since."""
    first, second = (shutil.copytree(text_run.path, tmp_path / name) for name in ("one", "two"))
    files = ["examples.parquet", "features.parquet", "random.parquet", "inputs.safetensors"]
    files += ["sites/0.safetensors", "sites/1.safetensors"]
    if not opened:
        for name in files:
            harm(first / name)
    with ps.explore(first, second, open_browser=False) as explorer:
        paths = list(explorer.root.paths())
        if opened:
            for name in [*files, "neurons.parquet", "run.json"]:
                harm(first / name)
        found = list(answers(explorer, paths))
    assert len(found) > 30
    assert any(status == 500 or b"damage" in body for status, body in found)
    for _, body in found:
        assert str(tmp_path).encode() not in body


def test_no_answer_of_a_model_names_a_folder(text_run, tmp_path):
    def probe(run, text):
        raise {"run": RunError, "input": InputError, "other": OSError}[text](
            f"{tmp_path / 'model.gguf'}: there is no such model; give another than {tmp_path}."
        )

    with ps.explore(text_run, open_browser=False, probe=probe) as explorer:
        connection = http.client.HTTPConnection(explorer.url.removeprefix("http://").rstrip("/"))
        headers = {"Origin": explorer.url.rstrip("/"), "X-Polyseme": "1"}
        for text, status in (("run", 500), ("input", 400), ("other", 500)):
            connection.request("POST", "/api/probe", json.dumps({"text": text}), headers)
            answer = connection.getresponse()
            body = answer.read().decode()
            assert answer.status == status
            assert str(tmp_path) not in body
            assert text == "other" or "model.gguf: there is no such model; give" in body
        connection.close()
