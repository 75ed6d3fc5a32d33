"""The page's modules in a real browser: what they read, write and compute."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sbi_dist.serving
from sbi_dist.priors import BoxUniform, Product, prior_to_data
from sbi_dist.report.table import format_number

FOLDER = Path(sbi_dist.serving.__file__).parent / "page"
NAN = float("nan")


@pytest.fixture(scope="module")
def modules(browser: Any) -> Iterator[Any]:
    """A blank page of the same origin as the modules."""
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles

    from tests.services.browser import Visit, serving

    blank = Route("/", lambda request: PlainTextResponse("blank"))
    with serving(Starlette(routes=[blank, Mount("/page", StaticFiles(directory=FOLDER))])) as url:
        visit = Visit(browser, url)
        visit.page.goto(f"{url}/")
        yield visit.page
        visit.close("404")  # of the icon that browsers ask for


def call(page: Any, module: str, function: str, *arguments: Any) -> Any:
    """The result of a function of a module."""
    return page.evaluate(
        "async ([module, name, given]) => (await import(`/page/${module}.js`))[name](...given)",
        [module, function, list(arguments)],
    )


# ---- text ---------------------------------------------------------------------------------------

THREE = [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(
    "text",
    [
        "[[1,2,3],[4,5,6]]",
        ' {"x": [[1, 2, 3], [4, 5, 6]], "num_samples": 5}',
        "[1,2,3]\n[4,5,6]\n",
        "1,2,3\n4,5,6",
        "1, 2, 3,\r\n4, 5, 6,\r\n",
        "1 2 3\n\n  4   5 6  \n",
        "1\t2\t3\r4\t5\t6",
        "1;2;3\n4;5;6",
        "# made by hand\n1,2,3\n# and\n4,5,6",
        "\ufeffx_1,x_2,x_3\n1,2,3\n4,5,6",
        '"a","b","c"\n"1","2","3"\n"4","5","6"',
        "+1.0e0 2.d0 30E-1\n4. 5 .6e1",
        "[[1. 2. 3.]\n [4. 5. 6.]]",
        "array([[1., 2., 3.],\n       [4., 5., 6.]], dtype=float32)",
        "tensor([[1., 2.,\n 3.], [4., 5., 6.]])",
    ],
)
def test_text_of_two_rows(modules, text: str) -> None:
    found = call(modules, "parse", "readText", text, [3])
    assert found["problems"] == []
    assert found["rows"] == THREE
    assert found["ids"] is None


def test_decimal_commas(modules) -> None:
    for text in ("1,5;2;-3,25", "1,5\t2\t-3,25"):
        found = call(modules, "parse", "readText", text, [3])
        assert found["rows"] == [[1.5, 2, -3.25]] and found["problems"] == []
        assert "decimal commas" in found["notes"][0]


def test_names_of_rows(modules) -> None:
    for text in (
        "observation_id,x_1,x_2\nstar 1,1,2\nstar 2,3,4",
        "x_1,ID,x_2\n1,star 1,2\n3,star 2,4",
        "star 1,1,2\nstar 2,3,4",
        '{"x": [[1, 2], [3, 4]], "observation_ids": ["star 1", "star 2"]}',
    ):
        found = call(modules, "parse", "readText", text, [2])
        assert found["ids"] == ["star 1", "star 2"]
        assert found["rows"] == [[1, 2], [3, 4]] and found["problems"] == []


@pytest.mark.parametrize(
    ("text", "shape", "rows"),
    [
        ("[1,2,3]", [3], [[1, 2, 3]]),
        ("1\n2\n3", [3], [[1, 2, 3]]),
        ("[1,2,3]", [1], [[1], [2], [3]]),
        ("1\n2\n3", [1], [[1], [2], [3]]),
        ("[[1],[2]]", [1], [[1], [2]]),
        ("5", [1], [[5]]),
        ("[[1,2],[3,4],[5,6]]", [3, 2], [[1, 2, 3, 4, 5, 6]]),
        ("[[[1,2],[3,4]],[[5,6],[7,8]]]", [2, 2], [[1, 2, 3, 4], [5, 6, 7, 8]]),
        ("[[1,2,3,4],[5,6,7,8]]", [2, 2], [[1, 2, 3, 4], [5, 6, 7, 8]]),
        ("[[1. 2.]\n [3. 4.]]", [2, 2], [[1, 2, 3, 4]]),
        ("1 2 3 4", [2, 2], [[1, 2, 3, 4]]),
    ],
)
def test_shapes_of_observations(modules, text: str, shape: list[int], rows: Any) -> None:
    found = call(modules, "parse", "readText", text, shape)
    assert found["problems"] == [] and found["rows"] == rows


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("1,nan,3\n4,5,6", "Row 1, column 2: “nan”"),
        ("a,b,c\n1,2,3\n4,,6", "Row 2 (line 3), column 2: an empty cell"),
        ("[[1,2,3],[4,NaN,6]]", "Row 2, column 2: an empty cell"),
        ("[[1,2,3],[-Infinity,5,6]]", "Row 2, column 1: an empty cell"),
        ("1 2 1e999", "Row 1, column 3: “1e999”"),
        ("id,a,b,c\nfirst,1,2,3\nsecond,4,5,inf", "Row 2 (line 3), column 4: “inf”"),
    ],
)
def test_numbers_that_are_not_finite(modules, text: str, where: str) -> None:
    """Such rows are sent, as null, and get a status of their own."""
    found = call(modules, "parse", "readText", text, [3])
    assert found["problems"] == []
    assert sum(row.count(None) for row in found["rows"]) == 1
    assert found["notes"][-1].startswith(where), found["notes"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("1,abc,3", "Row 1, column 2: “abc” is not a number."),
        ("a,b,c\n\n1,2,3\n1,2,0x10", "Row 2 (line 4), column 3: “0x10” is not a number."),
        ("1,2\n1,2,3", "Row 1 has 2 numbers; 3 are needed."),
        ("1,2,3\n1,2,3,4,5", "Row 2 has 5 numbers; 3 are needed."),
        ("[[1,2,3],[1,2]]", "Row 2 has 2 numbers; 3 are needed."),
        ('[[1,2,"3"]]', "Row 1, column 3: “3” is not a number."),
        ("[[1,2,true]]", "Row 1, column 3: “true” is not a number."),
        ("[[1,2,{}]]", "Row 1, column 3: “{}” is not a number."),
        ("[1,2]", "Row 1 has 2 numbers; 3 are needed."),
        ("[]", "Row 1 has 0 numbers; 3 are needed."),
        ("{}", 'This JSON object has no field "x"'),
        ('{"x": 3}', "This JSON holds no array"),
        ("[[1,2,3]", "This is not valid JSON"),
        ("[[1. 2. ... 3.]]", 'Numbers were left out of this text ("...")'),
        ("array([[1., 2.]])", "Row 1 has 2 numbers; 3 are needed."),
        ("x_1,x_2,x_3", "There is only a header here"),
        ("# nothing", "There are only comments here"),
        ("PAR1\x15\x04", "Parquet files are not read on this page"),
        (
            '{"x": [[1,2,3]], "observation_ids": ["a", "b"]}',
            "observation_ids has 2 names for 1 row.",
        ),
    ],
)
def test_text_that_cannot_be_read(modules, text: str, problem: str) -> None:
    found = call(modules, "parse", "readText", text, [3])
    assert found["problems"][0].startswith(problem), found["problems"]


def test_nothing_is_no_problem(modules) -> None:
    for text in ("", " \n\t ", "\ufeff"):
        found = call(modules, "parse", "readText", text, [3])
        assert found["rows"] == [] and found["problems"] == []


def test_template_is_read_back(modules) -> None:
    for size in (1, 3, 100, 500):
        text = call(modules, "parse", "template", size)
        found = call(modules, "parse", "readText", text, [size])
        assert found["rows"] == [[0] * size] and found["problems"] == [], size


def test_long_text_is_read_quickly(modules) -> None:
    rows = np.random.default_rng(0).standard_normal((20_000, 10)).astype(np.float32)
    text = "\n".join(",".join(map(repr, row)) for row in rows.astype(float).tolist())
    found = modules.evaluate(
        """async (text) => {
          const { readText } = await import('/page/parse.js');
          const start = performance.now();
          const { rows, problems } = readText(text, [10]);
          return [performance.now() - start, rows.length, problems, rows.at(-1)];
        }""",
        text,
    )
    assert found[1:3] == [20_000, []]
    assert found[3] == rows[-1].astype(float).tolist()
    assert found[0] < 3000


# ---- NumPy's format -----------------------------------------------------------------------------

READ = """async ([text, shape]) => {
  const { rowsOfNpy } = await import('/page/npy.js');
  return rowsOfNpy(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer, shape);
}"""


def read_npy(page: Any, data: bytes, shape: list[int]) -> Any:
    return page.evaluate(READ, [base64.b64encode(data).decode(), shape])


def saved(array: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def test_npy_dtypes_and_orders(modules) -> None:
    values = np.array([[0, 1, 2], [30, 40, 50]])
    for dtype in "<f8 >f8 <f4 >f4 <f2 >f2 i1 u1 <i2 >u2 <i4 >i4 <u4 <i8 >i8 <u8".split():
        for order in "CF":
            array = np.asarray(values, dtype=dtype, order=order)  # type: ignore[call-overload]
            found = read_npy(modules, saved(array), [3])
            assert found["problems"] == [] and found["rows"] == values.tolist(), (dtype, order)


def test_npy_values(modules) -> None:
    halves = np.array([[1e-7, -0.25, 65504.0], [6e-5, NAN, np.inf]], dtype=np.float16)
    found = read_npy(modules, saved(halves), [3])
    assert found["rows"][0] == halves[0].astype(float).tolist()
    assert found["rows"][1] == [float(halves[1, 0]), None, None]
    assert found["notes"][0].startswith("Row 2, column 2: “NaN” is not finite; nothing is drawn")


def test_npy_shapes(modules) -> None:
    array = np.arange(24.0).reshape(2, 3, 4)
    for order in "CF":
        data = saved(np.asarray(array, order=order))  # type: ignore[call-overload]
        assert read_npy(modules, data, [3, 4])["rows"] == array.reshape(2, 12).tolist()
        assert read_npy(modules, data, [2, 3, 4])["rows"] == [array.ravel().tolist()]
    assert read_npy(modules, saved(np.arange(3.0)), [3])["rows"] == [[0, 1, 2]]
    assert read_npy(modules, saved(np.arange(3.0)), [1])["rows"] == [[0], [1], [2]]
    assert read_npy(modules, saved(np.array(5.0)), [1])["rows"] == [[5]]
    assert read_npy(modules, saved(np.arange(6.0).reshape(2, 3)), [3, 1])["rows"] == [
        [0, 1, 2],
        [3, 4, 5],
    ]


def test_npy_of_version_2(modules) -> None:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ones((1, 3)), version=(2, 0))
    assert read_npy(modules, file.getvalue(), [3])["rows"] == [[1, 1, 1]]


def test_npy_that_cannot_be_read(modules) -> None:
    good = saved(np.ones((2, 3)))
    zipped = io.BytesIO()
    np.savez(zipped, a=np.ones(3))
    cases = {
        "this is not a .npy file": zipped.getvalue(),
        "its header is cut off": good[:40],
        "it ends before the last number of an array of shape (2, 3)": good[:-1],
        "its dtype |O is not a real number": saved(
            np.array([[None] * 3], dtype=object), allow_pickle=True
        ),
        "its dtype <c16 is not a real number": saved(np.ones((1, 3), dtype=complex)),
        "its dtype |b1 is not a real number": saved(np.ones((1, 3), dtype=bool)),
        "it holds no plain numbers": saved(np.zeros(3, dtype=[("a", "f8")])),
        "it ends before": good.replace(b"(2, 3)", b"(9, 3)"),
    }
    for problem, data in cases.items():
        found = read_npy(modules, data, [3])
        assert found["rows"] == [] and problem in found["problems"][0], problem
    wrong = read_npy(modules, saved(np.ones((2, 4))), [3])
    assert wrong["problems"] == [
        "The file holds an array of shape (2, 4); B observations have shape (B, 3)."
    ]
    assert read_npy(modules, saved(np.ones((0, 3))), [3])["problems"]


# ---- numbers as text ----------------------------------------------------------------------------


def test_shortest_text_of_float32(modules) -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 3000, dtype=np.uint32).view(np.float32)
    usual = rng.standard_normal(3000).astype(np.float32)
    values = np.concatenate(
        [bits[np.isfinite(bits)], usual, np.array([0, 1, 0.1, 1e-45, 3.4e38], np.float32)]
    )
    texts = modules.evaluate(
        """async (values) => (await import('/page/download.js')) && Promise.all(
          values.map(async (v) => (await import('/page/download.js')).float32Text(v)))""",
        values.astype(float).tolist(),
    )
    np.testing.assert_array_equal(np.array(texts).astype(np.float32), values)
    shortest = [len(np.format_float_scientific(each, trim="-")) for each in usual]
    assert np.mean([len(text) for text in texts[-3005:-5]]) < np.mean(shortest)


def test_rounding_is_that_of_the_report(modules) -> None:
    for value, sd in [(1.2345, 0.123), (-0.04, 0.9), (123456, 3200), (1e-9, 2e-10), (0, 1e-3)]:
        expected = format_number(value, sd).replace("e-0", "e-").replace("-0.0400", "-0.04")
        assert call(modules, "ticks", "rounded", value, sd).replace("−", "-") == expected
    # Not more digits than a float32 has.
    assert call(modules, "ticks", "rounded", 2.0, 1e-9) == "2"


# ---- densities ----------------------------------------------------------------------------------

INSIDE = """async ([draws, low, high, masses]) => {
  const d = await import('/page/density.js');
  const flat = Float32Array.from(draws.flat());
  const [x, y] = [0, 1].map((i) => d.column(flat, 2, i));
  const bounds = (i) => [low[i] ?? -Infinity, high[i] ?? Infinity];
  const [xs, ys] = [0, 1].map((i) => d.plotWindow([x, y][i], bounds(i), null));
  const [n, m] = [d.cellsFor(x, xs, 48, 160), d.cellsFor(y, ys, 48, 160)];
  const { grid, levels } = d.density2d(x, y, xs, ys, n, m, masses);
  return levels.map((level) => {
    const path = new Path2D();
    for (const ring of d.contourRings(grid, n, m, level)) {
      ring.forEach(([a, b], i) => (i ? path.lineTo(a * 50, b * 50) : path.moveTo(a * 50, b * 50)));
      path.closePath();
    }
    const context = document.createElement('canvas').getContext('2d');
    let held = 0;
    for (const [a, b] of draws) {
      const at = [(a - xs[0]) / (xs[1] - xs[0]) * n, (b - ys[0]) / (ys[1] - ys[0]) * m];
      held += context.isPointInPath(path, at[0] * 50, at[1] * 50, 'evenodd');
    }
    return held / draws.length;
  });
}"""


def test_regions_hold_their_mass(modules) -> None:
    """Also with two modes, along a bend, and up against bounds of the prior."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((10_000, 2))
    correlated = z @ np.array([[1, 0.9], [0, 0.3]])
    modes = z * 0.4 + rng.choice([-2, 2], (10_000, 1))
    bent = np.stack([z[:, 0], z[:, 0] ** 2 + 0.3 * z[:, 1]], axis=1)
    bounded = np.abs(z)
    flat = rng.random((10_000, 2))
    free: list[float | None] = [None, None]
    for name, draws, low, high in [
        ("correlated", correlated, free, free),
        ("modes", modes, free, free),
        ("bent", bent, free, free),
        ("bounded", bounded, [0, 0], free),
        ("flat", flat, [0, 0], [1, 1]),
    ]:
        held = modules.evaluate(INSIDE, [draws.tolist(), low, high, [0.68, 0.95]])
        assert held[0] == pytest.approx(0.68, abs=0.02), name
        assert held[1] == pytest.approx(0.95, abs=0.01), name


def test_quantiles(modules) -> None:
    values = np.sort(np.random.default_rng(0).standard_normal(101)).tolist()
    for level in (0, 0.05, 0.333, 0.5, 1):
        expected = np.quantile(values, level)
        assert call(modules, "density", "quantile", values, level) == pytest.approx(expected)


def test_histogram_has_area_one(modules) -> None:
    heights = modules.evaluate(
        """async () => {
          const d = await import('/page/density.js');
          const each = d.column(Float32Array.from([0, 0.5, 0.5, 1]), 1, 0);
          return [...d.histogram(each, [0, 1], 4)];
        }"""
    )
    assert heights == [1.0, 0.0, 2.0, 1.0]


# ---- the prior ----------------------------------------------------------------------------------

MARGINALS = """async ([data, size, at]) => {
  const { priorMarginals } = await import('/page/prior.js');
  return priorMarginals(data, size).map(({ bounds, density, text }, i) => ({
    low: Number.isFinite(bounds[0]) ? bounds[0] : null,
    high: Number.isFinite(bounds[1]) ? bounds[1] : null,
    densities: density && at[i].map(density), text,
  }));
}"""


def test_prior_densities_are_those_of_torch(modules) -> None:
    d = torch.distributions
    one = torch.ones(1)
    factors = [
        d.Normal(one, 0.5 * one),
        d.LogNormal(-one, one),
        d.Gamma(2.5 * one, 3 * one),
        d.Beta(2 * one, 3.5 * one),
        d.Exponential(2 * one),
        d.HalfNormal(2 * one),
        d.Laplace(one, 2 * one),
        d.Uniform(-one, 3 * one),
    ]
    data = prior_to_data(Product([d.Independent(each, 1) for each in factors]))
    # Not made by `truncate`: torch has no inverse of some distribution functions.
    cut = [
        {"kind": "Truncated", "base": block["base"], "low": 0.2, "high": 0.9}
        for block in data["blocks"]
    ]
    for each, bounded in ((data, False), ({"kind": "Product", "blocks": cut}, True)):
        at = np.random.default_rng(0).uniform(0.25, 0.85, (8, 20))
        found = modules.evaluate(MARGINALS, [each, 8, at.tolist()])
        for i, factor in enumerate(factors):
            theta = torch.from_numpy(at[i]).float()
            expected = factor.log_prob(theta).exp()
            if bounded:
                grid = torch.linspace(0.2, 0.9, 20_001)
                expected = expected / torch.trapezoid(factor.log_prob(grid).exp(), grid)
                assert found[i]["low"] == pytest.approx(0.2)
                assert found[i]["high"] == pytest.approx(0.9)
            np.testing.assert_allclose(found[i]["densities"], expected, rtol=2e-3)


def test_priors_of_other_kinds(modules) -> None:
    box = prior_to_data(BoxUniform([-1.0, 0.0], [1.0, 5.0]))
    found = modules.evaluate(MARGINALS, [box, 2, [[0], [6]]])
    assert found[0]["densities"] == [0.5] and found[1]["densities"] == [0]
    assert found[1]["text"] == "uniform on [0, 5]"
    normal = torch.distributions.MultivariateNormal(
        torch.zeros(2), torch.tensor([[4.0, 1.0], [1.0, 1.0]])
    )
    found = modules.evaluate(MARGINALS, [prior_to_data(normal), 2, [[1], [1]]])
    expected = torch.distributions.Normal(0.0, 2.0).log_prob(torch.tensor(1.0)).exp()
    assert found[0]["densities"][0] == pytest.approx(float(expected), rel=1e-6)
    opaque = {"kind": "opaque", "description": "?", "low": [0, None], "high": [None, 3]}
    found = modules.evaluate(MARGINALS, [opaque, 2, [[], []]])
    assert [each["low"] for each in found] == [0, None]
    assert [each["densities"] for each in found] == [None, None]
    unknowns: list[Any] = [{}, {"kind": "New", "a": 1}, {"kind": "Product"}, None, []]
    for unknown in unknowns:
        assert len(modules.evaluate(MARGINALS, [unknown, 2, [[], []]])) == 2


# ---- ticks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "labels", "factor"),
    [
        (-0.1, 1.1, ["0.0", "0.5", "1.0"], ""),
        (-23, 23, ["−20", "0", "20"], ""),
        (1.9e-5, 4.1e-5, ["2.5", "3.0", "3.5"], "×10⁻⁵"),
        (0, 61_000, ["0", "2", "4", "6"], "×10⁴"),
        (999_999.75, 1_000_000.25, ["−0.2", "0.0", "0.2"], "+ 1000000"),
    ],
)
def test_ticks(modules, low: float, high: float, labels: list[str], factor: str) -> None:
    found = modules.evaluate(
        """async ([low, high]) => (await import('/page/ticks.js'))
          .fitTicks(low, high, 150, 4, (text) => 7 * text.length, 12)""",
        [low, high],
    )
    shown = [each["label"] for each in found["ticks"]]
    assert found["factor"] == factor
    assert shown and set(labels) & set(shown), shown
    for tick in found["ticks"]:
        assert low <= tick["value"] <= high
        assert tick["half"] <= tick["centre"] <= 150 - tick["half"]


# ---- speed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 10])
def test_ten_thousand_draws_are_plotted_at_once(modules, size: int) -> None:
    taken = modules.evaluate(
        """async (size) => {
          const { prepare, drawPairs, palette } = await import('/page/pairplot.js');
          const { priorMarginals } = await import('/page/prior.js');
          const random = () => Math.random() + Math.random();
          const draws = Float32Array.from({ length: 10_000 * size }, random);
          const normal = { kind: 'Normal', loc: Array(size).fill(0), scale: [5] };
          const priors = priorMarginals(normal, size);
          const which = [...Array(size).keys()];
          const canvas = document.createElement('canvas');
          const labels = which.map((i) => `theta_${i}`);
          let best = Infinity;
          for (let i = 0; i < 8; i += 1) {
            const start = performance.now();
            const prepared = prepare({ draws, size, which, priors, truth: null });
            drawPairs(canvas, prepared, { labels, width: 900, scale: 1, colours: palette(true) });
            best = Math.min(best, performance.now() - start);
          }
          return best;
        }""",
        size,
    )
    assert taken < 300
