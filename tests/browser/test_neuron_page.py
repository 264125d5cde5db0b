"""What the pages of all neurons share: damage, addresses, orders, and what can be taken away."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from visiting import READY, arrive, query, static_files, visit

import polyseme as ps

TEXT = ("model.layers.8.mlp", 345)
TEXT_ADDRESS = "#/neuron/8/345"
IMAGE = ("layers.0", 11)
IMAGE_ADDRESS = "#/neuron/0/11"
FILES = [
    "examples.parquet",
    "inputs.safetensors",
    "sites/0.safetensors",
    "features.parquet",
    "random.parquet",
]


@pytest.fixture
def text(serve, text_run) -> str:
    return serve("live", text_run)


@pytest.fixture
def image(serve, image_run) -> str:
    return serve("live", image_run)


@pytest.fixture
def neuron(text_run):
    return text_run.neuron(*TEXT)


def strongest_first(neuron) -> list[int]:
    return np.argsort(-neuron.examples["activation"].to_numpy(), kind="stable").tolist()


def features_said(page) -> str:
    tile = page.locator(".neuron-figures > div").filter(has_text=re.compile("^Features"))
    return tile.locator("dd").inner_text()


def shown_examples(page) -> list[int]:
    found = page.locator(".feature-cards [data-e]")
    return found.evaluate_all("all => all.map(line => Number(line.dataset.e))")


class TestDamage:
    """Each file in turn: the page says which, shows the rest, and no script of it fails."""

    @pytest.fixture
    def damaged(self, tmp_path):
        def damaged(run, name):
            folder = shutil.copytree(run.path, tmp_path / "run")
            if name.endswith("parquet"):
                (folder / name).unlink()
                return folder, f"{name}: the file is missing"
            raw = (folder / name).read_bytes()
            (folder / name).write_bytes(raw[: len(raw) // 2])
            return folder, f"{name}: it has {len(raw) // 2} bytes, but run.json records {len(raw)}"

        return damaged

    @pytest.mark.parametrize("name", FILES)
    def test_texts(self, page, damaged, text_run, neuron, name):
        folder, problem = damaged(text_run, name)
        with ps.explore(folder, open_browser=False) as explorer:
            visit(page, explorer.url, TEXT_ADDRESS)
            assert problem in page.locator(".neuron-head .notice.bad").inner_text()
            page.get_by_role("region", name="Table of metrics").wait_for()
            m = neuron.metrics
            assert features_said(page) == str(m.n_clusters)
            words = page.locator("main").inner_text()
            lost = name in ("examples.parquet", "inputs.safetensors")
            assert ("The texts of this neuron's examples can't be read" in words) == lost
            assert (page.locator(".feature .kwic").count() == 0) == lost
            assert (page.locator(".dendrogram").count() == 0) == name.startswith("sites")
            # What is lost comes back with no click.
            for part in page.locator(".example-map .mark").all()[:1]:
                part.click(force=True)
            page.keyboard.press("j")
            page.locator("footer", has_text="altered").wait_for()
            page.locator("#altered", has_text=name).wait_for()

    @pytest.mark.parametrize("name", FILES)
    def test_images_exported(self, page, damaged, image_run, tmp_path, name):
        folder, problem = damaged(image_run, name)
        with pytest.warns(UserWarning, match=re.escape(problem)):
            site = ps.export(folder, tmp_path / "site", progress=False)
        with static_files(site) as url:
            visit(page, url, IMAGE_ADDRESS)
            assert problem in page.locator(".neuron-head .notice.bad").inner_text()
            page.get_by_role("region", name="Table of metrics").wait_for()
            lost = name in ("examples.parquet", "inputs.safetensors")
            words = page.locator("main").inner_text()
            assert ("The images of this neuron's examples can't be read" in words) == lost
            assert (page.locator(".feature-cards canvas").count() == 0) == lost
            reads = page.locator(".reads strong").all_inner_texts()
            assert ("Input weights" in reads) == (not name.endswith("safetensors"))
            page.locator("#altered", has_text=name).wait_for()


def test_a_run_as_it_was_written_is_verified(page, text_site):
    visit(page, text_site, TEXT_ADDRESS)
    page.locator("footer", has_text="verified: the run’s files are unchanged").wait_for()
    assert page.locator("#altered").inner_text() == ""


class TestAddress:
    @pytest.mark.parametrize(
        "asked",
        [
            {
                "threshold=0": "the threshold must be above 0 and at most 2",
                "feature=999": "the feature must be from 0 to",
                "example=20": "the example must be from 0 to 19; none is open",
                "order=best": "the order must be one of size, maximum, strongest",
                "shade=grey": "the shade must be one of activation, importance",
            },
            {
                "threshold=2.5": "the threshold must be above 0 and at most 2",
                "feature=-1": "the feature must be",
                "example=": "the example must be from 0 to 19; none is open",
            },
        ],
    )
    def test_a_notice_names_each_missing_choice(self, page, text, neuron, asked):
        visit(page, text, f"{TEXT_ADDRESS}?{'&'.join(asked)}")
        said = page.locator(".neuron-head .notice").all_inner_texts()
        assert len(said) == len(asked)
        for value, expected in asked.items():
            (sentence,) = (one for one in said if f"has {value}, but" in one)
            assert expected in sentence
        # The run's own cut is shown, and all of it.
        shared = sum(feature.n_examples > 1 for feature in neuron.features)
        assert page.locator(".feature-tab").count() == 1 + shared + (shared < len(neuron.features))
        assert page.locator(".feature").count() == page.locator(".feature-tab").count() - 1
        page.get_by_label("Exact threshold").fill("0.7")
        page.keyboard.press("Enter")
        arrive(page, "location.hash.includes('threshold=0.7')")
        assert page.locator(".neuron-head .notice").count() == 0

    def test_valid_choices_give_no_notice(self, page, text):
        visit(page, text, f"{TEXT_ADDRESS}?threshold=2&feature=0&example=19&order=maximum")
        page.locator(".context").wait_for()
        assert page.locator(".notice").count() == 0

    def test_a_card_has_an_address_of_its_own(self, page, text):
        visit(page, text, f"{TEXT_ADDRESS}?threshold=0.6")
        assert page.locator(".feature").count() > 1
        card = page.locator(".feature[data-feature='0']")
        shown = card.locator(".feature-size").inner_text()
        link = card.get_by_role("link", name="Link to feature 0")
        assert link.get_attribute("href") == f"{TEXT_ADDRESS}?threshold=0.6&feature=0"
        link.click()
        arrive(page, "location.hash.includes('feature=0')")
        assert page.locator(".feature").count() == 1
        assert card.locator(".feature-size").inner_text() == shown
        visit(page, text, f"{TEXT_ADDRESS}?threshold=0.001")
        link = page.get_by_role("link", name="Link to the single examples")
        assert link.get_attribute("href") == f"{TEXT_ADDRESS}?threshold=0.001&feature=singles"


class TestOrder:
    def test_the_strongest_examples_come_first_whatever_their_feature(self, page, text, neuron):
        visit(page, text, f"{TEXT_ADDRESS}?level=features")
        page.get_by_label("Order").select_option("strongest")
        arrive(page, "location.hash.includes('order=strongest')")
        assert shown_examples(page) == strongest_first(neuron)
        labels = neuron.recut(neuron.threshold).clustering.labels
        sizes = np.bincount(labels)
        marks = page.locator(".by-strength .line-mark").all_inner_texts()
        expected = [
            str(labels[example]) if sizes[labels[example]] > 1 else "single"
            for example in strongest_first(neuron)
        ]
        assert [mark.strip() for mark in marks] == expected
        page.get_by_label("Order").select_option("size")
        page.locator(".feature[data-feature]").first.wait_for()
        assert "order" not in query(page)

    def test_images_too(self, page, image, image_run):
        neuron = image_run.neuron(*IMAGE)
        visit(page, image, f"{IMAGE_ADDRESS}?order=strongest")
        assert shown_examples(page) == strongest_first(neuron)
        page.locator(".by-strength [data-e] button").last.click()
        page.locator(".example-detail").wait_for()

    def test_features_by_their_strongest_example(self, page, text, neuron):
        threshold = 0.8
        visit(page, text, f"{TEXT_ADDRESS}?threshold={threshold}&order=maximum")
        features = neuron.recut(threshold).features
        best = [feature.examples["activation"].max() for feature in features]
        single = [feature.n_examples == 1 for feature in features]
        order = []
        for number in sorted(range(len(features)), key=lambda number: -best[number]):
            name = "singles" if single[number] else str(number)
            order += [name] if name not in order else []
        tabs = page.locator(".feature-tab").evaluate_all("all => all.map(tab => tab.dataset.tab)")
        assert tabs == ["all", *order]
        cards = page.locator(".feature").evaluate_all(
            "all => all.map(card => card.dataset.feature ?? 'singles')"
        )
        assert cards == order
        page.keyboard.press("j")
        arrive(page, f"location.hash.includes('feature={order[0]}')")

    def test_a_fold_says_that_it_holds_the_strongest(self, page, image, image_run):
        """Found among neurons of a real run, either way."""
        for row in range(40):
            neuron = image_run.neuron("layers.0", row)
            if not neuron.features:
                continue
            sizes = np.bincount(neuron.examples["feature"])
            label = neuron.examples["feature"][neuron.examples["activation"].idxmax()]
            alone = sizes[label] == 1
            visit(page, image, f"#/neuron/0/{row}?level=features")
            folds = page.locator(".feature > details > summary").all_inner_texts()
            assert ("including the strongest example" in " ".join(folds)) == alone
            if alone:
                return
        raise AssertionError("no neuron's strongest example is a single")


class TestFewFeatures:
    def test_about_so_many(self, page, image, image_run):
        neuron = image_run.neuron(*IMAGE)
        visit(page, image, f"{IMAGE_ADDRESS}?level=features")
        for k in (5, 10, 20):
            page.get_by_role("button", name=f"About {k} features").click()
            arrive(page, "location.hash.includes('threshold')")
            threshold = float(query(page)["threshold"])
            assert len(neuron.recut(threshold).features) == k
            assert features_said(page) == str(k)

    def test_the_nearest_number_whatever_ties(self, page, text):
        """Against a search over all heights of trees with many equal distances."""
        rng = np.random.default_rng(5)
        cases = []
        for _ in range(200):
            n = int(rng.integers(3, 30))
            rows = rng.integers(-1, 2, size=(n, 3)) + (rng.random() < 0.5) * rng.random((n, 3))
            rows[:, 0] += 0.5
            tree = ps.cluster(rows, 0.5).tree
            k = int(rng.integers(2, n))
            made = np.unique([0, *(np.sum(tree[:, 2] < t) for t in [*tree[:, 2], 2.1])])
            possible = [n - int(m) for m in made if m >= np.sum(tree[:, 2] <= 0)]
            least = min(abs(p - k) for p in possible)
            cases.append(
                {
                    "nodes": tree[:, :2].astype(int).ravel().tolist(),
                    "heights": tree[:, 2].tolist(),
                    "n": n,
                    "k": k,
                    "least": least,
                }
            )
        visit(page, text, "#/about")
        found = page.evaluate(
            """async (cases) => {
                const { cut, thresholdFor } = await import("./static/recut.js");
                return cases.map(({ nodes, heights, n, k }) => {
                    const tree = {
                        nodes: Int32Array.from(nodes), heights: Float64Array.from(heights),
                    };
                    const threshold = thresholdFor(tree, n, k);
                    return [threshold, Math.max(...cut(tree, n, threshold)) + 1];
                });
            }""",
            cases,
        )
        assert any(case["least"] > 0 for case in cases)
        for case, (threshold, n) in zip(cases, found, strict=True):
            assert 0 < threshold <= 2
            assert abs(n - case["k"]) == case["least"], case


class TestTakingAway:
    def test_text_is_selected_without_opening_it(self, page, text):
        visit(page, text, f"{TEXT_ADDRESS}?threshold=2")
        after = page.locator(".line .kwic .after").first.bounding_box()
        y = after["y"] + after["height"] / 2
        page.mouse.move(after["x"] + 20, y)
        page.mouse.down()
        page.mouse.move(after["x"] + 80, y, steps=4)
        page.mouse.up()
        assert page.evaluate("getSelection().toString()") != ""
        assert page.locator(".context").count() == 0
        page.locator(".line .kwic").first.click(position={"x": 5, "y": 5})
        page.locator(".context").wait_for()

    def test_copying_lines_copies_their_text(self, page, text, neuron):
        visit(page, text, f"{TEXT_ADDRESS}?threshold=2")
        copied = page.evaluate(
            """() => {
                const lines = [...document.querySelectorAll(".line")].slice(0, 6);
                const range = document.createRange();
                range.setStart(lines[0], 0);
                range.setEndAfter(lines.at(-1).lastChild);
                getSelection().removeAllRanges();
                getSelection().addRange(range);
                const event = new ClipboardEvent("copy", {
                    clipboardData: new DataTransfer(), bubbles: true, cancelable: true,
                });
                lines[0].dispatchEvent(event);
                return event.clipboardData.getData("text/plain");
            }"""
        )
        best = neuron.examples.sort_values("activation", ascending=False, kind="stable").head(6)
        expected = "\n".join("".join(found.tokens) for found in neuron.texts(best))
        assert "\n" in expected.replace("\n", "", 5)
        assert copied == expected

    def test_a_context_is_copied(self, open_page, text, text_run, neuron):
        page = open_page(permissions=["clipboard-read", "clipboard-write"])
        visit(page, text, f"{TEXT_ADDRESS}?threshold=2&example=3")
        page.get_by_role("button", name="Copy text").click()
        page.get_by_role("button", name="Copied").wait_for()
        inputs = text_run.folder.inputs
        row = int(np.searchsorted(inputs["index"], neuron.examples["input"][3]))
        ids = inputs["tokens"][row, : int(inputs["lengths"][row])]
        expected = "".join(text_run.folder.token_texts.loc[ids])
        assert page.evaluate("navigator.clipboard.readText()") == expected

    def test_examples_of_text_are_saved(self, page, text_site, neuron):
        visit(page, text_site, f"{TEXT_ADDRESS}?threshold=0.8")
        with page.expect_download() as download:
            page.get_by_role("button", name="Save examples").click()
        assert download.value.suggested_filename.endswith("-model.layers.8.mlp-345.json")
        saved = json.loads(download.value.path().read_text("utf-8"))
        assert (saved["site"], saved["neuron"], saved["threshold"]) == (*TEXT, 0.8)
        assert saved["metrics"]["mean_distance"] == pytest.approx(neuron.metrics.mean_distance)
        cut = neuron.recut(0.8)
        examples = neuron.examples
        assert [e["feature"] for e in saved["examples"]] == cut.clustering.labels.tolist()
        for name in ("input", "position"):
            assert [e[name] for e in saved["examples"]] == examples[name].tolist()
        activations = np.array([e["activation"] for e in saved["examples"]], np.float32)
        np.testing.assert_array_equal(activations, examples["activation"].to_numpy(np.float32))
        for example, found in zip(saved["examples"], neuron.texts(examples), strict=True):
            assert example["tokens"] == list(found.tokens)
            assert example["token"] == found.centre
            np.testing.assert_allclose(example["activations"], found.activations, rtol=2e-3)

    def test_examples_of_images_are_saved(self, page, image, image_run):
        neuron = image_run.neuron(*IMAGE)
        visit(page, image, IMAGE_ADDRESS)
        with page.expect_download() as download:
            page.get_by_role("button", name="Save examples").click()
        saved = json.loads(download.value.path().read_text("utf-8"))["examples"]
        assert [e["input"] for e in saved] == neuron.examples["input"].tolist()
        assert [e["class_name"] for e in saved] == neuron.examples["label"].tolist()


def test_on_paper(open_page, text):
    page = open_page(color_scheme="dark")
    visit(page, text, f"{TEXT_ADDRESS}?threshold=2")
    page.emulate_media(media="print", color_scheme="dark")
    assert not page.locator("header.top").is_visible()
    assert not page.get_by_label("Threshold", exact=True).is_visible()
    assert page.locator(".line").first.is_visible()
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light"
    assert page.pdf().startswith(b"%PDF")


def test_a_name_from_right_to_left_stays_in_its_place(page, text):
    def renamed(route):
        run = route.fetch().json()
        run["sites"][0]["name"] = "שכבה 8"
        route.fulfill(json=run)

    page.route(re.compile(r"/data/0/run\.json$"), renamed)
    page.goto(f"{text}{TEXT_ADDRESS}")
    page.wait_for_selector(READY)
    name, slash, number = page.evaluate(
        """() => {
            const heading = document.querySelector("h1");
            return ["bdi", ".slash", null].map((part) => {
                const range = document.createRange();
                range.selectNode(part ? heading.querySelector(part) : heading.lastChild);
                return range.getBoundingClientRect().left;
            });
        }"""
    )
    assert name < slash < number
