"""Static files: those that a server gives, complete or not there, and nothing else touched."""

from __future__ import annotations

import http.client
import re

import pytest

import polyseme as ps
from polyseme import cli
from polyseme.errors import RunError
from polyseme.explorer.export import _MARK
from polyseme.explorer.root import STATIC, WebRoot


def files_in(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("names", [["text_run"], ["grey_run"], ["rgb_run", "grey_run"]])
def test_exported_and_live_are_equal_file_by_file(names, request, tmp_path):
    runs = [request.getfixturevalue(name) for name in names]
    out = ps.export(runs if len(runs) > 1 else runs[0], tmp_path / "site", progress=False)
    written = files_in(out)
    assert written.pop(_MARK)
    with ps.explore(*runs, open_browser=False) as explorer:
        assert set(written) == set(explorer.root.paths())
        connection = http.client.HTTPConnection(explorer.url.removeprefix("http://").rstrip("/"))
        for files in explorer.root.runs:
            files.check.join()
        for path, body in written.items():
            if path.endswith("verified.json"):  # the server may still be checking
                assert body == b'{"state":"verified","files":[]}'
                continue
            connection.request("GET", f"/{path}")
            served = connection.getresponse().read()
            if path == "index.html":
                # The page says whether there is a server behind it; and what it may load, which a
                # server says in a header.
                assert b'name="polyseme-live"' in served
                assert b'name="polyseme-live"' not in body
                meta = re.search(
                    rb'<meta http-equiv="Content-Security-Policy" content="(.+)">', body
                )
                assert b"default-src 'none'; script-src 'self'" in meta[1]
                plain = re.compile(rb'<meta (name="polyseme-live"|http-equiv)[^>]+>\n')
                assert plain.sub(b"", served) == plain.sub(b"", body)
            else:
                assert body == served
        connection.close()
    assert list(tmp_path.iterdir()) == [out]


def test_every_static_file_is_there(text_run, tmp_path):
    out = ps.export(text_run.path, tmp_path / "deep" / "site", progress=False)
    for file in STATIC.rglob("*"):
        if file.is_file() and file.name != "index.html":
            assert (out / "static" / file.relative_to(STATIC)).read_bytes() == file.read_bytes()


def test_only_an_export_is_replaced(text_run, tmp_path):
    out = tmp_path / "site"
    out.mkdir()
    ps.export(text_run, out, progress=False)  # an empty folder is as good as none
    (out / "more").write_text("x")
    with pytest.raises(RunError, match=r"already exists. Replace it with overwrite=True"):
        ps.export(text_run, out, progress=False)
    assert (out / "more").exists()
    ps.export(text_run, out, progress=False, overwrite=True)
    assert not (out / "more").exists()
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("overwrite", [False, True])
def test_export_keeps_a_folder_that_is_not_an_export(text_run, tmp_path, overwrite):
    photos, file = tmp_path / "photos", tmp_path / "file"
    photos.mkdir()
    (photos / "cat.png").write_text("a cat")
    file.write_text("text")
    for out in (photos, file, text_run.path):
        match = "is not an export of polyseme, so it will not" if overwrite else "already exists"
        with pytest.raises(RunError, match=match):
            ps.export(text_run, out, progress=False, overwrite=overwrite)
    assert (photos / "cat.png").read_text() == "a cat"
    text_run.folder.verify()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_export_leaves_nothing(text_run, tmp_path, monkeypatch, error):
    out = tmp_path / "site"
    ps.export(text_run, out, progress=False)
    before = files_in(out)
    real, asked = WebRoot.file, []

    def failing(self, path):
        asked.append(path)
        if len(asked) > 5:
            raise error
        return real(self, path)

    monkeypatch.setattr(WebRoot, "file", failing)
    with pytest.raises(error):
        ps.export(text_run, tmp_path / "new", progress=False)
    with pytest.raises(error):
        ps.export(text_run, out, progress=False, overwrite=True)
    assert list(tmp_path.iterdir()) == [out]
    assert files_in(out) == before


@pytest.mark.parametrize("name", ["examples.parquet", "inputs.safetensors", "sites/0.safetensors"])
def test_an_export_says_what_of_a_damaged_run_it_lacks(
    text_run, copied, tmp_path, name, capsys, recwarn
):
    folder, out = copied(text_run), tmp_path / "site"
    (folder / name).unlink()
    assert cli.main(["export", str(folder), str(out), "--quiet"]) == 1
    said = capsys.readouterr()
    assert said.out.startswith(f"The pages are in {out}")
    assert said.err == (
        f"polyseme: The export in {out} is of a damaged run: {folder / name}: the file is "
        "missing. What cannot be read is left out, and the rest may be wrong. Copy the run again "
        "from its source, or repeat the analysis, then export again with overwrite=True "
        "(--overwrite).\n"
    )
    with pytest.warns(UserWarning, match=f"of a damaged run: .*{name}: the file is missing"):
        ps.export(folder, out, progress=False, overwrite=True)
    assert (out / "data" / "0" / "packs" / "0.safetensors").is_file()
    assert not recwarn.list


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("features.parquet", "it cannot be decoded"),
        ("sites/0.safetensors", "its SHA-256 is not the one that run.json records"),
    ],
)
def test_an_export_finds_damage_that_opening_a_run_does_not(text_run, copied, tmp_path, name, what):
    folder = copied(text_run)
    file = folder / name
    raw = bytearray(file.read_bytes())
    raw[4:60] = bytes(56) if name.endswith("parquet") else raw[4:60]
    raw[-9] ^= 1
    file.write_bytes(bytes(raw))
    with pytest.warns(UserWarning, match=f"of a damaged run: {folder / name}: {what}"):
        ps.export(folder, tmp_path / "site", progress=False)


def test_no_run_no_folder(tmp_path):
    with pytest.raises(RunError, match="does not exist"):
        ps.export(tmp_path / "nothing", tmp_path / "site", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_from_the_command_line(text_run, grey_run, tmp_path, capsys):
    out = tmp_path / "site"
    arguments = ["export", str(text_run.path), str(grey_run.path), str(out)]
    assert cli.main([*arguments, "--quiet"]) == 0
    said = capsys.readouterr()
    assert re.match(
        rf"The pages are in {out}: \d+ files, [\d.]+ MB\. Copy them to any web", said.out
    )
    assert (out / "data" / "compare.json").is_file()
    assert cli.main(arguments) == 1
    assert "--overwrite" in capsys.readouterr().err
