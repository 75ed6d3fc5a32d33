"""The page in a real browser, before the real application: what a scientist does with it."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sbi_dist.estimation.bundle import OUT_OF_DISTRIBUTION, save_bundle
from sbi_dist.estimation.loop import fit
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.estimation.out_of_distribution import OutOfDistribution
from sbi_dist.posterior import Posterior
from sbi_dist.posterior.posterior import PROMOTED
from sbi_dist.priors import BoxUniform, prior_to_data
from sbi_dist.serving.app import make_app
from sbi_dist.serving.options import ServeOptions
from sbi_dist.serving.service import Service
from sbi_dist.store import LocalStore

LAPTOP, PHONE = (1366, 768), (390, 844)
NAMES = ["amplitude", "<img src=x onerror=window.hacked=1>", "Γ, width"]
VERDICT = {"verdict": "warn", "summary": "ranks of <b>width</b> are uneven (p = 0.02)"}
X = [[0.5, -0.25, 1.0], [-1.5, 1.75, 0.125], [0.0, 0.0, 0.0]]
TOKEN = "a-token-that-is-right"


def pasted(rows: list[list[float]]) -> str:
    return "\n".join(", ".join(map(str, row)) for row in rows)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> LocalStore:
    """A promoted model of x = theta + noise, another one, and a damaged one."""
    rng = np.random.default_rng(0)
    theta = rng.uniform(-2, 2, (1000, 3)).astype(np.float32)
    x = theta + np.float32(0.3) * rng.standard_normal((1000, 3), dtype=np.float32)
    bounds = np.full(3, -2.0), np.full(3, 2.0)
    options = TrainOptions(transforms=2, hidden_features=16, blocks=1, bins=6, max_epochs=6)
    estimator, _ = fit(theta[:800], x[:800], bounds, options)
    reference = OutOfDistribution.fit(estimator, *map(torch.from_numpy, (x[:800], x[800:])))
    about = {
        "experiment": "noise <i>&amp;",
        "prior": prior_to_data(BoxUniform([-2.0] * 3, [2.0] * 3)),
        "parameter_names": NAMES,
        "parameter_units": ["m/s", "", ""],
        "created": "2026-01-02T03:04:05+00:00",
        "calibration": VERDICT,
        "dataset": {"id": "d1", "snapshot": "s1", "round": 1},
        OUT_OF_DISTRIBUTION: reference.to_data(),
    }
    store = LocalStore(tmp_path_factory.mktemp("experiment"))
    save_bundle(store.child("models/bbbb"), estimator, about)
    save_bundle(store.child("models/aaaa"), estimator, {**about, "calibration": None})
    store.child("models/cccc").put("bundle.json", b"{}")
    store.put(PROMOTED, b'{"model": "bbbb"}')
    return store


@pytest.fixture(scope="module")
def posterior(experiment) -> Posterior:
    return Posterior.load(experiment.uri)


def drawn(posterior: Posterior, x: Any, count: int, seed: int) -> np.ndarray:
    return posterior.draws(torch.tensor(x, dtype=torch.float32), count, seed)[0].numpy()


@pytest.fixture(scope="module")
def url(experiment) -> Iterator[str]:
    from tests.services.browser import serving

    options = ServeOptions(max_draws=20_000, max_total_draws=40_000)
    with serving(make_app(Service(experiment, "test", options))) as address:
        yield address


@pytest.fixture
def visit(browser: Any, url: str) -> Iterator[Callable[..., Any]]:
    """Open a page; that nothing went wrong on it is looked at in the end."""
    from tests.services.browser import Visit

    visits: list[tuple[Any, tuple[str, ...]]] = []

    def opened(*allowed: str, size: tuple[int, int] = LAPTOP, at: str = url, **options: Any) -> Any:
        visits.append((Visit(browser, at, size, **options), allowed))
        return visits[-1][0]

    yield opened
    for each, allowed in visits:
        each.close(*allowed)


# ---- models -------------------------------------------------------------------------------------


def test_models(visit) -> None:
    """Names that are markup stay text."""
    seen = visit("409")
    page = seen.open()
    cards = page.locator(".model").all()
    assert [card.locator(".mono").inner_text() for card in cards] == ["bbbb", "aaaa", "cccc"]
    assert "Promoted" in cards[0].inner_text() and "Promoted" not in cards[1].inner_text()
    assert page.locator(".model .badge.warn").inner_text() == "Calibration warning"
    facts = page.locator("#about").inner_text()
    for fact in (*NAMES, VERDICT["summary"], "noise <i>&amp;", "d1", "uniform on [−2, 2]", "NSF"):
        assert fact in facts
    assert "amplitude [m/s]" in facts and "2 Jan 2026" in facts
    cards[1].click()
    page.locator("#about .badge.none").wait_for()
    assert page.locator("#about dd").first.inner_text() == "aaaa"

    cards[2].click()  # refused, which shows when it is loaded
    page.get_by_role("alert").get_by_text("Model refused").wait_for()
    refused = page.locator(".model.refused")
    assert "cccc" in refused.inner_text() and "weights.safetensors" in refused.inner_text()
    assert page.get_by_role("radio", name="cccc").is_disabled()
    assert page.get_by_role("radio", name="aaaa").is_checked()
    assert page.evaluate("window.hacked") is None


# ---- draws --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [LAPTOP, PHONE], ids=["laptop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_draws_are_those_of_the_posterior(visit, posterior, tmp_path, size, scheme) -> None:
    seen = visit(size=size, color_scheme=scheme)
    page = seen.open()
    seen.sample(pasted(X), draws=2000, seed=7)
    expected = drawn(posterior, X, 2000, 7).astype(np.float64)
    for i in range(3):
        if i:
            page.get_by_role("button", name="Next ›").click()
            seen.shown()
        assert page.locator("#results-title").inner_text() == f"Posterior for observation {i + 1}"
        table = np.array(seen.table())
        np.testing.assert_allclose(table[:, 0], expected[i].mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(table[:, 1], expected[i].std(0, ddof=1), rtol=1e-4)
        quantiles = np.quantile(expected[i], [0.05, 0.5, 0.95], axis=0)
        np.testing.assert_allclose(table[:, 2:5].T, quantiles, rtol=1e-4, atol=1e-5)
    page.get_by_role("button", name="‹ Previous").click()
    assert page.locator("#results-title").inner_text() == "Posterior for observation 2"
    page.get_by_label("Observation, 1 to 3").fill("1")
    page.keyboard.press("Enter")
    assert page.locator("#results-title").inner_text() == "Posterior for observation 1"
    assert page.evaluate("document.documentElement.scrollWidth") == size[0]
    # What is drawn on the canvas has the posterior's colour somewhere, and the frame's size.
    colours = page.locator("#results canvas").evaluate(
        """(canvas) => {
          const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
          const seen = new Set();
          for (let i = 0; i < data.length; i += 4) seen.add(`${data[i]},${data[i+1]},${data[i+2]}`);
          return seen.size;
        }"""
    )
    assert colours > 20
    page.screenshot(path=tmp_path / "page.png", full_page=True)


def test_one_observation_of_one_row(visit, posterior) -> None:
    seen = visit()
    page = seen.open()
    seen.sample(json.dumps(X[0]), draws=100)
    assert page.locator("#results-title").inner_text() == "Posterior"
    assert not page.get_by_role("navigation").is_visible()
    assert "like the simulations" in page.locator("#results").inner_text()
    np.testing.assert_allclose(
        [row[0] for row in seen.table()], drawn(posterior, X[:1], 100, 0)[0].mean(0), rtol=1e-4
    )


def test_observations_with_a_warning(visit) -> None:
    """One that is missing a number, and one unlike the simulations; the others are not touched."""
    seen = visit()
    page = seen.open()
    seen.sample("id,a,b,c\nstar,0,0,0\nhole,0,nan,0\nfar,0,40,0\nlast,1,1,1", draws=100)
    results = page.locator("#results")
    assert "4 observations, 1 without draws, 1 unlike the simulations." in results.inner_text()
    assert "Posterior for star" in results.inner_text()
    warned = page.get_by_role("button", name="Next with a warning")
    warned.click()
    assert "Posterior for hole" in results.inner_text()
    assert "numbers that are missing or not finite, so nothing was drawn" in results.inner_text()
    assert not page.locator("#results canvas").is_visible()
    assert page.get_by_role("button", name="Plot as PNG").is_disabled()
    warned.click()
    seen.shown()
    assert "Posterior for far" in results.inner_text()
    assert "unlike the simulations that the model was trained on (p = 0.0" in results.inner_text()
    assert page.locator("#results canvas").is_visible()


def test_many_observations_come_in_pieces(visit, posterior) -> None:
    """More than a request may ask for."""
    x = np.random.default_rng(0).uniform(-2, 2, (130, 3)).round(3).tolist()
    seen = visit()
    page = seen.open()
    seen.sample(pasted(x), draws=1000, seed=3)
    asked = [url for url in seen.asked if url.endswith("/sample")]
    assert len(asked) == 4  # of 40,000 draws at most
    assert page.get_by_role("status").inner_text().startswith("130,000 draws in")
    page.get_by_label("Observation, 1 to 130").fill("117")
    page.keyboard.press("Enter")
    seen.shown()
    expected = drawn(posterior, x[116:117], 1000, 3)[0].mean(0)
    np.testing.assert_allclose([row[0] for row in seen.table()], expected, rtol=1e-4, atol=1e-5)


def test_true_parameters(visit) -> None:
    seen = visit()
    page = seen.open()
    page.get_by_text("True parameters, if known").click()
    page.fill("#truth", "0.5 -0.5 1.5")
    seen.sample(pasted(X[:2]))
    assert [row[5] for row in seen.table()] == [0.5, -0.5, 1.5]
    page.fill("#truth", "1 1 1\n0.25 0.5 0.75")
    seen.sample(pasted(X[:2]))
    page.get_by_role("button", name="Next ›").click()
    seen.shown()
    assert [row[5] for row in seen.table()] == [0.25, 0.5, 0.75]
    page.fill("#truth", "1 1 1\n1 1 1\n1 1 nan")
    for problem in ("row 3, column 3: “nan” is not finite.",):
        page.locator("#truth-state").get_by_text(problem).wait_for()
    page.fill("#truth", "1 1 1\n1 1 1\n1 1 1")
    page.locator("#truth-state").get_by_text("3 rows of true parameters for 2 observ").wait_for()


# ---- what cannot be sampled ---------------------------------------------------------------------


def test_mistakes_are_told_and_nothing_is_asked(visit) -> None:
    seen = visit()
    page = seen.open()
    sample = page.get_by_role("button", name="Sample")
    for text, problem in [
        ("", "Paste at least one observation"),
        ("1,2,3\n1,b,3", "Row 2, column 2: “b” is not a number."),
        ("1,2,3\n1,2", "Row 2 has 2 numbers; 3 are needed."),
    ]:
        page.fill("#observations", text)
        sample.click()
        assert problem in page.locator("#observations-state").inner_text()
        assert page.evaluate("document.activeElement.id") == "observations"
        assert page.locator("#observations").get_attribute("aria-invalid") == "true"
    page.fill("#observations", "\n".join(["x,1,2"] * 9))
    page.locator("#observations-state").get_by_text("And 5 more such problems.").wait_for()
    page.fill("#observations", pasted(X))
    for field, value, problem in [
        ("draws", "1", "Draws of each: a whole number, 2 to 20,000."),
        ("draws", "20001", "Draws of each: a whole number, 2 to 20,000."),
        ("draws", "10.5", "Draws of each: a whole number, 2 to 20,000."),
        ("draws", "", "Draws of each: a whole number, 2 to 20,000."),
        ("seed", "-1", "Seed: a whole number, 0 or more."),
        ("seed", "9007199254740993", "Seed: a whole number, 0 or more."),
    ]:
        good = page.locator(f"#{field}").input_value()
        page.fill(f"#{field}", value)
        sample.click()
        assert page.locator(f"#{field}-state").inner_text() == problem
        assert page.evaluate("document.activeElement.id") == field
        page.fill(f"#{field}", good)
    page.fill("#observations", pasted([X[0]] * 1000))
    page.fill("#draws", "20000")
    sample.click()
    assert "at most 833 observations" in page.locator("#draws-state").inner_text()
    assert not [url for url in seen.asked if url.endswith(("/sample", "/summary"))]


def test_template(visit) -> None:
    seen = visit()
    page = seen.open()
    page.get_by_role("button", name="Insert a template").click()
    assert page.locator("#observations").input_value() == "x_1, x_2, x_3\n0, 0, 0\n"
    assert "1 observation of 3 numbers." in page.locator("#observations-state").inner_text()
    page.get_by_role("button", name="Clear").click()
    assert page.locator("#observations-state").inner_text() == ""


# ---- files --------------------------------------------------------------------------------------


def test_files(visit, posterior, tmp_path) -> None:
    (tmp_path / "a.csv").write_text("x_1,x_2,x_3\n" + pasted(X))
    (tmp_path / "b.json").write_text(json.dumps({"x": X}))
    np.save(tmp_path / "c.npy", np.array(X))
    seen = visit()
    page = seen.open()
    expected = drawn(posterior, X[:1], 100, 0)[0].mean(0)
    page.fill("#draws", "100")
    for name in ("a.csv", "b.json", "c.npy"):
        page.set_input_files("#file", tmp_path / name)
        page.locator("#file-name").get_by_text(name).wait_for()
        page.locator("#observations-state").get_by_text("3 observations of 3 numb").wait_for()
        page.get_by_role("button", name="Sample").click()
        seen.shown()
        np.testing.assert_allclose([row[0] for row in seen.table()], expected, rtol=1e-4)
        page.get_by_role("button", name="Remove").click()
        assert page.locator("#observations").is_visible()


def test_files_that_are_not_read(visit, tmp_path) -> None:
    seen = visit()
    page = seen.open()
    before = len(seen.asked)
    for name, content, problem in [
        ("catalog.parquet", b"PAR1....PAR1", "Parquet files are not read on this page"),
        ("renamed.csv", b"PAR1\x00\x01", "Parquet files are not read on this page"),
        ("picture.csv", b"\x89PNG\x00\x00", "This file is not text."),
        ("empty.csv", b"", "The file is empty."),
        ("broken.npy", b"\x93NUMPY\x01\x00", "The file cannot be read: this is not a .npy file."),
        ("text.csv", b"1,2,3\n4,x,6", "Row 2, column 2: “x” is not a number."),
    ]:
        (tmp_path / name).write_bytes(content)
        page.set_input_files("#file", tmp_path / name)
        page.locator("#observations-state").get_by_text(problem).wait_for()
        page.get_by_role("button", name="Sample").click()
    assert len(seen.asked) == before


# ---- downloads ----------------------------------------------------------------------------------


def test_downloads(visit, posterior) -> None:
    seen = visit()
    page = seen.open()
    seen.sample(pasted(X), draws=500, seed=11)
    page.get_by_role("button", name="Next ›").click()
    seen.shown()
    expected = drawn(posterior, X, 500, 11)

    name, data = seen.download("NumPy .npy")
    assert re.fullmatch(r"[\w.+-]+-bbbb-2-seed11\.npy", name)
    found = np.load(io.BytesIO(data))
    assert found.dtype == np.float32 and found.tobytes() == expected[1].tobytes()

    _, data = seen.download("CSV")
    lines = data.decode().splitlines()
    assert lines[0] == 'observation_id,amplitude,<img src=x onerror=window.hacked=1>,"Γ, width"'
    assert len(lines) == 501 and all(line.startswith("2,") for line in lines[1:])
    found = np.array([line.split(",")[1:] for line in lines[1:]]).astype(np.float32)
    assert found.tobytes() == expected[1].tobytes()

    _, data = seen.download("JSON")
    content = json.loads(data)
    assert content["model"] == "bbbb" and content["parameter_names"] == NAMES
    assert (content["num_samples"], content["seed"]) == (500, 11)
    (observation,) = content["observations"]
    assert observation["x"] == X[1] and observation["status"] == "ok"
    assert np.float32(observation["draws"]).tobytes() == expected[1].tobytes()

    name, data = seen.download("Plot as PNG")
    assert name.endswith(".png") and data.startswith(b"\x89PNG")
    assert int.from_bytes(data[16:20]) > 1000

    page.get_by_label("Draws of", exact=True).select_option("all")
    _, data = seen.download("NumPy .npy")
    assert np.load(io.BytesIO(data)).tobytes() == expected.tobytes()
    _, data = seen.download("CSV")
    ids = [line.split(",")[0] for line in data.decode().splitlines()[1:]]
    assert ids == ["1"] * 500 + ["2"] * 500 + ["3"] * 500


def test_downloads_of_what_was_not_drawn(visit, posterior) -> None:
    seen = visit()
    page = seen.open()
    seen.sample("0,0,0\n0,nan,0\n1,1,1", draws=50)
    page.get_by_label("Draws of", exact=True).select_option("all")
    expected = drawn(posterior, [[0.0] * 3, [1.0] * 3], 50, 0)
    found = np.load(io.BytesIO(seen.download("NumPy .npy")[1]))
    np.testing.assert_array_equal(found[[0, 2]], expected)
    assert np.isnan(found[1]).all()
    content = json.loads(seen.download("JSON")[1])
    assert [each["status"] for each in content["observations"]] == ["ok", "null", "ok"]
    assert content["observations"][1]["draws"] is None
    assert content["observations"][1]["x"] == [0, None, 0]


# ---- the same again -----------------------------------------------------------------------------


def test_command_that_repeats_it(visit, posterior) -> None:
    seen = visit()
    page = seen.open()
    seen.sample(pasted(X), draws=20, seed=5)
    command = page.locator("#results pre").inner_text()
    if shutil.which("curl") is None:
        pytest.skip("there is no program curl")
    done = subprocess.run(command, shell=True, check=True, capture_output=True)
    answer = json.loads(done.stdout)
    assert answer["model"] == "bbbb"
    found = np.float32(answer["observations"][0]["draws"])
    np.testing.assert_array_equal(found, drawn(posterior, X[:1], 20, 5)[0])


def test_link_to_the_page(visit) -> None:
    seen = visit()
    seen.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = seen.open()
    page.get_by_role("radio", name="aaaa").click()
    page.locator("#about .badge.none").wait_for()
    seen.sample(pasted(X), draws=321, seed=99)
    page.get_by_role("button", name="Copy link to this page").click()
    page.get_by_role("button", name="Copied").wait_for()
    link = page.evaluate("navigator.clipboard.readText()")
    table = seen.table()

    other = visit()
    page = other.open(link.removeprefix(other.url).lstrip("/"))
    assert page.get_by_role("radio", name="aaaa").is_checked()
    page.get_by_role("button", name="Sample").click()
    other.shown()
    assert other.table() == table


# ---- what may go wrong --------------------------------------------------------------------------


@pytest.fixture
def guarded(experiment, tmp_path) -> Iterator[str]:
    from tests.services.browser import serving

    file = tmp_path / "tokens"
    file.write_text(f"{TOKEN}\n")
    options = ServeOptions(tokens_file=str(file))
    with serving(make_app(Service(experiment, "test", options))) as address:
        yield address


def test_token(visit, guarded) -> None:
    seen = visit("401", at=guarded)
    page = seen.page
    page.goto(f"{guarded}/")
    token = page.get_by_label("Token", exact=True)
    token.wait_for()
    assert page.evaluate("document.activeElement.id") == "token"
    token.fill("two words")
    page.get_by_role("button", name="Use token").click()
    page.get_by_text("without spaces").wait_for()
    token.fill("a-wrong-token")
    page.get_by_role("button", name="Use token").click()
    page.get_by_text("did not accept this token").wait_for()
    token.fill(TOKEN)
    token.press("Enter")
    page.locator("#about dl").wait_for()
    assert not token.is_visible()
    seen.sample(pasted(X[:1]), draws=100)
    assert '-H "Authorization: Bearer $TOKEN"' in page.locator("#results pre").inner_text()
    # Nowhere but in the tab's own storage.
    assert page.evaluate("Object.values(sessionStorage)") == [TOKEN]
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    assert TOKEN not in page.content() + page.url + " ".join(seen.asked)
    page.reload()
    page.locator("#about dl").wait_for()
    assert not token.is_visible()


def test_a_token_that_is_withdrawn(visit, guarded, tmp_path) -> None:
    """Sampling goes on where it was, once there is another token."""
    seen = visit("401", at=guarded)
    page = seen.page
    page.goto(f"{guarded}/")
    page.get_by_label("Token", exact=True).fill(TOKEN)
    page.get_by_role("button", name="Use token").click()
    page.locator("#about dl").wait_for()
    (tmp_path / "tokens").write_text("another-token\n")
    page.fill("#observations", pasted(X))
    page.get_by_role("button", name="Sample").click()
    page.get_by_text("did not accept this token").wait_for()
    page.get_by_label("Token", exact=True).fill("another-token")
    page.get_by_role("button", name="Use token").click()
    seen.shown()


def test_a_busy_service_is_asked_again(visit) -> None:
    """Saturation is hard to hold still: its answer is put into the network."""
    seen = visit("503")
    page = seen.open()
    left = [1, 1]

    def busy(route: Any) -> None:
        if not left:
            return route.continue_()
        return route.fulfill(
            status=503,
            headers={"Retry-After": str(left.pop()), "Content-Type": "application/problem+json"},
            body=json.dumps({"title": "Busy", "status": 503, "detail": "full", "instance": "r1"}),
        )

    page.route("**/sample", busy)
    page.fill("#observations", pasted(X))
    page.get_by_role("button", name="Sample").click()
    page.get_by_role("status").get_by_text("Busy: trying again in 1 s.").wait_for()
    seen.shown()
    assert not left

    left.extend([300])
    page.get_by_role("button", name="Sample").click()
    page.get_by_role("status").get_by_text("trying again in 299 s").wait_for()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("status").get_by_text("Cancelled.").wait_for()


def test_problems_are_told(visit) -> None:
    seen = visit("500", "Failed to load", "ERR_")
    page = seen.open()
    content = {"title": "Out of <b>luck</b>", "status": 500, "detail": "<script>hacked=1</script>"}
    headers = {"X-Request-ID": "request-17", "Content-Type": "application/problem+json"}
    page.route(
        "**/sample",
        lambda route: route.fulfill(status=500, headers=headers, body=json.dumps(content)),
    )
    page.fill("#observations", pasted(X))
    page.get_by_role("button", name="Sample").click()
    alert = page.get_by_role("alert")
    alert.get_by_text("Request request-17, status 500").wait_for()
    assert content["title"] in alert.inner_text() and content["detail"] in alert.inner_text()
    assert alert.locator("b, script").count() == 0

    page.unroute("**/sample")
    page.route("**/sample", lambda route: route.abort())
    alert.get_by_role("button", name="Try again").click()
    alert.get_by_text("The service cannot be reached").wait_for()

    page.unroute("**/sample")
    page.route("**/sample", lambda route: route.fulfill(status=502, body="<h1>Bad gateway</h1>"))
    alert.get_by_role("button", name="Try again").click()
    alert.get_by_text("The service answered 502").wait_for()

    page.unroute("**/sample")
    page.route("**/sample", lambda route: route.fulfill(status=200, body='{"observations": ['))
    alert.get_by_role("button", name="Try again").click()
    alert.get_by_text("The answer broke off").wait_for()

    page.unroute("**/sample")
    alert.get_by_role("button", name="Try again").click()
    seen.shown()
    assert alert.inner_text() == ""


def test_cancelled_midway_what_is_there_is_shown(visit) -> None:
    seen = visit()
    page = seen.open()
    asked = []

    def slow(route: Any) -> None:
        asked.append(route)
        if len(asked) < 3:
            route.continue_()  # the third is never answered

    page.route("**/sample", slow)
    page.fill("#observations", pasted([X[0]] * 130))
    page.fill("#draws", "1000")
    page.get_by_role("button", name="Sample").click()
    page.get_by_role("status").get_by_text("80 of 130 observations").wait_for()
    assert float(page.locator("progress").get_attribute("value") or 0) == 80
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("status").get_by_text("Cancelled after 80 of 130").wait_for()
    seen.shown()
    assert page.get_by_label("Observation, 1 to 80").is_visible()
    assert page.get_by_role("button", name="Sample").is_enabled()


def test_no_model_yet(visit, tmp_path) -> None:
    from tests.services.browser import serving

    with serving(make_app(Service(LocalStore(tmp_path), "test", ServeOptions()))) as address:
        seen = visit(at=address)
        seen.page.goto(f"{address}/")
        seen.page.get_by_text("This service has no model yet.").wait_for()
        assert seen.page.get_by_role("button", name="Sample").is_disabled()


# ---- where and how it is used -------------------------------------------------------------------


def test_mounted_under_a_prefix(visit, experiment) -> None:
    from starlette.applications import Starlette
    from starlette.routing import Mount

    from tests.services.browser import serving

    app = make_app(Service(experiment, "test", ServeOptions()))
    outer = Starlette(routes=[Mount("/lab/posteriors", app)], lifespan=app.router.lifespan_context)
    with serving(outer) as address:
        seen = visit(at=f"{address}/lab/posteriors")
        seen.open()
        seen.sample(pasted(X), draws=50)
        assert all("/lab/posteriors/" in url for url in seen.asked if url.startswith("http"))
        seen.url = address


def test_by_keyboard_alone(visit) -> None:
    seen = visit()
    page = seen.open()
    keys = page.keyboard
    for _ in range(30):
        keys.press("Tab")
        if page.evaluate("document.activeElement.name") == "model":
            break
    keys.press("ArrowDown")
    page.locator("#about .badge.none").wait_for()
    assert page.evaluate("document.activeElement.value") == "aaaa"
    keys.press("Tab")
    assert page.evaluate("document.activeElement.id") == "observations"
    keys.type("0 0 0")
    page.focus("#draws")
    keys.press("Enter")
    seen.shown()
    assert page.evaluate("document.activeElement.id") == "results"
    # Everything that can be used has a name.
    unnamed = page.evaluate(
        """[...document.querySelectorAll('button, input, select, textarea, summary, a, canvas')]
          .filter((each) => each.checkVisibility() && !each.textContent.trim())
          .filter((each) => !each.labels?.length && !each.getAttribute('aria-label'))
          .map((each) => each.outerHTML)"""
    )
    assert unnamed == []


def test_parameters_to_plot(visit) -> None:
    seen = visit()
    page = seen.open()
    seen.sample(pasted(X[:1]))
    canvas = page.locator("#results canvas")
    tall = canvas.bounding_box()["height"]
    page.get_by_text("Parameters shown (3 of 3)").click()
    page.get_by_role("checkbox").nth(1).uncheck()
    assert page.get_by_text("Parameters shown (2 of 3)").is_visible()
    assert canvas.bounding_box()["height"] < tall
    assert NAMES[1] not in (canvas.get_attribute("aria-label") or "")
    page.get_by_role("checkbox").nth(0).uncheck()
    page.get_by_role("checkbox").nth(2).click()  # the last one stays
    assert page.get_by_role("checkbox").nth(2).is_checked()


def test_ten_thousand_draws_are_shown_at_once(visit) -> None:
    """Where nothing else takes the machine, in about 0.1 s; see the test of the module."""
    seen = visit()
    page = seen.open()
    seen.sample(pasted(X), draws=10_000)
    for _ in range(2):
        page.get_by_role("button", name="Next ›").click()
        seen.shown()
    taken = page.evaluate(
        "performance.getEntriesByName('pairplot', 'measure').map((e) => e.duration)"
    )
    of_observations = sorted(taken)[-3:]  # the others only draw again
    assert of_observations[0] < 1000


def test_the_picture_follows_the_width_of_the_window(visit) -> None:
    seen = visit()
    page = seen.open()
    seen.sample(pasted(X[:1]))
    wide = page.locator("#results canvas").bounding_box()["width"]
    page.set_viewport_size({"width": PHONE[0], "height": PHONE[1]})
    until = time.monotonic() + 10
    while page.locator("#results canvas").bounding_box()["width"] >= wide:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE[0]


def test_no_data_becomes_markup_in_the_modules() -> None:
    import sbi_dist.serving

    folder = Path(sbi_dist.serving.__file__).parent / "page"
    for path in folder.glob("*.js"):
        text = path.read_text()
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert word not in text, path.name
    assert not re.search(r"<script(?![^>]*\bsrc=)|\sstyle=|\son\w+=|https?://(?!www\.w3\.org)",
                         (folder / "index.html").read_text())  # fmt: skip
