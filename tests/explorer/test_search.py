"""The index of words, against a search through every example."""

from __future__ import annotations

import json
from collections import Counter, defaultdict

import pytest

from explorer.conftest import HOSTILE
from polyseme.explorer import search
from polyseme.explorer.runfiles import RunFiles


def shards_of(files):
    listed = json.loads(files.file("search/words.json"))
    found = {}
    for word, shard in zip(listed["words"], listed["shards"], strict=True):
        found[word] = json.loads(files.file(f"search/{shard}.json"))[word]
    return listed, found


@pytest.mark.parametrize("in_shard", [64, 3])
def test_words_lead_to_their_features(text_run, monkeypatch, in_shard):
    monkeypatch.setattr(search, "_WORDS_IN_SHARD", in_shard)
    files = RunFiles(text_run, "texts")
    listed, found = shards_of(files)
    assert listed["words"] == sorted(listed["words"])
    assert len(set(listed["shards"])) == -(-len(listed["words"]) // in_shard)
    # What the run's index by token promises: features in which at least a quarter of the
    # strongest tokens, and two, are the word. Others may be listed for their labels.
    wanted = defaultdict(set)
    for number, site in enumerate(text_run.sites):
        for neuron in range(text_run.site(site).n_neurons):
            view = text_run.neuron(site, neuron)
            windows = view.texts()
            for feature in view.features:
                rows = feature.examples["example"]
                tokens = Counter(windows[row].tokens[windows[row].centre] for row in rows)
                for token, count in tokens.items():
                    if count >= 2 and count >= 0.25 * len(rows):
                        wanted[token.strip().casefold()].add((number, neuron, feature.number))
    assert len(wanted) > 3
    for word, features in wanted.items():
        assert features <= {tuple(entry[:3]) for entry in found[word]["features"]}
    for word, kinds in found.items():
        entries = kinds["features"]
        order = [(e[4].partition(" ")[0].casefold() != word, -e[3]) for e in entries]
        assert order == sorted(order)
        for site, neuron, feature, size, label in entries:
            view = text_run.neuron(text_run.sites[site], neuron)
            assert view.features[feature].n_examples == size
            row = text_run.folder.offsets("features")[text_run.folder.first_neuron(site) + neuron]
            assert text_run.folder.features["label"][row + feature] == label


def test_words_lead_to_their_meanings(text_run):
    """Whatever a label names, in the label's own words."""
    found = shards_of(RunFiles(text_run, "texts"))[1]
    wanted = defaultdict(dict)
    for number, site in enumerate(text_run.sites):
        for neuron in range(text_run.site(site).n_neurons):
            for meaning in text_run.neuron(site, neuron).meanings:
                named = [(word, n) for word, n in meaning.counts.items() if n > 1][:4]
                label = meaning.label.partition("; near:")[0]
                for word, times in named:
                    entry = [number, neuron, meaning.number, meaning.n_examples, label]
                    key = " ".join(word.split()).casefold()
                    wanted[key][tuple(entry)] = (-times, -meaning.n_examples)
    assert len(wanted) >= 3
    assert any(len(entries) > 1 for entries in wanted.values())
    for word, kinds in found.items():
        entries = [tuple(entry) for entry in kinds["meanings"]]
        assert set(entries) <= set(wanted[word])
        assert len(entries) == min(search.MOST_LISTED, len(wanted[word]))
        assert sorted(entries, key=wanted[word].get) == entries
    assert set(filter(None, wanted)) <= set(found)


@pytest.mark.parametrize("column", ["meaning", "position", "input"])
def test_features_are_found_whatever_examples_say(text_run, monkeypatch, column):
    whole = shards_of(RunFiles(text_run, "texts"))[1]
    read = type(text_run.folder).column

    def wrong(self, table, name):
        values = read(self, table, name)
        return values + 10**6 if (table, name) == ("examples", column) else values

    monkeypatch.setattr(type(text_run.folder), "column", wrong)
    found = shards_of(RunFiles(text_run, "texts"))[1]
    assert not any(kinds["meanings"] for kinds in found.values())
    features = {word: kinds["features"] for word, kinds in whole.items() if kinds["features"]}
    assert {word: kinds["features"] for word, kinds in found.items()} == features


def test_words_are_as_they_read(text_run):
    words = shards_of(RunFiles(text_run, "texts"))[0]["words"]
    assert all(word == " ".join(word.split()).casefold() and word for word in words)
    assert {word.casefold() for word in HOSTILE} & set(words)


def test_the_first_features_are_kept(text_run, monkeypatch):
    files = RunFiles(text_run, "texts")
    every = {word: found["features"] for word, found in shards_of(files)[1].items()}
    word, entries = max(every.items(), key=lambda item: len(item[1]))
    assert len(entries) > 2
    monkeypatch.setattr(search, "MOST_LISTED", 2)
    assert shards_of(RunFiles(text_run, "texts"))[1][word]["features"] == entries[:2]


def test_images_have_no_words(grey_run):
    files = RunFiles(grey_run, "grey")
    assert json.loads(files.file("run.json"))["has"]["search"] is False
    assert not any(path.startswith("search/") for path in files.paths())
    with pytest.raises(KeyError):
        files.file("search/words.json")
