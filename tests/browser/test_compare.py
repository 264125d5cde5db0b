"""Two runs side by side, in a browser."""

from __future__ import annotations

import re

import pytest
from visiting import READY, arrive, visit


def figure(page, name: str) -> list[str]:
    """The values of one figure: of the first run, the second, and their difference."""
    row = page.locator(".compare tr", has=page.get_by_text(name, exact=True))
    return [cell.split("\n")[0] for cell in row.locator("td").all_inner_texts()]


def shown_pair(page) -> tuple[int, int]:
    links = page.locator(".brief h3 a").all_inner_texts()
    return tuple(int(link.rsplit(" ", 1)[1]) for link in links)


def test_figures_are_those_of_the_runs(page, two_site, two_runs):
    visit(page, two_site, "#/compare")
    assert page.locator("h1").inner_text() == "standard and ne"
    for column, name in (("mean_distance", "Mean distance"), ("max_distance", "Max distance")):
        means = [run.neurons()[column].mean() for run in two_runs]
        one, other, difference = figure(page, name)
        assert [one, other] == [f"{mean:.3f}" for mean in means]
        assert float(difference.replace("−", "-")) == pytest.approx(means[1] - means[0], abs=6e-4)
    l0 = [run.neurons()["density"].sum() for run in two_runs]
    shown = figure(page, "L0")
    assert shown[:2] == [f"{value:.1f}" for value in l0]


def test_a_mean_over_fewer_neurons_says_over_how_many(page, two_site, two_runs):
    visit(page, two_site, "#/compare")
    row = page.locator(".compare tr", has=page.get_by_text("Inter-cluster distance", exact=True))
    for cell, run in zip(row.locator("td").all_inner_texts(), two_runs, strict=False):
        neurons = run.neurons()
        n = neurons["inter_cluster_distance"].notna().sum()
        assert n < len(neurons)
        assert f"of {n:,}" in cell


def test_distributions_overlay_both_runs(page, two_site, two_runs):
    visit(page, two_site, "#/compare")
    card = page.locator(".card", has=page.get_by_role("heading", name="Distributions"))
    assert card.locator("path.outline").count() == 2
    card.get_by_label("Metric").select_option("participation_ratio")
    arrive(page, "location.hash.includes('metric=participation_ratio')")
    card.get_by_text("As a table").click()
    card.locator("tbody tr").first.wait_for()
    lines = [line.split() for line in card.locator("tbody tr").all_inner_texts()]
    for at, run in enumerate(two_runs):
        assert sum(int(line[2 + at]) for line in lines) == len(run.neurons())


def test_pairs_are_browsed(page, two_site):
    visit(page, two_site, "#/compare")
    rows = page.locator(".rows tbody tr[data-at]")
    similarities = [float(row.split()[2]) for row in rows.all_inner_texts()]
    assert similarities == sorted(similarities, reverse=True)
    first = shown_pair(page)
    assert rows.nth(0).inner_text().split()[:2] == [str(number) for number in first]
    assert page.get_by_role("button", name="Previous").is_disabled()
    page.get_by_role("button", name="Next").click()
    arrive(page, "location.hash.includes('pair=')")
    page.wait_for_function(
        "before => !document.querySelector('.brief h3 a').textContent.endsWith(' ' + before)",
        arg=first[0],
    )
    second = shown_pair(page)
    assert rows.nth(1).inner_text().split()[:2] == [str(number) for number in second]
    assert rows.nth(1).get_attribute("aria-current") == "true"
    page.go_back()
    page.wait_for_function(
        "before => document.querySelector('.brief h3 a').textContent.endsWith(' ' + before)",
        arg=first[0],
    )


def test_a_pair_has_an_address_and_leads_to_both_neurons(page, two_site, two_runs):
    visit(page, two_site, "#/compare?pair=7&sort=change")
    one, other = shown_pair(page)
    assert one == 7
    links = [link.get_attribute("href") for link in page.locator(".brief h3 a").all()]
    assert links == ["#/neuron/sae/7", f"#/neuron/sae/{other}?run=1"]
    briefs = page.locator(".brief").all_inner_texts()
    for number, run, brief in zip((one, other), two_runs, briefs, strict=True):
        neuron = run.neuron("sae", number)
        n = int(neuron.metrics.n_clusters)
        expected = rf"{n} features? of {len(neuron.examples)} examples?" if n else "Dead|Without"
        assert re.search(expected, brief)


def test_the_best_match_is_the_most_similar_neuron(page, two_site, two_runs):
    """By the vectors that the runs hold, read apart from the explorer."""
    from polyseme.core.distances import unit_rows

    visit(page, two_site, "#/compare?pair=7")
    names = [
        "decoder" if all("decoder" in run.folder.site(0) for run in two_runs) else "weights"
    ] * 2
    one, other = (unit_rows(run.folder.site(0)[n]) for run, n in zip(two_runs, names, strict=True))
    assert shown_pair(page)[1] == int((other @ one[7]).argmax())


def test_every_column_of_the_pairs_is_in_sight(open_page, serve, two_runs):
    page = open_page(viewport={"width": 1440, "height": 900})
    visit(page, serve("live", *two_runs), "#/compare")
    assert page.locator(".pairs .rows").evaluate("box => box.scrollWidth <= box.clientWidth")
    page.locator(".brief").first.wait_for()


def test_unlike_runs_say_so(page, serve, image_run, two_runs):
    visit(page, serve("live", image_run, two_runs[0]), "#/compare")
    notices = page.locator(".notice").all_inner_texts()
    assert notices[0].startswith("These runs also differ in the selection of examples")
    assert notices[1].startswith("No neuron has a match, because only vectors of the same length")


def test_one_run_has_nothing_to_compare(page, image_site):
    page.goto(f"{image_site}#/compare")
    page.wait_for_selector(READY)
    assert "There’s only one run here" in page.locator(".notice").inner_text()
    assert page.get_by_role("link", name="Compare").count() == 0
