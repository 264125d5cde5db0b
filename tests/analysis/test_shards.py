"""The analysis in shards: merged they are the run of one pass, and what does not fit is refused."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import polyseme as ps
from analysis.tiny_texts import make_model, make_tokenizer
from polyseme.analysis.shards import checked_shard, shard_range
from polyseme.data import Contexts, read_text
from polyseme.errors import InputError, PolysemeError, RunError
from polyseme.store.shards import Shard

pytest.importorskip("transformers")

N = 3
SITES = "model.layers.*.mlp"
OPTIONS: dict[str, Any] = {"sites": SITES, "batch_size": 8, "window": (3, 2), "progress": False}


class Setting:
    """A tiny model and enough text for several shards of 64 contexts."""

    def __init__(self) -> None:
        self.tokenizer = make_tokenizer()
        self.model = make_model(len(self.tokenizer))
        words = sorted(set(self.tokenizer.get_vocab()) - {"<eos>", "<unk>"})
        rng = np.random.default_rng(0)
        self.texts = [" ".join(rng.choice(words, 90)) for _ in range(30)]

    def contexts(self) -> Contexts:
        return Contexts(read_text(self.texts), self.tokenizer, length=12)


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting()


@pytest.fixture(scope="module")
def shards(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("shards")
    numbers = range(1, N + 1)
    for n in numbers:
        ps.analyse_shard(setting.model, setting.contexts(), (n, N), out=folder / f"{n}", **OPTIONS)
    return [folder / f"{n}" for n in numbers]


@pytest.fixture(scope="module")
def whole(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    ps.analyse(setting.model, setting.contexts(), out=out, **OPTIONS)
    return out


def merged(setting: Setting, shards: list[Any], out: Any, **options: Any) -> ps.Run:
    given = {"model": setting.model, "tokenizer": setting.tokenizer, "progress": False, **options}
    return ps.merge(shards, out=out, **given)


def assert_same_run(a: Path, b: Path) -> None:
    """Every file to the last byte, and all metadata but times."""
    names = {file.relative_to(a) for file in a.rglob("*") if file.is_file()}
    assert names == {file.relative_to(b) for file in b.rglob("*") if file.is_file()}
    for name in names - {Path("run.json")}:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    of_a, of_b = (json.loads((path / "run.json").read_text()) for path in (a, b))
    for key in (of_a.keys() | of_b.keys()) - {"created", "seconds", "sha256"}:
        assert of_a[key] == of_b[key], key


def test_merged_shards_are_the_run_of_one_pass_to_the_last_byte(
    setting: Setting, shards: list[Path], whole: Path, tmp_path: Path
) -> None:
    ranges = [(shard.start, shard.stop) for shard in map(Shard, shards)]
    assert all(stop - start >= 64 for start, stop in ranges)
    # In another order, and one of them twice.
    merged(setting, [shards[1], shards[2], shards[0], shards[1]], tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize(
    "select", [ps.FirstActive(7), ps.AboveFraction(0.3, 9), ps.Stratified(6, 3)], ids=repr
)
def test_every_selector_several_passes_and_shards_without_inputs(
    setting: Setting, tmp_path: Path, select: Any
) -> None:
    options = {**OPTIONS, "select": select, "memory_budget": "40MB", "random_examples": 3}
    ps.analyse(setting.model, setting.contexts(), out=tmp_path / "whole", **options)
    parts = [tmp_path / f"{n}" for n in range(9)]
    for n, out in enumerate(parts):  # counted from 0
        ps.analyse_shard(setting.model, setting.contexts(), f"{n}/9", out=out, **options)
    assert sum(shard.start == shard.stop for shard in map(Shard, parts)) > 1
    merged(setting, parts, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_images_with_panels_and_labels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = (rng.random((300, 6, 6), np.float32), rng.integers(0, 3, 300))
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(36, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3)
    )
    options: dict[str, Any] = {"sites": "1", "batch_size": 32, "progress": False}
    ps.analyse(model, images, out=tmp_path / "whole", **options)
    for n in (1, 2):
        ps.analyse_shard(model, images, (n, 2), out=tmp_path / f"{n}", **options)
    parts = [tmp_path / "1", tmp_path / "2"]
    ps.merge(parts, out=tmp_path / "run", model=model, data=images, progress=False)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    with pytest.raises(InputError, match=r"shards are of images, so merge needs the model and"):
        ps.merge(parts, out=tmp_path / "other", progress=False)
    other = (images[0][::-1].copy(), images[1])
    with pytest.raises(RunError, match=r"of another model or other data: .*data\.sha256 was"):
        ps.merge(parts, out=tmp_path / "other", model=model, data=other, progress=False)


@pytest.mark.parametrize(("total", "n", "batch_size"), [(1000, 4, 32), (65, 3, 48), (5, 7, 2)])
def test_ranges_are_all_of_the_data_in_whole_batches(total: int, n: int, batch_size: int) -> None:
    ranges = [shard_range(number, n, total, batch_size) for number in range(1, n + 1)]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == total
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
    assert all(start % batch_size == 0 or start == total for start, _ in ranges)
    assert all(start % 64 == 0 or start == total for start, _ in ranges)


def test_shards_are_numbered_from_one_or_from_zero() -> None:
    assert checked_shard("3/64") == checked_shard((3, 64)) == (3, 64)
    assert checked_shard("0/64") == checked_shard("64/64") == (64, 64)
    for wrong in ("65/64", "3", "3/0", "-1/4", "a/b", (1, 2, 3), "1.5/4"):
        with pytest.raises(InputError, match=r"shard is .*such as '3/64'"):
            checked_shard(wrong)


def test_a_missing_shard_is_named_and_may_be_left_out(
    setting: Setting, shards: list[Path], tmp_path: Path
) -> None:
    start, stop = Shard(shards[1]).start, Shard(shards[1]).stop
    with pytest.raises(RunError, match=rf"missing: none holds the inputs {start} to {stop} of"):
        merged(setting, [shards[0], shards[2]], tmp_path / "run")
    run = merged(setting, [shards[2], shards[0]], tmp_path / "run", allow_missing=True)
    assert run.metadata["missing_inputs"] == [[start, stop]]
    total = Shard(shards[0]).total
    assert run.metadata["data"]["n_inputs"] == total - (stop - start)
    inputs = run.folder.inputs["index"]
    assert len(inputs) > 50
    assert not ((start <= inputs) & (inputs < stop)).any()


def test_shards_that_do_not_belong_together_are_refused(
    setting: Setting, shards: list[Path], tmp_path: Path
) -> None:
    context = setting.contexts()
    ps.analyse_shard(setting.model, context, "1/2", out=tmp_path / "half", **OPTIONS)
    with pytest.raises(RunError, match=r"overlap: both hold inputs"):
        merged(setting, [*shards, tmp_path / "half"], tmp_path / "run")
    for name, changed in (("seed", {"seed": 1}), ("batch_size", {"batch_size": 16})):
        ps.analyse_shard(setting.model, context, "2/3", out=tmp_path / name, **OPTIONS | changed)
        with pytest.raises(RunError, match=rf"are shards of different analyses: .*{name} was"):
            merged(setting, [shards[0], tmp_path / name], tmp_path / "run")
    with pytest.raises(RunError, match=r"is a shard of another model or other data: model"):
        merged(setting, shards, tmp_path / "run", model=make_model(len(setting.tokenizer), seed=1))
    with pytest.raises(InputError, match="There are no shards to merge"):
        merged(setting, [], tmp_path / "run")
    with pytest.raises(RunError, match=r"is not a shard; give folders that analyse --shard"):
        merged(setting, [tmp_path], tmp_path / "run")
    with pytest.raises(
        InputError, match=r"does not say how its model is loaded\. Give model= and tok"
    ):
        ps.merge(shards, out=tmp_path / "run", progress=False)
    with pytest.raises(InputError, match=r"Unknown option: 'windows'\. Did you mean 'window'"):
        ps.analyse_shard(setting.model, context, "1/2", out=tmp_path / "x", sites=SITES, windows=1)
    once = Contexts(read_text(iter(setting.texts)), setting.tokenizer, length=12)
    with pytest.raises(InputError, match="is an iterator, which can be read only once"):
        ps.analyse_shard(setting.model, once, "1/2", out=tmp_path / "x", **OPTIONS)
    assert not (tmp_path / "run").exists()


def test_shards_of_strangers_are_not_trusted(
    setting: Setting, shards: list[Path], tmp_path: Path
) -> None:
    def altered(name: str, change: Any) -> list[Path]:
        copy = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        shutil.copytree(shards[0], copy)
        change(copy / name)
        return [copy, *shards[1:]]

    def sealed(file: Path, **arrays: np.ndarray) -> None:
        save_file({**load_file(file), **arrays}, file)
        content = json.loads((file.parent / "shard.json").read_text())
        from polyseme.store.files import sha256

        content["files"][file.name] = sha256(file)
        (file.parent / "shard.json").write_text(json.dumps(content))

    site = load_file(shards[0] / "site-0.safetensors")
    cases = [
        altered("site-0.safetensors", lambda f: f.write_bytes(f.read_bytes()[:-8])),
        altered("inputs.safetensors", Path.unlink),
        altered("shard.json", lambda f: f.write_text('{"format": "polyseme-shard"}')),
        altered("shard.json", lambda f: f.write_text(f.read_text().replace("64", "-1"))),
        altered("site-0.safetensors", lambda f: sealed(f, **{"examples.count": np.zeros(3)})),
        altered(
            "site-0.safetensors",
            lambda f: sealed(f, **{"examples.index": site["examples.index"] + 100_000}),
        ),
        altered(
            "site-0.safetensors", lambda f: sealed(f, **{"vectors.keys": site["vectors.keys"][1:]})
        ),
        altered(
            "site-0.safetensors", lambda f: sealed(f, **{"vectors.keys": site["vectors.keys"] + 1})
        ),
    ]
    for parts in cases:
        with pytest.raises(
            PolysemeError, match=r"damaged|missing|version|is not a shard"
        ) as raised:
            merged(setting, parts, tmp_path / "run", overwrite=True)
        assert "\n" not in str(raised.value)


def test_an_interrupted_shard_is_resumed(
    setting: Setting, shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from polyseme.analysis import passes

    monkeypatch.setattr(passes, "CHECKPOINT_SECONDS", 0.0)
    calls = itertools.count()

    def stop(*_: Any) -> None:
        if next(calls) == 9:
            raise KeyboardInterrupt

    out = tmp_path / "2"
    handle = setting.model.model.embed_tokens.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        ps.analyse_shard(setting.model, setting.contexts(), (2, N), out=out, **OPTIONS)
    handle.remove()
    assert not out.exists()
    with pytest.raises(RunError, match=r"holds an unfinished analysis of a shard\. Continue it"):
        ps.analyse_shard(setting.model, setting.contexts(), (2, N), out=out, **OPTIONS)
    ps.analyse_shard(setting.model, setting.contexts(), (2, N), out=out, resume=True, **OPTIONS)
    for file in shards[1].glob("*.safetensors"):
        assert (out / file.name).read_bytes() == file.read_bytes()
    # Once more, and there is nothing to do.
    ps.analyse_shard(setting.model, setting.contexts(), (2, N), out=out, resume=True, **OPTIONS)
    with pytest.raises(RunError, match=r"already exists\. Replace it with overwrite=True"):
        ps.analyse_shard(setting.model, setting.contexts(), (2, N), out=out, **OPTIONS)


def test_shards_and_their_run_may_lie_at_urls(
    setting: Setting, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYSEME_CACHE", str(tmp_path / "cache"))
    urls = [f"memory://shards-of-a-test/{n}" for n in (1, 2)]
    for n, url in enumerate(urls, start=1):
        shard = ps.analyse_shard(setting.model, setting.contexts(), (n, 2), out=url, **OPTIONS)
        assert shard.stop > shard.start
    run = merged(setting, urls, "memory://shards-of-a-test/run")
    assert_same_run(run.folder.path, whole)
