"""The pages that need a model, in a browser.

The functions are stand-ins here that answer in the form of the real ones, from the run's own
arrays, so that what a page makes of an answer is told apart from the answer.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
from visiting import arrive, query, visit

import polyseme as ps
from polyseme.errors import InputError

TEXT = "The river bank. <b>The</b> bank"
TOKENS = ["<|im_start|>", "The", " river", " bank", ".", " <", "b", ">The", "</", "b", "> bank"]


def probe(run, text):
    rows = [
        {
            "token": token,
            "site": rank % 2,
            "neuron": 10 * token + rank,
            "activation": 3.0 / (rank + 1),
            "share": None if rank == 3 else 0.9 / (rank + 1),
            "feature": -1 if rank == 1 else 0,
            "label": "" if rank == 1 else "<i>label</i>",
            "n_examples": 0 if rank == 1 else 12,
        }
        for token in range(1, len(TOKENS))
        for rank in range(4)
    ]
    left_out = [token == 0 for token in range(len(TOKENS))]
    return {"tokens": TOKENS, "left_out": left_out, "truncated": True, "active": rows}


def classify(run, pixels=None, index=None):
    inputs = run.folder.inputs
    label = None
    if index is None:
        image = np.asarray(pixels).reshape(28, 28)
    else:
        row = int(np.searchsorted(inputs["index"], index))
        if row == len(inputs["index"]) or inputs["index"][row] != index:
            raise InputError(f"The run does not hold input {index}. Give another number.")
        image, label = inputs["pixels"][row] / 255, int(inputs["labels"][row])
    logits = np.zeros(10)
    logits[label if label is not None else 1] = 4.0
    logits[7] = 2.0
    powers = np.exp(logits)
    contributions = np.outer([2.0, -1.0, 0.5], np.linspace(1, -1, 10))
    return {
        "pixels": np.round(image, 4).ravel().tolist(),
        "label": label,
        "predicted": int(logits.argmax()),
        "logits": logits.tolist(),
        "probabilities": (powers / powers.sum()).tolist(),
        "neurons": [
            {
                "site": 0,
                "neuron": number,
                "activation": 1.5,
                "share": 0.5,
                "contributions": row.tolist(),
                "feature": feature,
                "label": "7",
                "n_examples": 2,
            }
            for number, row, feature in zip((3, 11, 20), contributions, (0, -1, 0), strict=True)
        ],
        "totals": [
            {"site": 0, "active": 21, "contributions": contributions.sum(axis=0).tolist()},
        ],
        "method": "A contribution is a stand-in.",
    }


def importances(run, site, neuron, examples):
    width = sum(run.metadata["settings"]["window"]) + 1
    return {"importances": [[0.5] * (width - 1) + [None] for _ in examples]}


@pytest.fixture(scope="module")
def text_live(text_run):
    with ps.explore(
        text_run.path, open_browser=False, probe=probe, importances=importances
    ) as explorer:
        yield explorer.url


@pytest.fixture(scope="module")
def image_live(image_run):
    with ps.explore(image_run.path, open_browser=False, classify=classify) as explorer:
        yield explorer.url


class TestProbe:
    def ask(self, page, text=TEXT):
        page.get_by_label("Text", exact=True).fill(text)
        page.get_by_role("button", name="Probe", exact=True).click()

    def test_neurons_at_each_token(self, page, text_live):
        visit(page, text_live, "#/")
        page.get_by_role("link", name="Probe").click()
        self.ask(page)
        page.locator(".probe-tokens").wait_for()
        assert query(page) == {"q": TEXT}
        assert page.locator(".probe-tokens .t").all_text_contents() == TOKENS
        status = page.locator(".probe-status").inner_text()
        assert status.startswith("11 tokens")
        assert "Only the beginning of the text was read" in status
        # Without a chosen token, the strongest anywhere.
        shares = page.locator(".share-cell").all_inner_texts()
        assert len(shares) == 20
        assert shares[:10] == ["90%"] * 10
        page.locator(".probe-tokens .t").nth(3).click()
        assert query(page) == {"q": TEXT, "token": "3"}
        rows = page.locator(".probe-table tbody tr")
        assert rows.count() == 4
        assert "8/30" in rows.nth(0).inner_text()
        assert "<i>label</i>" in rows.nth(0).inner_text()
        assert "not close to any of its features" in rows.nth(1).inner_text()
        assert rows.nth(3).locator(".share-cell").inner_text() == "–"

    def test_bars_of_shares_over_100_per_cent(self, page, text_live):
        """They keep their proportions, within their frames; where 100% is, is marked."""

        def stronger(route):
            answer = route.fetch().json()
            for row in answer["active"]:
                row["share"] = row["share"] and 2 * row["share"]
            route.fulfill(json=answer)

        page.route(re.compile(r"/api/probe$"), stronger)
        visit(page, text_live, f"#/probe?q={TEXT}&token=3")
        cells = page.locator(".share-cell")
        cells.first.wait_for()
        assert cells.all_inner_texts() == ["180%", "90%", "60%", "–"]
        frames, bars = (
            [bar.bounding_box()["width"] for bar in page.locator(f".share-cell {part}").all()]
            for part in (".share", ".share > span")
        )
        shares = np.array(bars) / np.array(frames)
        np.testing.assert_allclose(shares, [1, 0.5, 1 / 3, 0], atol=0.02)
        assert cells.locator("i").count() == 1
        mark = cells.first.locator("i").bounding_box()["x"]
        start = cells.first.locator(".share").bounding_box()["x"]
        assert (mark - start) / frames[0] == pytest.approx(1 / 1.8, abs=0.02)

    def test_click_through_and_back(self, page, text_live):
        visit(page, text_live, f"#/probe?q={TEXT}&token=3")
        page.locator(".probe-table a").first.click()
        arrive(page, "location.hash === '#/neuron/8/30?feature=0'")
        page.locator(".neuron-figures").wait_for()
        page.go_back()
        page.locator(".probe-table tbody tr").first.wait_for()
        assert page.get_by_label("Text", exact=True).input_value() == TEXT
        assert page.locator(".probe-tokens .t[aria-selected=true]").text_content() == " bank"

    def test_the_keyboard_goes_along_the_text(self, page, text_live):
        visit(page, text_live, f"#/probe?q={TEXT}")
        page.locator(".probe-tokens .t").first.focus()
        page.keyboard.press("Enter")
        assert "leaves out tokens like this one" in page.locator(".probe-neurons").inner_text()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        assert query(page)["token"] == "2"
        assert page.locator(":focus").text_content() == " river"
        page.keyboard.press("Escape")
        assert "token" not in query(page)

    def test_one_neuron_shades_the_text(self, page, text_live):
        visit(page, text_live, f"#/probe?q={TEXT}&token=3")
        shaded = "cells => cells.filter(cell => /\\bs\\d/.test(cell.className)).length"
        cells = page.locator(".probe-tokens .t")
        cells.first.wait_for()
        assert cells.evaluate_all(shaded) == len(TOKENS) - 1
        page.locator(".probe-table tbody tr").first.hover()
        assert cells.evaluate_all(shaded) == 1

    def test_server_errors_are_shown(self, page, text_live):
        visit(page, text_live, "#/probe")
        # As the server answers, but for the status: browsers log a failure as an error.
        page.evaluate(
            """() => {
                const asked = window.fetch;
                window.fetch = async (...request) => {
                    const body = await (await asked(...request)).text();
                    const error = JSON.parse(body).tokens[3];
                    return { ok: false, status: 400, json: async () => ({ error }) };
                };
            }"""
        )
        self.ask(page)
        page.locator(".probe-status", has_text="bank").wait_for()
        assert page.locator(".probe-tokens").count() == 0
        assert page.get_by_role("button", name="Probe", exact=True).is_enabled()


class TestClassify:
    def test_drawing(self, page, image_live):
        visit(page, image_live, "#/")
        page.get_by_role("link", name="Classify").click()
        canvas = page.locator("canvas.sketch")
        box = canvas.bounding_box()

        def is_whole(answer):
            """What is asked about a stroke that is half drawn does not count."""
            if not answer.url.endswith("/api/classify"):
                return False
            pixels = np.array(answer.request.post_data_json["pixels"]).reshape(28, 28)
            return bool((pixels[20:] > 0.5).any())

        with page.expect_response(is_whole) as answer:
            page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 5)
            page.mouse.down()
            page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 4 * box["height"] / 5, steps=8)
            page.mouse.up()
        sent = np.array(answer.value.request.post_data_json["pixels"]).reshape(28, 28)
        assert sent.max() == 1
        assert sent.min() == 0
        rows, columns = np.nonzero(sent > 0.5)
        # A stroke from a fifth of the height to four fifths, in the middle.
        assert rows.min() in (3, 4, 5)
        assert rows.max() in (22, 23, 24)
        assert columns.min() >= 11
        assert columns.max() <= 16
        # e⁴ of e⁴ + e² + 8
        page.get_by_text("1, with probability 78%.").wait_for()
        page.get_by_role("button", name="Clear").click()
        assert page.locator(".class-row").count() == 0
        assert page.get_by_text("Draw something.").is_visible()

    def test_drawing_with_a_finger(self, open_page, image_live):
        page = open_page(has_touch=True, viewport={"width": 390, "height": 844})
        visit(page, image_live, "#/classify")
        with page.expect_response("**/api/classify") as answer:
            page.locator("canvas.sketch").tap()
        assert max(answer.value.request.post_data_json["pixels"]) > 0.5

    def test_an_input_of_the_run(self, page, image_live, image_run):
        inputs = image_run.folder.inputs
        number, label = int(inputs["index"][5]), int(inputs["labels"][5])
        visit(page, image_live, "#/classify")
        page.get_by_label("Input of the run", exact=True).fill(str(number))
        page.keyboard.press("Enter")
        page.get_by_text(f"Its class in the data is {label}.").wait_for()
        assert query(page) == {"input": str(number)}
        drawn = page.locator("canvas.sketch").evaluate(
            "c => Array.from(c.getContext('2d').getImageData(0, 0, 28, 28).data)"
        )
        drawn = np.array(drawn).reshape(28, 28, 4)[..., 0]
        assert np.abs(drawn - inputs["pixels"][5].astype(int)).max() <= 1
        assert page.locator(".class-row").count() == 10

    def test_neurons_of_a_class(self, page, image_live, image_run):
        number = int(image_run.folder.inputs["index"][0])
        visit(page, image_live, f"#/classify?input={number}")
        page.locator(".class-row[data-class='9']").click()
        assert query(page)["class"] == "9"
        assert "Neurons that matter for 9" in page.locator(".classify-neurons").inner_text()
        rows = page.locator(".contributor")
        assert [row.locator("a").inner_text() for row in rows.all()] == ["3", "11", "20"]
        assert "−2" in rows.nth(0).inner_text()
        assert "+1" in rows.nth(1).inner_text()
        assert "not close to any of its features" in rows.nth(1).inner_text()
        assert "21 active neurons add" in page.locator(".classify-neurons").inner_text()
        # The picture beside a neuron is the average of the feature.
        neuron = image_run.neuron("layers.0", 3)
        average = neuron.inputs(neuron.features[0].examples).mean(axis=0)
        canvas = rows.nth(0).locator("canvas")
        canvas.wait_for()
        shown = canvas.evaluate(
            "c => Array.from(c.getContext('2d').getImageData(0, 0, 28, 28).data)"
        )
        assert np.abs(np.array(shown).reshape(28, 28, 4)[..., 0] - average).max() <= 1
        rows.nth(0).locator("a").click()
        arrive(page, "location.hash.startsWith('#/neuron/0/3')")

    def test_a_digit_through_a_real_model(self, page, image_run, classifier):
        import torch

        from polyseme.analysis.live import live_classify

        live = live_classify(classifier)
        with ps.explore(image_run.path, open_browser=False, classify=live) as explorer:
            visit(page, explorer.url, "#/classify")
            canvas = page.locator("canvas.sketch")
            box = canvas.bounding_box()
            angles = np.linspace(0, 2 * np.pi, 24)
            places = np.stack([0.5 + 0.2 * np.sin(angles), 0.5 - 0.3 * np.cos(angles)], axis=1)
            places = places * [box["width"], box["height"]] + [box["x"], box["y"]]
            page.mouse.move(*places[0])
            page.mouse.down()
            for place in places[1:]:
                page.mouse.move(*place)
            page.mouse.up()
            drawn = canvas.evaluate(
                "c => Array.from(c.getContext('2d').getImageData(0, 0, 28, 28).data)"
            )
            data = image_run.metadata["data"]
            inputs = (np.array(drawn).reshape(784, 4)[:, 0] / 255 - data["mean"]) / data["std"]
            with torch.no_grad():
                hidden = torch.relu(classifier.layers[0](torch.tensor(inputs).float()))
                logits = classifier.layers[2](hidden)
            assert int(logits.argmax()) == 0
            # An unfinished drawing may have been answered before.
            page.wait_for_function(
                """logits => {
                    const rows = [...document.querySelectorAll('.class-row')];
                    return rows.length === logits.length && rows.every((row, c) => {
                        const text = row.lastChild.textContent.replace('−', '-');
                        const difference = Number(text.replace('logit', '')) - logits[c];
                        return Math.abs(difference) <= 0.01 * Math.abs(logits[c]) + 1e-3;
                    });
                }""",
                arg=logits.tolist(),
            )
            share = 100 * float(logits.softmax(dim=0)[0])
            said = page.get_by_text("0, with probability").inner_text()
            assert float(re.search(r"[\d.]+(?=%)", said)[0]) == pytest.approx(share, abs=0.51)
            # The last layer is linear, so what a neuron adds is its activation times its weight.
            added = (hidden * classifier.layers[2].weight[0]).detach().numpy()
            rows = page.locator(".contributor").all()
            assert len(rows) == 12
            assert {int(row.locator("a").inner_text()) for row in rows} == set(
                np.argsort(-np.abs(added))[:12].tolist()
            )
            for row in rows:
                shown = row.locator(".contributor-effect .num").inner_text().replace("−", "-")
                wanted = added[int(row.locator("a").inner_text())]
                assert float(shown) == pytest.approx(wanted, rel=0.01)
            active = int((hidden > 0).sum())
            assert f"{active} active neurons add" in page.locator(".classify-neurons").inner_text()

    def test_an_example_of_a_neuron_leads_here(self, page, image_live, image_run):
        visit(page, image_live, "#/neuron/0/11?example=0")
        page.locator(".example-detail").get_by_role("link", name="Classify").click()
        page.locator(".class-row").first.wait_for()
        number = int(image_run.neuron("layers.0", 11).examples["input"][0])
        assert query(page) == {"input": str(number)}

    def test_an_example_can_be_chosen_by_keyboard(self, page, image_live):
        visit(page, image_live, "#/classify")
        first = page.locator(".classify-choices .tile").first
        first.focus()
        page.keyboard.press("Enter")
        page.locator(".class-row").first.wait_for()
        assert query(page)["input"] == first.get_attribute("aria-label").removeprefix("Input ")


class TestImportances:
    def test_they_are_computed_on_demand(self, page, text_live):
        visit(page, text_live, "#/neuron/8/345?threshold=2&shade=importance")
        page.get_by_role("button", name="Compute them now").click()
        page.locator(".notice").wait_for(state="detached")
        # Half of the scale is the fifth of its ten shades.
        assert page.locator(".line").first.locator(".kwic .t.s5").count() > 5
        # They are kept for as long as the explorer is open.
        page.get_by_role("link", name="Next neuron").click()
        page.get_by_role("button", name="Compute them now").wait_for()
        page.go_back()
        page.locator(".line .kwic .t.s5").first.wait_for()


class TestWithoutAModel:
    @pytest.mark.parametrize("address", ["#/probe", "#/classify"])
    def test_the_page_says_what_it_needs(self, page, text_site, image_site, address):
        visit(page, text_site if address == "#/probe" else image_site, address)
        assert "polyseme explore RUN --model MODEL" in page.locator(".notice").inner_text()
        assert page.get_by_role("link", name="Probe").count() == 0
        assert page.get_by_role("link", name="Classify").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_they_are_accessible_and_fit(
    open_page, axe, text_live, image_live, image_run, scheme, width
):
    page = open_page(color_scheme=scheme, viewport={"width": width, "height": 900})
    number = int(image_run.folder.inputs["index"][0])
    for site, address, ready in (
        (text_live, f"#/probe?q={TEXT}&token=3", ".probe-table"),
        (image_live, f"#/classify?input={number}", ".contributor canvas"),
    ):
        visit(page, site, address)
        page.locator(ready).first.wait_for()
        assert axe(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") == width
