"""Several passes over the data, and the plan that says so before they begin."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType

import numpy as np
import pytest
import torch

import polyseme as ps
from analysis import small
from polyseme.analysis import kinds, passes
from polyseme.analysis import plan as plan_module
from polyseme.analysis.image_data import ImageData
from polyseme.analysis.plan import Plan, make_plan, show_bytes
from polyseme.analysis.progress import Stages
from polyseme.analysis.settings import Settings, memory_bytes
from polyseme.analysis.text_data import TextData
from polyseme.data import Contexts, read_text
from polyseme.errors import InputError
from polyseme.options import AnalysisSettings
from polyseme.sites import find_sites

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["bank", "river", "money", "green", "light", "wide", "deep", "long", "old", "new"]
LAYERS = 3


class Setting:
    """A tiny model, some text, and what an analysis of it is called with."""

    def __init__(self) -> None:
        vocabulary = {word: n for n, word in enumerate(["<eos>", "<unk>", *WORDS])}
        plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
        plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        self.tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=plain, eos_token="<eos>", unk_token="<unk>"
        )
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
        self.model = transformers.LlamaForCausalLM(config).eval()
        self.sites = find_sites(self.model, "*.mlp")
        rng = np.random.default_rng(0)
        self.texts = [" ".join(rng.choice(WORDS, 40)) for _ in range(30)]

    def contexts(self, texts=None, **options) -> Contexts:
        texts = self.texts if texts is None else texts
        return Contexts(read_text(texts), self.tokenizer, length=12, **options)

    def analyse(self, out, contexts=None, **options):
        options = {
            "sites": "*.mlp",
            "select": ps.TopK(5),
            "batch_size": 16,
            "progress": False,
            **options,
        }
        return ps.analyse(self.model, contexts or self.contexts(), out=out, **options)

    def plan(self, budget=None, contexts=None, **options) -> Plan:
        return make_plan(self.sites, self.data(contexts, memory_budget=budget), **options)

    def data(self, contexts=None, **options) -> TextData:
        return TextData(self.model, contexts or self.contexts(), settings("texts", **options))

    def budget(self, n_passes: int) -> int:
        """The least that does with so many passes."""
        return least_budget(self.plan, n_passes)


def settings(kind, **options) -> Settings:
    given = {"select": ps.TopK(5), "batch_size": 16, **options}
    return Settings.checked(kind, AnalysisSettings(**given))


def least_budget(plan, n_passes: int) -> int:
    low, high = 0, plan().memory
    while high - low > 1:
        middle = (low + high) // 2
        try:
            enough = len(plan(middle).passes) <= n_passes
        except InputError:
            enough = False
        low, high = (low, middle) if enough else (middle, high)
    assert len(plan(high).passes) == n_passes
    return high


def files(path):
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and file.name != "run.json"
    }


@pytest.fixture(scope="module")
def setting():
    return Setting()


@pytest.fixture(scope="module")
def whole(setting, tmp_path_factory):
    return files(setting.analyse(tmp_path_factory.mktemp("whole") / "run").path)


@pytest.mark.parametrize("n_passes", [2, 3])
def test_several_passes_find_the_same(setting, whole, tmp_path, n_passes):
    contexts = setting.contexts()
    begun = []
    batches = contexts.batches
    contexts.batches = lambda size, start=0: begun.append(start) or batches(size, start)
    budget = setting.budget(n_passes)
    run = setting.analyse(tmp_path / "run", contexts, memory_budget=budget)
    assert begun == [0] * n_passes
    assert files(run.path) == whole
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("stop", [1, 7, 10])
@pytest.mark.parametrize("then", [3, 2, 1])
def test_interrupted_in_any_pass_under_any_budget(setting, whole, tmp_path, stop, then):
    contexts = setting.contexts()
    batches, given = contexts.batches, []

    def stopping(size, start=0):
        for batch in batches(size, start):
            if len(given) == stop:
                raise KeyboardInterrupt
            given.append(start)
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contexts, "batches", stopping)
        with pytest.raises(KeyboardInterrupt):
            setting.analyse(tmp_path / "run", contexts, memory_budget=setting.budget(3))
    # Ten batches a pass, so that 10 is between two of them.
    assert len(list(batches(16))) < 20
    budget = setting.budget(then) if then > 1 else None
    run = setting.analyse(tmp_path / "run", memory_budget=budget, resume=True)
    assert files(run.path) == whole


def test_from_one_budget_to_another_and_back(setting, whole, tmp_path):
    # The first site begins a group of two, then one of its own, then one of two again.
    contexts = setting.contexts()
    batches = contexts.batches

    def killed(size, start=0):
        for number, batch in enumerate(batches(size, start)):
            if number == 2:
                raise KeyboardInterrupt
            yield batch

    contexts.batches = killed
    with pytest.raises(KeyboardInterrupt):
        setting.analyse(tmp_path / "run", contexts, memory_budget=setting.budget(2))
    with pytest.MonkeyPatch.context() as patch:
        # Nothing of the second try is saved, as when the process is killed.
        patch.setattr(passes, "read_and_save", killed_at_once)
        with pytest.raises(SystemExit):
            setting.analyse(tmp_path / "run", memory_budget=setting.budget(3), resume=True)
    run = setting.analyse(tmp_path / "run", memory_budget=setting.budget(2), resume=True)
    assert files(run.path) == whole


def killed_at_once(collector, batches, *_, **__):
    next(collector.run(batches))
    raise SystemExit


def test_interrupted_after_the_passes(setting, whole, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    budget = setting.budget(2)
    with monkeypatch.context() as patch:
        patch.setattr("polyseme.analysis.kinds.cluster_site", interrupt)
        with pytest.raises(KeyboardInterrupt):
            setting.analyse(tmp_path / "run", memory_budget=budget)
    monkeypatch.setattr(passes, "read_and_save", None)  # no pass is made again
    run = setting.analyse(tmp_path / "run", memory_budget=budget, resume=True)
    assert files(run.path) == whole


def test_checkpoints_on_the_way_change_nothing(setting, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(passes, "CHECKPOINT_SECONDS", 0.0)
    assert files(setting.analyse(tmp_path / "run").path) == whole


def test_another_batch_size_goes_on(setting, tmp_path):
    first = setting.analyse(tmp_path / "first", batch_size=16)
    contexts = setting.contexts()
    batches = contexts.batches

    def stopping(size, start=0):
        for number, batch in enumerate(batches(size, start)):
            if number == 3:
                raise KeyboardInterrupt
            yield batch

    contexts.batches = stopping
    with pytest.raises(KeyboardInterrupt):
        setting.analyse(tmp_path / "second", contexts)
    second = setting.analyse(tmp_path / "second", batch_size=7, resume=True)
    names = ["site", "neuron", "input", "position"]
    assert second.folder.examples[names].equals(first.folder.examples[names])
    np.testing.assert_allclose(
        second.folder.examples["activation"], first.folder.examples["activation"], rtol=1e-5
    )
    assert second.metadata["settings"]["batch_size"] == 7


def test_an_error_in_the_first_batch_leaves_nothing(setting, tmp_path):
    model = setting.model
    handle = model.model.layers[2].mlp.gate_proj.register_forward_hook(lambda *a: a[2] * torch.nan)
    try:
        with pytest.raises(InputError, match="NaN or"):
            setting.analyse(tmp_path / "run", sites=setting.sites)
    finally:
        handle.remove()
    assert list(tmp_path.iterdir()) == []


def test_batches_are_halved_with_a_word(setting, whole, tmp_path, capsys):
    def full(_, args, kwargs):
        if len(kwargs["input_ids"]) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    handle = setting.model.model.register_forward_pre_hook(full, with_kwargs=True)
    try:
        run = setting.analyse(tmp_path / "run", progress=True)
    finally:
        handle.remove()
    assert "ran out of memory: batches of 8 contexts from here on." in capsys.readouterr().err
    assert run.folder.examples["input"].max() > 100
    assert files(run.path).keys() == whole.keys()


@pytest.mark.parametrize("cores", [1, 2, 3])
def test_sites_side_by_side_come_out_the_same(setting, whole, tmp_path, monkeypatch, cores):
    monkeypatch.setattr(plan_module.os, "cpu_count", lambda: cores)
    assert setting.plan().side_by_side == cores
    at_work, most = [], []
    cluster_site = kinds.cluster_site

    def clustered(one, *options):
        at_work.append(one.site.name)
        most.append(len(at_work))
        time.sleep(0.2 if one.site.name == "model.layers.0.mlp" else 0)  # the first is the last
        at_work.remove(one.site.name)
        return cluster_site(one, *options)

    monkeypatch.setattr(kinds, "cluster_site", clustered)
    run = setting.analyse(tmp_path / "run")
    assert files(run.path) == whole
    assert (max(most) > 1) == (cores > 1)
    assert run.neurons()["site"].drop_duplicates().tolist() == [site.name for site in setting.sites]


def test_an_error_at_one_of_several_sites_is_the_analysis_error(setting, tmp_path, monkeypatch):
    def failing(one, *_):
        raise ZeroDivisionError(one.site.name)

    monkeypatch.setattr(kinds, "cluster_site", failing)
    with pytest.raises(ZeroDivisionError, match=r"model\.layers"):
        setting.analyse(tmp_path / "run")
    monkeypatch.undo()
    assert len(setting.analyse(tmp_path / "run", resume=True).neurons()) == 24 * LAYERS


def test_stages_share_the_time_that_threads_were_at_them_together():
    stages = Stages()
    with stages("reading"):
        time.sleep(0.05)
    reading, start = dict(stages.seconds), time.monotonic()

    def work(name):
        for _ in range(2):
            with stages(name):
                time.sleep(0.1)

    with stages.side_by_side(), ThreadPoolExecutor(2) as pool:
        list(pool.map(work, ["clusters", "labels"]))
    took = time.monotonic() - start
    assert stages.seconds["reading"] == reading["reading"]
    assert stages.seconds["clusters"] + stages.seconds["labels"] == pytest.approx(took, rel=0.1)
    assert stages.seconds["clusters"] == pytest.approx(stages.seconds["labels"], rel=0.3)


# --- images --------------------------------------------------------------------------------------


class OfImages:
    """What an analysis of images is called with."""

    options = MappingProxyType({"select": ps.TopK(5), "seed": 3, "panel_examples": 2})

    def __init__(self) -> None:
        self.model = small.make(small.MLP)
        self.inputs = small.flat_inputs()
        self.labels = np.arange(len(self.inputs)) % 3

    def analyse(self, out, data=None, **options):
        data = (self.inputs, self.labels) if data is None else data
        options = {"sites": "*", "batch_size": 16, "progress": False, **self.options, **options}
        return ps.analyse(self.model, data, out=out, **options)

    def plan(self, budget=None, data=None) -> Plan:
        data = (self.inputs, self.labels) if data is None else data
        options = settings("images", memory_budget=budget, **self.options)
        return make_plan(find_sites(self.model, "*"), ImageData(self.model, data, options))


@pytest.fixture(scope="module")
def of_images():
    return OfImages()


@pytest.fixture(scope="module")
def whole_images(of_images, tmp_path_factory):
    return files(of_images.analyse(tmp_path_factory.mktemp("images") / "run").path)


@pytest.mark.parametrize("n_passes", [1, 2, 3])
def test_images_under_a_budget_come_out_the_same(of_images, whole_images, tmp_path, n_passes):
    budget = least_budget(of_images.plan, n_passes)
    run = of_images.analyse(tmp_path / "run", memory_budget=budget)
    assert files(run.path) == whole_images
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]
    stages = ["preparation", "reading", "selection", "maps", "logits", "clusters", "tables"]
    assert list(run.metadata["seconds"])[: len(stages)] == stages


@pytest.mark.parametrize(
    ("first", "then", "stop"), [(None, 1, 2), (None, 2, 5), (2, None, 2), (2, None, 8), (3, 2, 8)]
)
def test_images_go_on_under_another_budget(
    of_images, whole_images, tmp_path, monkeypatch, first, then, stop
):
    # Rows that a pass began to keep in memory, or in files, stay there.
    budgets = [n and least_budget(of_images.plan, n) for n in (first, then)]
    plain, taken = ImageData.batches, []

    def stopping(*arguments):
        for batch in plain(*arguments):
            if len(taken) == stop:
                raise KeyboardInterrupt
            taken.append(batch)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(ImageData, "batches", stopping)
        with pytest.raises(KeyboardInterrupt):
            of_images.analyse(tmp_path / "run", memory_budget=budgets[0])
    run = of_images.analyse(tmp_path / "run", memory_budget=budgets[1], resume=True)
    assert files(run.path) == whole_images


def test_images_that_can_be_read_only_once(of_images, tmp_path):
    # Of data of unknown length more may have to be held.
    budget = int(1.05 * least_budget(of_images.plan, 2))
    once = iter([of_images.inputs])
    with pytest.raises(
        InputError,
        match=r", which requires \d passes over images that can be read only once: give \d.* or "
        "images that can be read again, such as an array or a data set with a length",
    ):
        of_images.analyse(tmp_path / "run", once, memory_budget=budget)


def test_the_plan_for_images(of_images, tmp_path, capsys):
    of_images.analyse(tmp_path / "run", progress=True)
    shown = capsys.readouterr().err.replace("\n", " ")
    assert shown.startswith("Plan: 3 sites, 17 neurons; data of 90 inputs; 1 pass over it, about")
    assert of_images.plan(data=iter([of_images.inputs])).amount == "data of unknown length"


# --- the plan ------------------------------------------------------------------------------------


def test_a_plan_is_data(setting):
    plan = setting.plan(contexts=setting.contexts(max_tokens=2_400), seconds_an_input=2.0)
    assert plan.passes == ((0, 1, 2),)
    assert (plan.sites, plan.neurons) == (LAYERS, 24 * LAYERS)
    # No special token begins or ends a context here.
    assert plan.amount == "2,400 tokens in 200 contexts"
    assert plan.seconds == pytest.approx(2.0 * 200 * 1.25)
    shown = str(plan)
    assert shown.startswith("Plan: 3 sites, 72 neurons; 2,400 tokens in 200 contexts; 1 pass over")
    assert "over it, about 8 min 20 s; up to " in shown
    unknown = setting.plan(seconds_an_input=2.0)
    assert (unknown.amount, unknown.seconds) == ("text of unknown length", None)
    assert "; text of unknown length; 1 pass over it; up to " in str(unknown)


def test_a_smaller_budget_makes_more_passes(setting):
    for n in (2, 3):
        budget = setting.budget(n)
        plan = setting.plan(budget)
        assert [number for group in plan.passes for number in group] == list(range(LAYERS))
        assert len(plan.passes) == n
        assert plan.memory <= budget
    assert setting.plan(setting.plan().memory).passes == ((0, 1, 2),)


def test_sites_are_worked_on_side_by_side_as_far_as_memory_goes(setting, monkeypatch):
    sizes = dict.fromkeys(plan_module._Size.__annotations__, 0) | {"buffers": 10, "later": 1000}
    monkeypatch.setattr(plan_module._Size, "estimate", lambda *_: plan_module._Size(**sizes))
    monkeypatch.setattr(TextData, "working_bytes", lambda *_: 0)
    monkeypatch.setattr(plan_module.os, "cpu_count", lambda: 3)
    for budget, side_by_side in [(1060, 1), (2059, 1), (2060, 2), (3059, 2), (3060, 3), (9999, 3)]:
        plan = setting.plan(budget)
        assert plan.side_by_side == side_by_side
        assert plan.memory == 60 + 1000 * side_by_side <= budget
    for budget, most, side_by_side in [(9999, 8, 3), (9999, 2, 2), (2060, 8, 2), (1060, 8, 1)]:
        assert setting.plan(budget, at_a_time=most).side_by_side == side_by_side
    # Without a budget somewhat more memory is used for it, and the plan tells of that.
    assert (setting.plan().side_by_side, setting.plan().memory) == (3, 3060)
    monkeypatch.setattr(plan_module, "_BESIDE", 999)
    assert (setting.plan().side_by_side, setting.plan().memory) == (1, 1060)
    monkeypatch.setattr(plan_module.os, "cpu_count", lambda: None)
    assert setting.plan(9999).side_by_side == 1


def test_the_search_for_similar_features_is_planned_for(setting, monkeypatch):
    sizes = dict.fromkeys(plan_module._Size.__annotations__, 0) | {"later": 1000, "tables": 50}
    sizes["features"] = 3000
    monkeypatch.setattr(plan_module._Size, "estimate", lambda *_: plan_module._Size(**sizes))
    monkeypatch.setattr(TextData, "working_bytes", lambda *_: 0)
    # Blocks of all pairs, what is kept of each feature, and the tables, which are held by then.
    needed = setting.plan().memory
    assert needed == 150 + plan_module._searching(9000, setting.model.config.hidden_size)
    assert 277e6 < needed < 280e6
    assert setting.plan(needed).memory == needed
    with pytest.raises(InputError, match=r"and the data kept for all sites need 27\d\.\d MB"):
        setting.plan(needed - 1)


def test_memory_is_bounded_for_any_amount_of_text(setting):
    known = setting.plan(contexts=setting.contexts(max_tokens=10**12))
    assert known.memory == setting.plan().memory
    assert setting.plan(contexts=setting.contexts(max_tokens=24)).memory < known.memory


def test_a_budget_that_cannot_be_met_says_what_would_do(setting, tmp_path):
    with pytest.raises(
        InputError,
        match=r"^memory_budget is 1\.0 kB; site 'model\.layers\.0\.mlp' alone and the data kept "
        r"for all sites need \d.*, excluding the model: give at least that, fewer sites, or a "
        "selector of fewer examples",
    ):
        setting.analyse(tmp_path / "run", memory_budget="1KB")
    assert list(tmp_path.iterdir()) == []


def test_texts_that_can_be_read_only_once(setting, tmp_path):
    once = setting.contexts(iter(setting.texts))
    with pytest.raises(
        InputError,
        match=r", which requires 2 passes over texts that can be read only once: give \d.* or "
        "texts that can be read again, such as a list or a file",
    ):
        setting.analyse(tmp_path / "run", once, memory_budget=setting.budget(2))


def test_the_plan_is_printed_first(setting, tmp_path, capsys):
    setting.analyse(tmp_path / "run", setting.contexts(max_tokens=600), progress=True)
    shown = capsys.readouterr().err.replace("\n", " ")
    assert shown.startswith("Plan: 3 sites, 72 neurons; 600 tokens in 50 contexts; 1 pass over it,")
    setting.analyse(tmp_path / "quiet", setting.contexts(max_tokens=600))
    assert capsys.readouterr().err == ""


def test_budgets_are_numbers_of_bytes():
    given = {"4GB": 4 * 10**9, "512 MiB": 512 << 20, "1.5g": 1.5e9, "70000": 70_000, 9: 9}
    assert {text: memory_bytes(text) for text in given} == given
    assert memory_bytes(None) is None
    for wrong in ("", "GB", "-1", "4 PB", "0", 0, True, "4 I"):
        with pytest.raises(
            InputError, match=r"^memory_budget is .*; expected a number of bytes, or a number"
        ):
            memory_bytes(wrong)
    assert [show_bytes(n) for n in (999, 1500, 2_340_000, 5 * 10**10)] == [
        "999 B",
        "1.5 kB",
        "2.3 MB",
        "50.0 GB",
    ]
