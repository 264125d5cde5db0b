"""Writing a run: what lands on disk, what stands in the way, and what survives an accident."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_builder import FINGERPRINT, contents, fill, write

from polyseme.errors import InputError, RunError
from polyseme.store import RunFolder, RunWriter, add_metadata, altered_files
from polyseme.store import writer as writer_module
from polyseme.store.format import TABLES
from polyseme.store.writer import RUN


def start(out: Path, fingerprint=FINGERPRINT, **flags: bool) -> RunWriter:
    return RunWriter(out, fingerprint=fingerprint, **flags)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def interrupted(out: Path, fingerprint=FINGERPRINT, **flags: bool) -> None:
    """An analysis that was stopped after a checkpoint."""
    with suppress(KeyboardInterrupt), start(out, fingerprint, **flags) as writer:
        writer.save_state("pass-1", {"x": np.arange(3)}, {"batch": 7})
        writer.write_site(0, contents().sites[0])
        raise KeyboardInterrupt


# ------------------------------------------------------------------------------ what lands


def test_a_run_has_the_files_of_the_format_and_nothing_else(tmp_path):
    out = write(tmp_path / "deep" / "er" / "run")
    assert sorted(snapshot(out)) == [
        "examples.parquet",
        "features.parquet",
        "inputs.safetensors",
        "neurons.parquet",
        "random.parquet",
        "run.json",
        "sites/0.safetensors",
        "sites/1.safetensors",
    ]
    assert os.listdir(out.parent) == ["run"]
    RunFolder(out).verify()


def test_a_reader_sees_nothing_before_the_end(tmp_path):
    out = tmp_path / "run"
    made = contents()
    with start(out) as writer:
        fill(writer, made)
        assert not out.exists()
        with pytest.raises(RunError, match=r"is not finished.*resume=True \(--resume\)"):
            RunFolder(out)
        with pytest.raises(RunError, match="is an unfinished analysis"):
            RunFolder(tmp_path / "run.partial")
        assert writer.finish(made.metadata) == out
        assert writer.finished
    RunFolder(out)


def test_equal_inputs_make_equal_bytes_but_for_the_date(tmp_path, monkeypatch):
    first = snapshot(write(tmp_path / "a"))
    monkeypatch.setattr(writer_module, "_now", lambda: "2031-01-01T00:00:00Z")
    second = snapshot(write(tmp_path / "b"))
    old, new = json.loads(first.pop("run.json")), json.loads(second.pop("run.json"))
    assert first == second
    assert new.pop("created") == "2031-01-01T00:00:00Z"
    assert old.pop("created").endswith("Z")
    assert old.pop("sha256") != new.pop("sha256")
    assert list(old.items()) == list(new.items())


def test_column_and_array_order_and_layout_do_not_change_the_bytes(tmp_path):
    made, turned = contents(), contents()
    turned.tables = {name: frame[frame.columns[::-1]] for name, frame in made.tables.items()}
    turned.sites = [
        {name: np.asfortranarray(array) for name, array in reversed(site.items())}
        for site in made.sites
    ]
    turned.inputs["index"] = turned.inputs["index"].astype(">i8")
    first, second = snapshot(write(tmp_path / "a", made)), snapshot(write(tmp_path / "b", turned))
    del first["run.json"], second["run.json"]
    assert first == second


def test_values_are_cast_to_the_format(tmp_path):
    made = contents()
    frame = made.tables["neurons"]
    made.tables["neurons"] = frame.assign(
        neuron=frame["neuron"].astype("int64"),
        density=frame["density"].astype("float32"),
        site=frame["site"].astype("category"),
    )
    run = RunFolder(write(tmp_path / "run", made))
    assert run.neurons["neuron"].dtype == np.int32
    assert run.neurons["density"].dtype == np.float64
    assert run.site(0)["weights"].dtype == np.float32


def test_further_columns_and_arrays_are_kept(tmp_path):
    made = contents()
    rows = len(made.tables["neurons"])
    made.tables["neurons"]["calibrated"] = np.linspace(0, 1, rows)
    made.tables["neurons"]["label"] = [None, *"é" * (rows - 1)]
    made.sites[1]["mine"] = np.array([True, False])
    made.inputs["weight"] = np.float64(3.5)
    made.metadata["sites"][0]["layer"] = 4
    run = RunFolder(write(tmp_path / "run", made))
    assert run.neurons["calibrated"].tolist() == made.tables["neurons"]["calibrated"].tolist()
    assert run.neurons["label"].isna().tolist() == [True] + [False] * (rows - 1)
    assert run.site(1)["mine"].tolist() == [True, False]
    assert run.inputs["weight"].shape == ()
    assert run.sites[0].extra == {"threshold": 0.2, "layer": 4}


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    counts=st.lists(
        st.lists(st.integers(0, 6), min_size=1, max_size=4).map(tuple), min_size=1, max_size=3
    ).map(tuple),
    d_in=st.integers(2, 5),
)
def test_a_run_round_trips(tmp_path_factory, seed, counts, d_in):
    made = contents(seed=seed, counts=counts, d_in=d_in)
    run = RunFolder(write(tmp_path_factory.mktemp("runs") / "run", made))
    run.verify()
    for table, frame in made.tables.items():
        pd.testing.assert_frame_equal(getattr(run, table), frame, check_dtype=False)
        dtypes = {name: "str" if name == "site" else dtype for name, dtype in TABLES[table].items()}
        assert list(getattr(run, table).columns) == list(dtypes)
    for number, site in enumerate(made.sites):
        read = run.site(number)
        assert set(read) == set(site)
        for name, array in site.items():
            np.testing.assert_array_equal(read[name], array.astype(read[name].dtype))
    for name, array in made.inputs.items():
        np.testing.assert_array_equal(run.inputs[name], array)


# ---------------------------------------------------------------------- what it will not take


def test_a_missing_column_is_named(tmp_path):
    made = contents()
    del made.tables["examples"]["vector"]
    with start(tmp_path / "run") as writer, pytest.raises(InputError, match="column 'vector'"):
        fill(writer, made)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("neuron", [0.0] * 5, r"'neuron' of neurons.parquet is float64, not int32"),
        ("neuron", [2**40] * 5, "values that int32 cannot hold"),
        ("density", ["a"] * 5, "not float64"),
        ("site", [1, 2, 3, 4, 5], "must hold text only"),
        ("extra", [{}] * 5, "must hold text only"),
        ("extra", [1j] * 5, "must hold text only"),
    ],
)
def test_a_column_that_cannot_be_cast_is_refused(tmp_path, column, values, message):
    made = contents()
    made.tables["neurons"][column] = values
    with start(tmp_path / "run") as writer, pytest.raises(InputError, match=message):
        writer.write_tables(**made.tables)


def test_two_columns_of_one_name_are_refused(tmp_path):
    made = contents()
    made.tables["random"] = pd.concat([made.tables["random"]] * 2, axis=1)
    with start(tmp_path / "run") as writer, pytest.raises(InputError, match="distinct strings"):
        writer.write_tables(**made.tables)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("weights", np.zeros((3, 4), dtype=complex), "complex128; only booleans"),
        ("weights", np.array([["a"]]), "only booleans, integers and floats"),
        ("weights", np.array([[1e300]]), "values that float32 cannot hold"),
        ("histogram", np.zeros((3, 2)), "'histogram' of sites/0.safetensors is float64, not int64"),
        ("histogram", np.full((3, 2), 2**63, dtype=np.uint64), "values that int64 cannot hold"),
    ],
)
def test_an_array_that_cannot_be_cast_is_refused(tmp_path, name, array, message):
    site = contents().sites[0] | {name: array}
    with start(tmp_path / "run") as writer, pytest.raises(InputError, match=message):
        writer.write_site(0, site)


def test_a_missing_array_and_a_bad_site_number_are_refused(tmp_path):
    site = contents().sites[0]
    with start(tmp_path / "run") as writer:
        with pytest.raises(InputError, match="numbered from 0, not -1"):
            writer.write_site(-1, site)
        del site["tree"]
        with pytest.raises(InputError, match="needs the array 'tree'"):
            writer.write_site(0, site)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.sites.pop(), "sites/1.safetensors: it was not written"),
        (lambda m: m.metadata.pop("model"), "'model' is missing"),
        (lambda m: m.metadata["sites"][0].update(n_neurons=4), "neurons.parquet: it has 5 rows"),
        (lambda m: m.sites[0].update(tree=m.sites[0]["tree"][:-1]), "'tree' has 3 rows"),
        (lambda m: m.tables["examples"].update({"vector": [99] * 12}), "'vector' must be a row"),
    ],
)
def test_finish_refuses_what_a_reader_would(tmp_path, change, message):
    made = contents()
    change(made)
    out = tmp_path / "run"
    with start(out) as writer:
        fill(writer, made)
        with pytest.raises(RunError, match=f"What was written is not a valid run: .*{message}"):
            writer.finish(made.metadata)
    assert not out.exists()
    # Nothing is lost: once fixed, the same analysis can be finished.
    with start(out, resume=True) as writer:
        fill(writer, contents())
        writer.finish(contents().metadata)
    RunFolder(out).verify()


def test_metadata_must_be_json_and_leave_the_writers_keys_alone(tmp_path):
    made = contents()
    with start(tmp_path / "run") as writer:
        fill(writer, made)
        with pytest.raises(InputError, match="metadata must be plain JSON"):
            writer.finish(made.metadata | {"mean": float("nan")})
        with pytest.raises(InputError, match="metadata must be plain JSON"):
            writer.finish(made.metadata | {"mean": np.float32(1)})
        with pytest.raises(InputError, match="cannot set 'created'"):
            writer.finish(made.metadata | {"created": "now"})
        deep: dict = {}
        for _ in range(100):
            deep = {"a": deep}
        with pytest.raises(InputError, match="flatten it"):
            writer.finish(made.metadata | {"deep": deep})
        deep["self"] = deep
        with pytest.raises(InputError, match="metadata"):
            writer.finish(made.metadata | {"deep": deep})


def test_a_closed_or_finished_writer_says_so(tmp_path):
    with start(tmp_path / "run") as writer:
        pass
    with pytest.raises(RunError, match="was closed: open another"):
        writer.write_site(0, {})
    write(tmp_path / "done")
    with (
        start(tmp_path / "done", resume=True) as writer,
        pytest.raises(RunError, match="is finished"),
    ):
        writer.write_inputs({})


@pytest.mark.parametrize("out", ["", ".", "/", "runs/.."])
def test_an_output_needs_a_name(out):
    with pytest.raises(InputError, match="has no name"):
        start(out)


@pytest.mark.parametrize("out", ["x" * 250, f"{'é' * 128}/run"])
def test_a_name_that_is_too_long_is_explained(tmp_path, out):
    for flags in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(InputError, match=r"name [xé]+… is too long: .* allow 255"):
            start(tmp_path / out, **flags)
    assert not list(tmp_path.iterdir())
    write(tmp_path / ("x" * 247))


def test_a_place_that_nothing_can_be_moved_to(tmp_path, monkeypatch):
    monkeypatch.setattr("os.path.ismount", lambda path: True)
    with pytest.raises(InputError, match=r"is a mount point.*such as .*run/new"):
        start(tmp_path / "run")


def test_an_empty_folder_is_as_good_as_none(tmp_path):
    for number, flags in enumerate([{}, {"overwrite": True}, {"resume": True}]):
        out = tmp_path / str(number)
        out.mkdir()
        RunFolder(write(out, **flags)).verify()
    assert sorted(os.listdir(tmp_path)) == ["0", "1", "2"]


def test_files_are_for_whom_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        out = write(tmp_path / "run")
    finally:
        os.umask(before)
    modes = {file.stat().st_mode & 0o777 for file in out.rglob("*") if file.is_file()}
    assert modes == {0o640}


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    rename = os.rename
    monkeypatch.setattr(os, "fsync", lambda file: done.append(os.readlink(f"/proc/self/fd/{file}")))
    monkeypatch.setattr(os, "rename", lambda *paths: (done.append("rename"), rename(*paths)))
    out = write(tmp_path / "run")
    at = done.index("rename")
    result = tmp_path / "run.partial" / "result"
    wanted = {str(result / file.relative_to(out)) for file in out.rglob("*")} | {str(result)}
    assert wanted <= set(done[:at])
    assert str(tmp_path) in done[at:]


# ----------------------------------------------------------------------------- what is there


def test_an_existing_run_is_not_touched_without_a_flag(tmp_path):
    out = write(tmp_path / "run")
    before = snapshot(tmp_path)
    with pytest.raises(
        RunError,
        match=r"run already exists.*overwrite=True \(--overwrite\).*resume=True \(--resume\)",
    ):
        start(out)
    assert snapshot(tmp_path) == before


def test_an_unfinished_analysis_is_not_touched_without_a_flag(tmp_path):
    interrupted(tmp_path / "run")
    before = snapshot(tmp_path)
    with pytest.raises(
        RunError,
        match=r"run.partial holds an unfinished analysis.*resume=True \(--resume\)"
        r".*overwrite=True \(--overwrite\)",
    ):
        start(tmp_path / "run")
    assert snapshot(tmp_path) == before


def test_both_flags_exclude_each_other(tmp_path):
    with pytest.raises(InputError, match="mutually exclusive"):
        start(tmp_path / "run", overwrite=True, resume=True)
    assert not list(tmp_path.iterdir())


def test_a_parent_that_is_a_file_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="Cannot write"):
        start(tmp_path / "file" / "run")


def test_an_abandoned_start_leaves_no_unfinished_analysis(tmp_path):
    (tmp_path / "run.partial").mkdir()
    for name in ("lock", ".DS_Store"):
        (tmp_path / "run.partial" / name).touch()
    (tmp_path / "run.partial" / "partial.json.new").write_text("{")
    write(tmp_path / "run")
    assert os.listdir(tmp_path) == ["run"]


# -------------------------------------------------------------------------------- overwrite


def test_overwrite_keeps_the_old_run_until_the_new_one_is_complete(tmp_path):
    out = write(tmp_path / "run")
    before = snapshot(out)
    made = contents(seed=1)
    with start(out, overwrite=True) as writer:
        fill(writer, made)
        assert snapshot(out) == before
        writer.finish(made.metadata)
    assert snapshot(out)["inputs.safetensors"] != before["inputs.safetensors"]
    assert os.listdir(tmp_path) == ["run"]
    RunFolder(out).verify()


def test_overwrite_with_nothing_there_just_writes(tmp_path):
    RunFolder(write(tmp_path / "run", overwrite=True))


def test_overwrite_discards_an_unfinished_analysis(tmp_path):
    interrupted(tmp_path / "run", {"other": 1})
    with start(tmp_path / "run", overwrite=True) as writer:
        assert not writer.resumed
        assert writer.load_state("pass-1") is None
        assert not list((tmp_path / "run.partial" / "result").iterdir())


def test_overwrite_refuses_what_is_not_a_run(tmp_path):
    theirs = tmp_path / "thesis"
    theirs.mkdir()
    (theirs / "chapter.txt").write_text("years of work")
    for content in (None, "[1]\n", '{"format": "other"}\n', '{"format": "polyseme-run"'):
        if content is not None:
            (theirs / "run.json").write_text(content)
        with pytest.raises(
            RunError, match="thesis is not a polyseme run, so it will not be replaced"
        ):
            start(theirs, overwrite=True)
    with pytest.raises(RunError, match="is not a polyseme run"):
        start(theirs / "chapter.txt", overwrite=True)
    assert (theirs / "chapter.txt").read_text() == "years of work"
    assert os.listdir(tmp_path) == ["thesis"]


@pytest.mark.parametrize("name", ["notes.txt", "sites/notes.txt"])
def test_overwrite_refuses_a_run_that_holds_a_users_file(tmp_path, name):
    out = write(tmp_path / "run")
    (out / name).write_text("mine")
    with pytest.raises(RunError, match=rf"holds '{name}', which is not part of a polyseme run"):
        start(out, overwrite=True)
    assert (out / name).read_text() == "mine"


def test_overwrite_refuses_a_users_file_that_came_while_it_ran(tmp_path):
    out = write(tmp_path / "run")
    made = contents(seed=1)
    with start(out, overwrite=True) as writer:
        fill(writer, made)
        (out / "notes.txt").write_text("mine")
        with pytest.raises(RunError, match=r"holds 'notes.txt'"):
            writer.finish(made.metadata)
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    with start(out, resume=True) as writer:
        fill(writer, made)
        writer.finish(made.metadata)
    np.testing.assert_array_equal(RunFolder(out).inputs["index"], made.inputs["index"])


def test_a_partial_that_is_not_ours_is_never_discarded(tmp_path):
    partial = tmp_path / "run.partial"
    partial.mkdir()
    (partial / "notes.txt").write_text("mine")
    for flags in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(RunError, match=r"run.partial is in the way.*not from this ver"):
            start(tmp_path / "run", **flags)
    assert snapshot(partial) == {"notes.txt": b"mine"}
    shutil.rmtree(partial)
    partial.write_text("mine")
    with pytest.raises(RunError, match="is in the way"):
        start(tmp_path / "run", overwrite=True)
    assert partial.read_text() == "mine"
    partial.unlink()
    interrupted(tmp_path / "run")
    (partial / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="is in the way"):
        start(tmp_path / "run", overwrite=True)


def test_a_link_to_a_run_stays_a_link(tmp_path):
    write(tmp_path / "2031")
    (tmp_path / "latest").symlink_to("2031", target_is_directory=True)
    made = contents(seed=1)
    write(tmp_path / "latest", made, overwrite=True)
    assert (tmp_path / "latest").is_symlink()
    index = RunFolder(tmp_path / "2031").inputs["index"]
    np.testing.assert_array_equal(index, made.inputs["index"])


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_rename_puts_the_old_run_back(tmp_path, monkeypatch, error):
    out = write(tmp_path / "run")
    before = snapshot(out)
    rename = os.rename

    def failing(source, target):
        if Path(source).name == "result" and Path(target) == out:
            raise error
        rename(source, target)

    made = contents(seed=1)
    with start(out, overwrite=True) as writer:
        fill(writer, made)
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", failing)
            raised = RunError if isinstance(error, OSError) else KeyboardInterrupt
            with pytest.raises(raised, match="No space left" if raised is RunError else None):
                writer.finish(made.metadata)
    assert snapshot(out) == before
    with start(out, resume=True) as writer:
        assert writer.resumed
        writer.finish(made.metadata)  # all of it is still there
    np.testing.assert_array_equal(RunFolder(out).inputs["index"], made.inputs["index"])


def test_a_run_killed_between_its_renames_is_put_back(tmp_path):
    out = write(tmp_path / "run")
    before = snapshot(out)
    interrupted(out, overwrite=True)
    os.rename(out, tmp_path / "run.partial" / "old")
    with pytest.raises(RunError):
        start(out)
    assert snapshot(out) == before
    os.rename(out, tmp_path / "run.partial" / "old")
    with start(out, resume=True) as writer:
        assert writer.resumed
        assert snapshot(out) == before


def test_a_run_that_appears_meanwhile_is_not_replaced(tmp_path):
    out = tmp_path / "run"
    made = contents()
    with start(out) as writer:
        fill(writer, made)
        out.mkdir()
        (out / "notes.txt").touch()
        with pytest.raises(RunError, match="appeared while the analysis ran"):
            writer.finish(made.metadata)
    shutil.rmtree(out)
    with start(out, resume=True) as writer:
        writer.finish(made.metadata)
    RunFolder(out).verify()


# ----------------------------------------------------------------------------------- resume


def test_resume_goes_on_from_the_checkpoint(tmp_path):
    out = tmp_path / "run"
    interrupted(out)
    made = contents()
    with start(out, resume=True) as writer:
        assert writer.resumed
        assert not writer.finished
        arrays, metadata = writer.load_state("pass-1")
        assert arrays["x"].tolist() == [0, 1, 2]
        assert metadata == {"batch": 7}
        writer.write_site(1, made.sites[1])
        writer.write_inputs(made.inputs)
        writer.write_tables(**made.tables)
        writer.finish(made.metadata)
    first, second = snapshot(out), snapshot(write(tmp_path / "at once"))
    del first["run.json"], second["run.json"]
    assert first == second


def test_resume_with_nothing_there_starts(tmp_path):
    with start(tmp_path / "run", resume=True) as writer:
        assert not writer.resumed
        assert not writer.finished


def test_resume_of_a_finished_run_has_nothing_to_do(tmp_path):
    out = write(tmp_path / "run")
    before = snapshot(tmp_path)
    with start(out, {**FINGERPRINT, "model": "m"}, resume=True) as writer:
        assert writer.finished
        assert not writer.resumed
    assert snapshot(tmp_path) == before


def test_resume_removes_the_leftovers_of_the_finished_run_only(tmp_path):
    out = write(tmp_path / "run")
    other = FINGERPRINT | {"model": "other"}
    interrupted(out, other, overwrite=True)
    assert start(out, resume=True).finished
    with start(out, other, resume=True) as writer:
        assert writer.resumed
    interrupted(out, overwrite=True)
    shutil.rmtree(tmp_path / "run.partial" / "result")  # killed right after it was renamed
    assert start(out, resume=True).finished
    assert os.listdir(tmp_path) == ["run"]


def test_leftovers_of_an_interrupted_write_are_not_part_of_the_run(tmp_path):
    out = tmp_path / "run"
    with start(out) as writer:
        made = contents()
        fill(writer, made)
        for name in ("examples.parquet.new", "sites/2.safetensors"):
            (tmp_path / "run.partial" / "result" / name).touch()
        writer.finish(made.metadata)
    assert sorted(snapshot(out)) == sorted(snapshot(write(tmp_path / "other")))


def test_resume_names_the_settings_that_differ(tmp_path):
    interrupted(tmp_path / "run")
    other = {"settings": {"threshold": 0.05, "select": "top-k"}, "model": "m", "seed": 3}
    with pytest.raises(RunError) as caught:
        start(tmp_path / "run", other, resume=True)
    message = str(caught.value)
    assert (
        "holds a different unfinished analysis: settings.threshold was 0.2 and is now 0.05; "
        'data was "d" and is now not set; seed was not set and is now 3. Resume' in message
    )
    assert "select" not in message


def test_resume_of_another_finished_run_is_refused(tmp_path):
    out = write(tmp_path / "run")
    with pytest.raises(RunError, match=r'a different analysis.*model was "m" and is now "n"'):
        start(out, FINGERPRINT | {"model": "n"}, resume=True)
    assert os.listdir(tmp_path) == ["run"]
    many = {f"s{i}": i for i in range(9)}
    with pytest.raises(RunError, match="; and 10 more"):
        start(out, many | FINGERPRINT["settings"], resume=True)


def test_resume_of_something_else_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    with pytest.raises(RunError, match="is not a polyseme run, so it cannot be resumed"):
        start(tmp_path / "run", resume=True)


def test_resume_of_a_damaged_finished_run_is_refused(tmp_path):
    out = write(tmp_path / "run")
    (out / "random.parquet").unlink()
    with pytest.raises(RunError, match=r"random.parquet: the file is missing"):
        start(out, resume=True)


def test_resume_with_a_run_in_the_way_is_refused(tmp_path):
    out = tmp_path / "run"
    interrupted(out)
    write(tmp_path / "other", contents(seed=2))
    content = json.loads((tmp_path / "other" / "run.json").read_text())
    content["fingerprint"] = {}
    (tmp_path / "other" / "run.json").write_text(json.dumps(content) + "\n")
    os.rename(tmp_path / "other", out)
    with pytest.raises(RunError, match="already exists, and so does an unfinished analysis"):
        start(out, resume=True)


def test_an_interrupted_overwrite_resumes_as_one(tmp_path):
    out = write(tmp_path / "run")
    other = FINGERPRINT | {"model": "n"}
    interrupted(out, other, overwrite=True)
    RunFolder(out).verify()
    made = contents(seed=1)
    with start(out, other, resume=True) as writer:
        assert writer.resumed
        fill(writer, made)
        writer.finish(made.metadata)
    assert RunFolder(out).metadata["fingerprint"]["model"] == "n"


def test_a_fingerprint_must_be_json_and_is_compared_as_json(tmp_path):
    with pytest.raises(InputError, match="fingerprint must be plain JSON"):
        start(tmp_path / "run", {"seed": np.int64(3)})
    interrupted(tmp_path / "run", {"shape": (1, 2)})
    with start(tmp_path / "run", {"shape": [1, 2]}, resume=True) as writer:
        assert writer.resumed


def test_measured_outputs_may_differ_in_their_last_digits(tmp_path):
    def model(*outputs):
        return {"model": {"outputs": [100.0, *outputs]}}

    interrupted(tmp_path / "run", model(1.0))
    with start(tmp_path / "run", model(1.001), resume=True) as writer:
        assert writer.resumed
    told = r"model\.outputs differ by up to 0\.001 of the largest"
    with pytest.raises(RunError, match=told):
        start(tmp_path / "run", model(1.1), resume=True)
    with pytest.raises(RunError, match=r"outputs was \[100\.0, 1\.0\] and is now \[100\.0\]"):
        start(tmp_path / "run", model(), resume=True)


def test_another_format_is_refused_and_another_version_told(tmp_path, monkeypatch):
    out, made = tmp_path / "run", contents()
    interrupted(out)
    monkeypatch.setattr(
        "polyseme.store.writer.RunWriter.kind", replace(RUN, format="polyseme-run 9")
    )
    told = r'format was "polyseme-run 1" and is now "polyseme-run 9"'
    with pytest.raises(RunError, match=told):
        start(out, resume=True)
    monkeypatch.undo()
    now = {"polyseme": "99.0", "torch": "99.1"}
    monkeypatch.setattr("polyseme.store.partial._versions", lambda: now)
    with (
        pytest.warns(UserWarning, match=r"continues with polyseme 99\.0 and torch 99\.1: their"),
        start(out, resume=True) as writer,
    ):
        pass
    with start(out, resume=True) as writer:  # told once
        fill(writer, made)
        writer.finish(made.metadata)
    first, last = RunFolder(out).metadata["versions"]
    assert last == now
    assert first["torch"] != "99.1"


def test_a_fingerprint_that_no_run_has_room_for_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("polyseme.store.partial.LONGEST_RUN_JSON", 3000)
    with pytest.raises(InputError, match=r"takes [\d,]+ bytes of JSON, most of them for 'data';"):
        start(tmp_path / "run", {"data": ["x" * 1000], "model": "m"})
    assert not list(tmp_path.iterdir())


def test_metadata_that_are_too_long_are_never_published(tmp_path, monkeypatch):
    monkeypatch.setattr("polyseme.store.files.LONGEST_RUN_JSON", 10_000)
    monkeypatch.setattr("polyseme.store.files.short_json.__defaults__", (10_000,))
    made = contents()
    with start(tmp_path / "run") as writer:
        fill(writer, made)
        with pytest.raises(InputError, match=r"run.json takes [\d,]+ bytes of JSON, .* for 'more'"):
            writer.finish({**made.metadata, "more": "x" * 9_000})
        writer.finish(made.metadata)
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match=r"run.json takes"):
        add_metadata(tmp_path / "run", {"more": "x" * 9_000})
    assert snapshot(tmp_path) == before


def test_a_replaced_run_does_not_come_back(tmp_path):
    """It was killed right after the new one had its name, which was then moved away."""
    out, other = write(tmp_path / "run"), FINGERPRINT | {"model": "n"}
    interrupted(out, other, overwrite=True)
    partial = tmp_path / "run.partial"
    os.rename(out, partial / "old")
    os.rename(partial / "result", tmp_path / "elsewhere")
    with start(out, other, resume=True) as writer:
        assert not writer.resumed
        assert not out.exists()
        assert not (partial / "old").exists()


# -------------------------------------------------------------------------------- the state


def test_state_keeps_dtypes_shapes_and_the_last_version(tmp_path):
    arrays = {
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.float64(2.5),
        "flags": np.array([[True], [False]]),
        "half": np.arange(3, dtype=np.float16),
        "turned": np.arange(6, dtype=np.int16).reshape(2, 3).T,
        "é": np.array([2**64 - 1], dtype=np.uint64),
    }
    with start(tmp_path / "run") as writer:
        assert writer.load_state("s") is None
        writer.save_state("s", {}, {})
        assert writer.load_state("s") == ({}, {})
        writer.save_state("s", arrays, {"nested": {"é": [1, None]}})
        read, metadata = writer.load_state("s")
    assert metadata == {"nested": {"é": [1, None]}}
    assert set(read) == set(arrays)
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype
        assert read[name].shape == array.shape
        np.testing.assert_array_equal(read[name], array)


def test_a_checkpoint_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    with start(tmp_path / "run") as writer:
        writer.save_state("s", {"x": np.ones(2)}, {"n": 1})

        def full(tensors, file):
            Path(file).write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("polyseme.store.safetensors_files.save_file", full)
        with pytest.raises(RunError, match=r"No space left on device.*resume=True"):
            writer.save_state("s", {"x": np.zeros(2)}, {"n": 2})
        arrays, metadata = writer.load_state("s")
    assert arrays["x"].tolist() == [1, 1]
    assert metadata == {"n": 1}


def test_a_state_keeps_one_name_for_itself(tmp_path):
    with start(tmp_path / "run") as writer, pytest.raises(InputError, match=r"metadata\.json"):
        writer.save_state("s", {"metadata.json": np.ones(1)}, {})


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "x" * 101, "a\n"])
def test_state_names_cannot_leave_the_folder(tmp_path, name):
    with start(tmp_path / "run") as writer, pytest.raises(InputError, match="cannot be named"):
        writer.save_state(name, {}, {})


def test_a_damaged_state_is_explained(tmp_path):
    interrupted(tmp_path / "run")
    (tmp_path / "run.partial" / "state" / "pass-1.safetensors").write_bytes(b"x")
    with (
        start(tmp_path / "run", resume=True) as writer,
        pytest.raises(RunError, match=r"pass-1.safetensors is damaged .*overwrite=True"),
    ):
        writer.load_state("pass-1")


# --------------------------------------------------------------------------------- the lock


def _hold(out: str, ready, done) -> None:
    with RunWriter(out, fingerprint=FINGERPRINT):
        ready.set()
        done.wait(20)


def test_two_processes_cannot_write_one_run(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(tmp_path / "run"), ready, done))
    other.start()
    try:
        assert ready.wait(20)
        for flags in ({}, {"overwrite": True}, {"resume": True}):
            with pytest.raises(RunError, match=r"run.partial is in use by another process"):
                start(tmp_path / "run", **flags)
    finally:
        done.set()
        other.join()
    with start(tmp_path / "run", resume=True) as writer:
        assert writer.resumed


def test_the_lock_is_released_on_exit_error_and_refusal(tmp_path):
    out = tmp_path / "run"
    interrupted(out)
    with pytest.raises(RunError, match="unfinished"):
        start(out)
    with start(out, resume=True), pytest.raises(RunError, match="in use"):
        start(out, resume=True)
    assert sorted(os.listdir(tmp_path / "run.partial")) == ["partial.json", "result", "state"]
    with start(out, resume=True):
        pass


def test_of_many_writers_at_once_one_gets_in(tmp_path):
    barrier = threading.Barrier(8)
    won: list[RunWriter] = []
    lost: list[str] = []

    def race() -> None:
        barrier.wait()
        try:
            won.append(start(tmp_path / "run"))
        except RunError as error:
            lost.append(str(error))

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert all("in use" in message for message in lost)
    won[0].close()


def test_metadata_is_added_to_a_finished_run(tmp_path):
    out = write(tmp_path / "run")
    before = snapshot(out)
    add_metadata(out, {"evaluation": {"fvu": 0.5}})
    add_metadata(out, {"evaluation": {"fvu": 0.25}})
    after = snapshot(out)
    assert after.keys() == before.keys()
    was, now = json.loads(before.pop("run.json")), json.loads(after.pop("run.json"))
    assert was.pop("sha256") != now.pop("sha256")
    assert now == {**was, "evaluation": {"fvu": 0.25}}
    assert after == before
    assert altered_files(out) == []
    assert RunFolder(out).metadata["evaluation"] == {"fvu": 0.25}
    with pytest.raises(InputError, match="'sites' describes the analysis itself"):
        add_metadata(out, {"sites": []})
    with pytest.raises(InputError, match="no NaN"):
        add_metadata(out, {"evaluation": {"fvu": float("nan")}})
    with pytest.raises(RunError, match="does not exist"):
        add_metadata(tmp_path / "none", {})
    text = (out / "run.json").read_text().replace("average", "single")
    (out / "run.json").write_text(text)
    with pytest.raises(RunError, match=r"run\.json: it does not match its own"):
        add_metadata(out, {"evaluation": {"fvu": 0.5}})


def test_arrays_of_a_site_are_overwritten_in_their_place(tmp_path):
    made = contents()
    other = {**made.sites[0], "histogram": made.sites[0]["histogram"][::-1].copy()}
    assert (other["histogram"] != made.sites[0]["histogram"]).any()
    with start(tmp_path / "run") as writer:
        file = writer.path.parent.glob("*/**/sites")
        writer.write_site(0, made.sites[0])
        [folder] = file
        writer.overwrite_in_site(0, {"histogram": other["histogram"]})
        overwritten = (folder / "0.safetensors").read_bytes()
        writer.write_site(0, other)
        assert (folder / "0.safetensors").read_bytes() == overwritten
        with pytest.raises(
            InputError, match=r"'histogram' is \('int32', \[.*only by the same dtype"
        ):
            writer.overwrite_in_site(0, {"histogram": other["histogram"].astype(np.int32)})
        with pytest.raises(InputError, match=r"'more' is .* but in 0.safetensors it is None"):
            writer.overwrite_in_site(0, {"more": np.zeros(3)})
        assert (folder / "0.safetensors").read_bytes() == overwritten
