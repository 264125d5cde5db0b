"""The frame of the pages, the overview, search and the page about the method, in a browser."""

from __future__ import annotations

import re
from urllib.parse import quote

import numpy as np
import pandas as pd
import pytest
from visiting import READY, arrive, visit

import polyseme as ps
from polyseme.data import digits
from polyseme.explorer.addresses import layer_of, site_addresses
from polyseme.explorer.root import STATIC
from polyseme.store import SiteInfo


def cells(page, row: int = 0) -> dict[str, str]:
    """One row of the table of neurons that is in view, by the columns' names."""
    names = page.locator(".rows thead button").all_inner_texts()
    line = page.locator(".rows tbody tr[data-at]").nth(row)
    return dict(
        zip(
            [name.strip(" ↑↓\n") for name in names],
            line.locator("th, td").all_inner_texts(),
            strict=True,
        )
    )


def as_table(card) -> list[list[str]]:
    """A chart's other form: its rows, each with its cells."""
    card.get_by_text("As a table").click()
    card.locator("tbody tr").first.wait_for()
    return [row.locator("th, td").all_inner_texts() for row in card.locator("tbody tr").all()]


def selected(page) -> int:
    return int(page.locator(".selection .result strong").inner_text().replace(",", ""))


def hash_of(page) -> str:
    return page.evaluate("location.hash")


@pytest.fixture(scope="module")
def sparse_run(classifier, tmp_path_factory):
    """The classifier's hidden neurons, some of which never reach the least activation selected."""
    return ps.analyse(
        classifier,
        digits().inputs(slice(0, 300)),
        sites="layers.0",
        select=ps.FirstActive(20, minimum=6.0),
        image_shape=(28, 28),
        panels=False,
        out=tmp_path_factory.mktemp("runs") / "sparse",
        progress=False,
    )


class TestOverview:
    def test_the_overview_describes_the_analysis(self, page, text_site, text_run):
        visit(page, text_site, "#/")
        assert page.locator("h1").inner_text() == "smollm2"
        facts = page.locator(".facts").inner_text()
        assert f"{text_run.metadata['model']['n_parameters']:,} parameters" in facts
        assert f"{text_run.metadata['data']['n_inputs']:,} contexts" in facts
        assert "the 20 strongest" in facts
        assert "average linkage, cut at a distance of 0.5" in facts
        stats = page.locator(".stats").inner_text()
        assert "3,072" in stats

    def test_the_table_holds_the_runs_metrics(self, page, image_site, image_run):
        visit(page, image_site, "#/")
        # The most meanings come first; of equally many the first neuron.
        neurons = image_run.neurons().sort_values("n_meanings", ascending=False, kind="stable")
        for row in (0, 5):
            shown, truth = cells(page, row), neurons.iloc[row]
            assert shown["Meanings"] == str(truth["n_meanings"])
            assert shown["Neuron"] == str(truth["neuron"])
            assert shown["Features"] == str(truth["n_clusters"])
            assert shown["Mean distance"] == f"{truth['mean_distance']:.3f}".replace("nan", "–")
            assert shown["Participation ratio"].startswith(f"{truth['participation_ratio']:.0f}")

    def test_sorting_is_in_the_address_and_goes_back(self, page, text_site, text_run):
        visit(page, text_site, "#/")
        page.get_by_role("button", name="Mean distance").click()
        arrive(page, "location.hash.includes('sort=-mean_distance')")
        neurons = text_run.neurons()
        most = neurons["mean_distance"].idxmax()
        number = dict(zip(text_run.sites, (8, 20), strict=True))[neurons["site"][most]]
        assert cells(page)["Neuron"] == f"{number}/{neurons['neuron'][most]}"
        assert page.locator("th[aria-sort=descending]").inner_text().startswith("Mean distance")
        page.get_by_role("button", name="Mean distance").click()
        arrive(page, "location.hash.includes('sort=mean_distance')")
        assert cells(page)["Mean distance"] == f"{neurons['mean_distance'].min():.3f}"
        page.go_back()
        page.go_back()
        arrive(page, "!location.hash.includes('sort')")
        most = neurons["n_meanings"].idxmax()
        number = dict(zip(text_run.sites, (8, 20), strict=True))[neurons["site"][most]]
        assert cells(page)["Neuron"] == f"{number}/{neurons['neuron'][most]}"

    def test_filters_select_as_pandas_does(self, page, text_site, text_run):
        visit(page, text_site, "#/?layer=20&n_clusters=5..12&mean_distance=..0.8")
        neurons = text_run.neurons()
        truth = neurons[
            (neurons["site"] == text_run.sites[1])
            & neurons["n_clusters"].between(5, 12)
            & (neurons["mean_distance"] <= 0.8)
        ]
        assert 0 < selected(page) == len(truth)
        assert page.locator(".rows table").get_attribute("aria-rowcount") == str(len(truth) + 1)
        page.get_by_label("Features from").fill("6")
        page.get_by_label("Features from").press("Enter")
        arrive(page, "location.hash.includes('n_clusters=6..12')")
        assert selected(page) == (truth["n_clusters"] >= 6).sum()
        page.get_by_role("button", name="Clear").click()
        arrive(page, "!location.hash.includes('n_clusters')")
        assert selected(page) == len(neurons)

    def test_the_selection_is_downloaded_as_pandas_reads_it(self, page, text_site, text_run):
        visit(page, text_site, "#/?layer=20&n_clusters=5..12&sort=-mean_distance")
        with page.expect_download() as download:
            page.get_by_role("button", name="Download CSV").click()
        assert download.value.suggested_filename == "smollm2-neurons.csv"
        found = pd.read_csv(download.value.path())
        truth = text_run.neurons().query("site == 'model.layers.20.mlp' and 5 <= n_clusters <= 12")
        truth = truth.set_index("neuron").loc[found["neuron"]].reset_index()
        assert 0 < len(found) == selected(page)
        assert found["mean_distance"].is_monotonic_decreasing
        for name in ("site", "n_examples", "n_clusters"):
            assert found[name].tolist() == truth[name].tolist()
        for name in ("mean_distance", "token_density", "intra_cluster_distance"):
            wanted = truth[name].to_numpy(np.float32)
            np.testing.assert_array_equal(found[name].to_numpy(np.float32), wanted)

    def test_a_neuron_without_examples_is_not_called_dead(self, page, serve, sparse_run):
        visit(page, serve("live", sparse_run), "#/")
        neurons = sparse_run.neurons()
        dead = int((neurons["density"] == 0).sum())
        unlisted = int(((neurons["density"] > 0) & (neurons["n_examples"] == 0)).sum())
        assert unlisted > 0
        stats = page.locator(".stats").inner_text().split("\n")
        assert stats[stats.index("Dead") + 1].split()[0] == str(dead)
        assert stats[stats.index("Without examples") + 1].split()[0] == str(unlisted)
        # A part of the bar selects its neurons: the first is that of the dead, if there are any.
        page.locator(".segment").nth(1 if dead else 0).click()
        arrive(page, "location.hash.includes('n_examples=..0')")
        assert selected(page) == unlisted

    def test_a_filter_is_added_and_refuses_words(self, page, image_site, image_run):
        visit(page, image_site, "#/")
        page.get_by_label("Add a filter by a metric").select_option("density")
        page.get_by_label("Density from").fill("a lot")
        page.get_by_label("Density from").press("Tab")
        assert page.get_by_label("Density from").get_attribute("aria-invalid") == "true"
        page.get_by_label("Density from").fill("0.5")
        page.get_by_label("Density from").press("Enter")
        arrive(page, "location.hash.includes('density=0.5..')")
        assert selected(page) == (image_run.neurons()["density"] >= 0.5).sum()

    def test_the_distribution_counts_each_neuron_once(self, page, text_site, text_run):
        visit(page, text_site, "#/?metric=n_clusters")
        card = page.locator(".card", has=page.get_by_role("heading", name="Distribution"))
        counts = [int(cells[-1].replace(",", "")) for cells in as_table(card)]
        assert sum(counts) == len(text_run.neurons())
        median = text_run.neurons()["n_clusters"].median()
        assert f"median {median:g}" in card.locator("svg").get_attribute("aria-label")

    def test_a_bin_selects_its_neurons(self, page, text_site):
        visit(page, text_site, "#/?metric=n_clusters")
        card = page.locator(".card", has=page.get_by_role("heading", name="Distribution"))
        counts = [int(cells[-1].replace(",", "")) for cells in as_table(card)]
        fullest = int(np.argmax(counts))
        card.locator("rect.zone").nth(fullest).click()
        arrive(page, "location.hash.includes('n_clusters=')")
        assert selected(page) == counts[fullest]

    def test_layers_are_drawn_by_their_numbers_of_meanings(self, page, text_site, text_run):
        visit(page, text_site, "#/")
        card = page.locator(".card", has=page.get_by_role("heading", name="Meanings by layer"))
        rows = as_table(card)
        neurons = text_run.neurons()
        head = card.locator("thead th").all_inner_texts()[1:]
        for row, name in enumerate(text_run.sites):
            meanings = neurons.loc[neurons["site"] == name, "n_meanings"]
            for label, count in zip(head, rows[row][1:], strict=True):
                low, high = re.fullmatch(r"(\d+)(?:–(\d+)| or more| meanings?)?", label).groups()
                top = high or (np.inf if "more" in label else low)
                assert int(count.replace(",", "")) == meanings.between(int(low), float(top)).sum()

    def test_the_map_is_zoomed_by_keys_and_leads_to_neurons(self, page, image_site):
        visit(page, image_site, "#/")
        canvas = page.locator(".scatter canvas")
        canvas.scroll_into_view_if_needed()
        page.wait_for_timeout(100)
        picture = "document.querySelector('.scatter canvas').toDataURL()"
        before = page.evaluate(picture)
        canvas.focus()
        canvas.press("+")
        page.wait_for_timeout(60)
        assert page.evaluate(picture) != before
        canvas.press("0")
        page.wait_for_timeout(60)
        assert page.evaluate(picture) == before
        x, y = canvas.evaluate(
            """canvas => {
                const box = canvas.getBoundingClientRect();
                for (let y = box.top + 30; y < box.bottom - 60; y += 6)
                    for (let x = box.left + 70; x < box.right - 20; x += 6) {
                        const at = {clientX: x, clientY: y};
                        canvas.dispatchEvent(new PointerEvent("pointermove", at));
                        if (canvas.classList.contains("on-point")) return [x, y];
                    }
            }"""
        )
        page.mouse.move(x, y)
        named = page.locator(".tip strong").inner_text()
        page.mouse.down()
        page.mouse.up()
        arrive(page, "location.hash.startsWith('#/neuron/')")
        assert hash_of(page) == f"#/neuron/0/{named.split(' / ')[1]}"

    def test_axes_of_the_map_are_in_the_address(self, page, image_site):
        visit(page, image_site, "#/?x=density&y=participation_ratio&colour=mean_distance")
        assert page.get_by_role("combobox", name="X axis").input_value() == "density"
        page.get_by_role("combobox", name="Y axis", exact=True).select_option("n_clusters")
        arrive(page, "location.hash.includes('y=n_clusters')")
        page.go_back()
        arrive(page, "location.hash.includes('y=participation_ratio')")
        assert (
            page.get_by_role("combobox", name="Y axis", exact=True).input_value()
            == "participation_ratio"
        )

    def test_few_rows_are_in_the_page_and_all_are_reached_by_keys(self, page, text_site, text_run):
        visit(page, text_site, "#/?sort=neuron")
        rows = page.locator(".rows tbody tr[data-at]")
        assert rows.count() < 60
        page.locator(".rows").focus()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowDown")
        focused = "document.activeElement.textContent"
        assert page.evaluate(focused) == "8/1"
        page.keyboard.press("End")
        assert page.evaluate(focused) == "20/1535"
        assert rows.count() < 60
        page.keyboard.press("ArrowUp")
        page.keyboard.press("Enter")
        arrive(page, "location.hash === '#/neuron/20/1534'")
        page.go_back()
        # Back at the table, the keyboard goes on from the row that it left by.
        page.wait_for_function(f"() => {focused} === '20/1534'")
        page.keyboard.press("ArrowUp")
        assert page.evaluate(focused) == "20/1533"
        page.get_by_role("link", name="About").click()
        arrive(page, "location.hash === '#/about'")
        page.get_by_role("link", name="Overview", exact=True).click()
        page.wait_for_selector(".rows")
        assert page.locator(":focus").evaluate("e => e.tagName") == "H1"

    def test_too_few_vectors_are_said(self, page, text_site, text_run):
        visit(page, text_site, "#/")
        n = text_run.metadata["sites"][0]["n_moments"]
        assert n < 1728
        words = (
            f"The statistics come from {n:,} vectors; numbers of meanings are reliable from about "
            "1,728."
        )
        said = page.get_by_label("Too few vectors").locator("li").all_inner_texts()
        assert said == [f"8 · {text_run.sites[0]}: {words}", f"20 · {text_run.sites[1]}: {words}"]

    def test_strange_parameters_are_passed_over(self, page, text_site, text_run):
        visit(
            page, text_site, "#/?layer=99&metric=<b>&sort=nothing&x=site&n_clusters=a..b&density=.."
        )
        assert selected(page) == 3072
        sentence = "There is no layer 99 in this run; it has layers 8 and 20."
        assert sentence in page.locator(".selection .result").inner_text()
        assert cells(page)["Meanings"] == str(text_run.neurons()["n_meanings"].max())


class TestFrame:
    def test_the_first_stop_of_the_keyboard_skips_to_the_content(self, page, text_site):
        visit(page, text_site, "#/")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "skip"
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "main"
        assert hash_of(page) in ("", "#/")

    def test_another_page_has_its_heading_focused_and_its_title(self, page, text_site):
        visit(page, text_site, "#/")
        page.get_by_role("navigation").get_by_role("link", name="About").click()
        page.wait_for_selector("h1:focus:text-is('About')")
        assert page.title() == "About · smollm2 · polyseme"
        current = page.locator("nav [aria-current=page]")
        assert current.all_inner_texts() == ["About"]
        page.go_back()
        page.wait_for_selector(".rows")
        assert page.title() == "smollm2 · polyseme"

    def test_the_theme_is_remembered(self, page, text_site):
        page.emulate_media(color_scheme="light")
        visit(page, text_site, "#/")
        paper = "getComputedStyle(document.documentElement).backgroundColor"
        light = page.evaluate(paper)
        page.get_by_role("button", name="Dark theme").click()
        dark = page.evaluate(paper)
        assert dark != light
        page.reload()
        page.wait_for_selector(READY)
        assert page.evaluate(paper) == dark
        page.get_by_role("button", name="Light theme").click()
        assert page.evaluate(paper) == light

    def test_luck_leads_to_a_neuron_with_several_features(self, page, text_site, text_run):
        visit(page, text_site, "#/")
        page.get_by_role("button", name="I’m feeling lucky").click()
        arrive(page, "location.hash.startsWith('#/neuron/')")
        _, _, site, neuron = hash_of(page).split("/")
        found = text_run.neuron(f"model.layers.{site}.mlp", int(neuron))
        assert found.metrics.n_clusters > 1

    @pytest.mark.parametrize(
        ("typed", "address"),
        [
            ("20/5", "#/neuron/20/5"),
            ("layer 20/5", "#/neuron/20/5"),
            ("model.layers.20.mlp/5", "#/neuron/20/5"),
            (" model.layers.8.mlp 17 ", "#/neuron/8/17"),
        ],
    )
    def test_a_neuron_is_found_by_what_it_is_called(self, page, text_site, typed, address):
        visit(page, text_site, "#/")
        page.keyboard.press("/")
        page.keyboard.type(typed)
        page.keyboard.press("Enter")
        arrive(page, f"location.hash === '{address}'")

    def test_a_search_for_a_missing_neuron_says_so(self, page, image_site):
        visit(page, image_site, "#/")
        page.get_by_label("Search for a neuron").fill("12/<b>9")
        page.get_by_label("Search for a neuron").press("Enter")
        page.wait_for_function(
            "() => document.querySelector('h1').textContent.startsWith('Search')"
        )
        assert (
            "“12/<b>9” is not a neuron or layer of this run." in page.locator("main").inner_text()
        )

    @pytest.mark.parametrize(
        ("address", "sentence"),
        [
            ("#/nothing", "There's no page “nothing”."),
            ("#/?run=7", "There is no run 7; runs are numbered 0 to 0."),
            ("#/?run=x", "There is no run x; runs are numbered 0 to 0."),
        ],
    )
    def test_a_wrong_address_is_explained(self, page, text_site, address, sentence):
        visit(page, text_site, address)
        assert sentence in page.locator(".notice").inner_text()
        page.get_by_role("link", name="Go to the overview").click()
        page.wait_for_selector(".rows")

    def test_about_holds_the_method_and_the_runs_settings(self, page, text_site):
        visit(page, text_site, "#/about")
        words = page.locator("main").inner_text()
        assert "arXiv:2411.08166" in words
        assert "Small distances alone do not make a neuron monosemantic." in words
        assert "model.layers.20.mlp" in words

    def test_a_stopped_server_is_said_to_be_one(self, browser, serve, image_run):
        page = browser.new_page()
        page.goto(f"{serve('live', image_run)}#/")
        page.wait_for_selector(READY)
        page.context.set_offline(True)
        for address in ("#/about", "#/neuron/0/11"):  # neither its module nor its data is here
            page.evaluate(f"location.hash = '{address}'")
            page.wait_for_selector(".notice.bad")
            sentence = "The explorer’s server has stopped. Start it again"
            assert sentence in page.locator(".notice.bad").inner_text()
        page.close()

    @pytest.mark.parametrize(
        ("names", "address"),
        [
            (["text_run"], "#/"),
            (["text_run"], "#/search?q=the"),
            (["text_run"], "#/neuron/8/3?level=features"),
            (["text_run"], "#/neuron/20/5?level=features&threshold=0.4"),
            (["image_run"], "#/neuron/0/11"),
            (["image_run"], "#/neuron/0/12?overlap=0.9"),
            (["two_runs"], "#/compare"),
        ],
    )
    def test_an_export_shows_what_the_server_shows(self, page, serve, request, names, address):
        runs = [request.getfixturevalue(name) for name in names]
        runs = runs[0] if isinstance(runs[0], list) else runs
        shown = []
        for mode in ("live", "exported"):
            visit(page, serve(mode, *runs), address)
            shown.append(page.locator("main").inner_text())
        assert shown[0] == shown[1]
        assert len(shown[0]) > 200

    def test_a_page_from_a_file_says_that_it_needs_a_server(self, browser, image_run, tmp_path):
        page = browser.new_page()
        page.goto((ps.export(image_run, tmp_path / "out", progress=False) / "index.html").as_uri())
        notice = page.get_by_role("alert")
        assert "run “python -m http.server --bind 127.0.0.1”" in notice.inner_text()
        assert "notice" in notice.get_attribute("class")
        page.close()

    @pytest.mark.parametrize("address", ["#/", "#/about", "#/search?q=the", "#/compare"])
    @pytest.mark.parametrize("theme", ["light", "dark"])
    def test_nothing_is_seriously_inaccessible(
        self, open_page, axe, serve, two_runs, address, theme
    ):
        page = open_page(color_scheme=theme)
        visit(page, serve("live", *two_runs), address)
        page.wait_for_timeout(200)
        assert axe(page) == []

    @pytest.mark.parametrize("width", [360, 1920])
    def test_no_page_is_wider_than_the_window(self, open_page, serve, two_runs, width):
        page = open_page(viewport={"width": width, "height": 800})
        for address in ("#/", "#/about", "#/compare", "#/search?q=0/1"):
            visit(page, serve("live", *two_runs), address)
            assert page.evaluate("document.documentElement.scrollWidth") <= width


class TestSearch:
    @pytest.fixture
    def labelled(self, text_run):
        """The largest feature with two plain words in its label: its address, and the words."""
        features = text_run.folder.features.sort_values("n_examples", ascending=False)
        for row in features.itertuples():
            words = re.findall(r"(?<!\S)[a-z]{4,}(?!\S)", row.label)
            if len(set(words)) > 1:
                layer = row.site.split(".")[2]
                return f"#/neuron/{layer}/{row.neuron}?feature={row.feature}", words[0], words[1]
        raise AssertionError("no label has two plain words")

    @pytest.fixture
    def hits(self, page):
        def hits() -> list[str]:
            links = page.locator(".hits tbody a").all()
            return [link.get_attribute("href") for link in links]

        return hits

    def test_a_word_of_a_label_finds_its_feature(self, page, text_site, labelled, hits):
        address, word, _ = labelled
        visit(page, text_site, "#/")
        page.get_by_label("Search for a neuron").fill(f" {word.upper()} ")
        page.get_by_label("Search for a neuron").press("Enter")
        page.wait_for_selector(".hits")
        assert address in hits()
        page.locator(f'.hits a[href="{address}"]').click()
        arrive(page, f"location.hash === '{address}'")
        page.go_back()
        page.wait_for_selector(".hits")
        assert page.get_by_label("Search for a neuron").input_value() == word.upper()

    def test_a_word_of_a_label_finds_its_meaning(self, page, text_site, text_run):
        neuron = text_run.neuron("model.layers.8.mlp", 345)
        word = next(
            word
            for meaning in neuron.meanings
            for word, n in meaning.counts.items()
            if n > 1 and word.isalpha()
        )
        visit(page, text_site, f"#/search?q={quote(word)}")
        table = page.locator(".card").filter(has_text=re.compile("meanings? for")).first
        rows = table.locator("tbody tr").all_inner_texts()
        assert 1 <= len(rows) <= 100
        # The address of one that a reader finds leads to it, under the label that was shown.
        link = table.locator("tbody a").first
        shown = table.locator("tbody tr").first.locator("td").nth(1).inner_text()
        assert word.lower() in shown.lower()
        _, _, layer, number = link.get_attribute("href").partition("?")[0].split("/")
        link.click()
        page.locator(".meaning details[open]").wait_for()
        found = text_run.neuron(f"model.layers.{layer}.mlp", int(number)).meanings
        assert shown in [other.label.partition("; near:")[0] for other in found]

    def test_two_words_narrow_the_search(self, page, text_site, labelled, hits):
        address, word, other = labelled
        visit(page, text_site, f"#/search?q={word}")
        alone = hits()
        visit(page, text_site, f"#/search?q={other}%20{word}")
        assert address in hits()
        assert set(hits()) <= set(alone)

    def test_words_that_no_feature_shares_are_offered_alone(self, page, text_site):
        page.goto(f"{text_site}#/search")
        words = page.evaluate(
            """async () => {
                const data = await import("./static/data.js");
                const run = await data.run(0);
                const { words, shards } = await data.vocabulary(run);
                const told = words.filter((word) => /^[a-z]{3,}$/.test(word)).slice(0, 60);
                const seen = new Map();
                for (const word of told) {
                    const shard = shards[words.indexOf(word)];
                    const kinds = ["meanings", "features"].map(async (kind) =>
                        (await data.wordHits(run, shard, word, kind))
                            .map((hit) => ({ ...hit, kind })));
                    seen.set(word, (await Promise.all(kinds)).flat());
                }
                const texts = (word) => seen.get(word).map((hit) => hit.label).join(" ");
                const key = (hit) => [hit.kind, hit.site, hit.neuron, hit.number].join();
                const of = (word) => seen.get(word).map(key);
                for (const one of told) for (const other of told) {
                    if (one >= other || of(one).some((hit) => of(other).includes(hit))) continue;
                    if (texts(one).includes(other) || texts(other).includes(one)) continue;
                    return [one, other];
                }
            }"""
        )
        visit(page, text_site, f"#/search?q={'%20'.join(words)}")
        assert (
            "No meaning or feature is listed for all of these words"
            in page.locator("main").inner_text()
        )
        assert page.locator(".notice a").all_inner_texts() == words
        page.locator(".notice a").first.click()
        page.wait_for_selector(".hits")

    def test_a_layer_narrows_the_search(self, page, text_site, labelled, hits):
        address, word, _ = labelled
        layer = address.split("/")[2]
        visit(page, text_site, f"#/search?q={word}&layer={layer}")
        assert address in hits()
        assert {hit.split("/")[2] for hit in hits()} == {layer}

    def test_the_beginning_of_a_word_finds_its_features(self, page, text_site, labelled, hits):
        address, word, other = labelled
        visit(page, text_site, f"#/search?q={word}%20{other[:-1]}")
        assert address in hits()
        assert f"for “{word}” and “{other[:-1]}" in page.locator(".card h2").last.inner_text()

    def test_a_word_that_is_unknown_is_said_to_be_left_out(self, page, text_site, labelled, hits):
        address, word, _ = labelled
        visit(page, text_site, f"#/search?q={word}%20qqxqq")
        assert "begins with “qqxqq”, so it is ignored" in page.locator(".notice").inner_text()
        assert address in hits()

    @pytest.mark.parametrize("typed", ["layer 20", "20", "layers.20"])
    def test_a_layer_is_found(self, page, text_site, typed):
        visit(page, text_site, f"#/search?q={typed}")
        link = page.get_by_role("link", name="20 · model.layers.20.mlp")
        assert link.get_attribute("href") == "#/?layer=20"

    def test_a_layer_that_is_missing_is_explained(self, page, text_site):
        visit(page, text_site, "#/search?q=12/345")
        sentence = "There is no layer 12 in this run; it has layers 8 and 20."
        assert sentence in page.locator(".notice").first.inner_text()

    def test_words_are_suggested_by_their_beginnings(self, page, text_site, labelled):
        _, word, _ = labelled
        visit(page, text_site, f"#/search?q={word[:-1]}")
        page.locator(".words a").get_by_text(word, exact=True).first.wait_for()
        page.get_by_label("Search for a neuron").fill(word[:-1])
        page.wait_for_function(
            "word => [...document.querySelectorAll('datalist option')]"
            ".some(option => option.value === word)",
            arg=word,
        )

    def test_markup_is_text(self, page, text_site):
        visit(page, text_site, "#/search?q=%3Cimg%20src%3Dx%3E")
        assert page.locator("h1").inner_text() == "Search: <img src=x>"
        assert page.locator("main img").count() == 0
        assert "No meaning or feature has “<img” and “src=x>”" in page.locator("main").inner_text()

    @pytest.mark.parametrize("address", ["#/", "#/search?q=the"])
    def test_nothing_is_seriously_inaccessible(self, page, axe, serve, text_run, address):
        visit(page, serve("live", text_run), address)
        page.wait_for_timeout(200)
        assert axe(page) == []


NAMES = ["encoder.3.fc", "decoder.3.fc", "layers.4.experts.0", "h.5", "شبكة", "fc"]


class TestLookup:
    """What readers type, in a run whose sites share layers or carry none."""

    @pytest.fixture
    def ask(self, page, serve, image_run):
        visit(page, serve("live", image_run), "#/about")
        addresses = site_addresses([SiteInfo(n, name, "", 9, 9) for n, name in enumerate(NAMES)])
        sites = [
            {"number": n, "name": name, "layer": layer_of(name), "address": address, "n_neurons": 9}
            for n, (name, address) in enumerate(zip(NAMES, addresses, strict=True))
        ]
        return lambda call: page.evaluate(
            f"""async (sites) => {{
                const lookup = await import("./static/lookup.js");
                const run = {{ sites, index: 0 }};
                return lookup.{call};
            }}""",
            sites,
        )

    def test_names_and_layers(self, ask):
        for typed, site in (
            ("5/8", 3),
            ("05/8", 3),
            ("decoder.3.fc:8", 1),
            ("layers.4.experts.0 8", 2),
            ("شبكة/8", 4),
        ):
            assert ask(f"findNeuron(run, '{typed}')") == {"site": site, "neuron": 8}, typed

    def test_a_miss_is_explained(self, ask):
        for typed, sentence in (
            ("3/8", "Layer 3 has 2 sites in this run; give the name of one: encoder.3.fc, decod"),
            ("4/8", "There is no layer 4 in this run; it has layers 3 and 5."),
            ("0/8", "There is no layer 0 in this run; it has layers 3 and 5."),
            ("5/9", "5 · h.5 has no neuron 9; its neurons are 0 to 8."),
            ("none/8", "There is no site “none” in this run; it has encoder.3.fc, decoder.3.fc"),
        ):
            assert ask(f"findNeuron(run, '{typed}')")["problem"].startswith(sentence), typed

    def test_words_are_no_neurons(self, ask):
        for typed in ("8", "bank 8", "bank", "", "3/", "5/8/x"):
            assert ask(f"findNeuron(run, '{typed}')") is None, typed

    def test_a_name_from_right_to_left_leaves_the_rest_in_order(self, ask):
        assert ask("neuronName(run, run.sites[4], 8)") == "\u2068شبكة\u2069/8"
        assert ask("neuronName(run, run.sites[0], 8)") == "encoder.3.fc/8"

    def test_ranges_of_layers(self, ask):
        names = "[1, 10, 11, 12, 14, 15].map((layer) => ({ name: `h.${layer}`, layer }))"
        sentence = ask(f"noSite({{ sites: {names} }}, '9')")
        assert sentence == "There is no layer 9 in this run; it has layers 1, 10 to 12, 14 and 15."

    def test_a_table_for_elsewhere_runs_no_formula(self, page, ask):
        text = page.evaluate(
            """async () => {
                const { csv } = await import("./static/csv.js");
                const values = Float32Array.of(0.1, 1 / 3, NaN, 2, 1e-30);
                const rows = Array.from(values, (value) => ["x", value]);
                return csv(["site", "a,b"], [["=1+1", 0.1], ['a "b"', 1 / 3], ...rows]);
            }"""
        )
        assert text.split("\r\n") == [
            *('site,"a,b"', "'=1+1,0.1", '"a ""b""",0.3333333333333333'),
            *("x,0.1", "x,0.33333334", "x,", "x,2", "x,1e-30", ""),
        ]


class TestModules:
    """The front end's own arithmetic against NumPy's, in the browser that runs it."""

    @pytest.fixture
    def ask(self, page, serve, image_run):
        visit(page, serve("live", image_run), "#/about")

        def ask(module: str, body: str, *arguments):
            return page.evaluate(
                f"async (given) => {{ const m = await import('./static/{module}.js'); {body} }}",
                list(arguments),
            )

        return ask

    @pytest.mark.parametrize(
        "dtype", ["u1", "i1", "<u2", "<i2", "<f2", "<u4", "<i4", "<f4", "<i8", "<u8", "<f8", "?"]
    )
    def test_every_dtype_of_safetensors_is_read(self, ask, dtype):
        from safetensors.numpy import save

        values = np.arange(24).reshape(2, 3, 4) % 7
        values = (values - 3 if np.dtype(dtype).kind in "if" else values).astype(dtype)
        if np.dtype(dtype).kind == "f":
            values = values / 3
        stored = save({"odd": np.zeros(3, np.uint8), "it": values.astype(dtype)}, {"a": "ü"})
        shape, read, note = ask(
            "safetensors",
            "const t = new m.Tensors(new Uint8Array(given[0]).buffer);"
            "return [t.shape('it'), [...t.array('it')].map(Number), t.metadata.a]",
            list(stored),
        )
        assert shape == [2, 3, 4]
        assert note == "ü"
        np.testing.assert_array_equal(read, values.astype(dtype).ravel().astype(float))

    def test_every_half_float_is_read(self, ask):
        from safetensors.numpy import save

        halves = np.arange(65536, dtype=np.uint16).view(np.float16)
        read = ask(
            "safetensors",
            "return [...new m.Tensors(new Uint8Array(given[0]).buffer).array('it')].map(String)",
            list(save({"it": halves})),
        )
        np.testing.assert_array_equal(np.array([float(x) for x in read]), halves.astype(np.float64))

    @pytest.mark.parametrize(
        ("damage", "sentence"),
        [
            (lambda b: b[:5], "a safetensors file has at least 8 bytes, this one has 5"),
            (lambda b: b[:20], "doesn't fit in a file of 20"),
            (lambda b: b[:-1], "it should have 4 values of 4 bytes, but has 16 bytes"),
        ],
    )
    def test_a_damaged_file_is_told(self, ask, damage, sentence):
        from safetensors.numpy import save

        stored = damage(save({"it": np.ones(4, np.float32)}))
        message = ask(
            "safetensors",
            "try { new m.Tensors(new Uint8Array(given[0]).buffer).array('it') }"
            " catch (error) { return error.message }",
            list(stored),
        )
        assert sentence in message

    @pytest.mark.parametrize("integer", [False, True])
    def test_bins_count_as_numpy_does(self, ask, integer):
        rng = np.random.default_rng(3)
        values = rng.integers(0, 90, 500) if integer else rng.normal(size=500)
        edges, counts, middle = ask(
            "scale",
            "const [lo, hi] = m.extent(given[0]);"
            "const edges = m.binEdges(lo, hi, {integer: given[1], n: 20});"
            "return [[...edges], [...m.binCounts(given[0], edges)], m.quantile(given[0], 0.5)]",
            [*values.tolist(), float("nan")],
            integer,
        )
        np.testing.assert_array_equal(counts, np.histogram(values, bins=edges)[0])
        assert middle == pytest.approx(np.median(values))
        if integer:
            assert all(edge % 1 == 0.5 for edge in edges)

    def test_ticks_are_round_and_within(self, ask):
        for lo, hi, log in ((0.37, 0.99, False), (-3, 18, False), (1e-4, 30, True), (5, 5, False)):
            ticks, low, high = ask(
                "scale",
                "const s = new m.Scale(given[0], given[1], 0, 100, given[2]); const t = s.ticks(5);"
                "return [t, s.value(0), s.value(100)]",
                lo,
                hi,
                log,
            )
            assert 2 <= len(ticks) <= 11
            assert all(low * (1 - 1e-9) - 1e-9 <= t <= high * (1 + 1e-9) + 1e-9 for t in ticks)


def test_no_text_can_become_markup():
    """Strings of a run are hostile: the front end only ever makes text nodes of them."""
    forbidden = re.compile(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|createContextualFragment"
        r"|srcdoc|\beval\(|new Function|javascript:"
    )
    modules = sorted(STATIC.rglob("*.js"))
    assert len(modules) > 10
    for module in modules:
        assert not forbidden.search(module.read_text()), module.name
