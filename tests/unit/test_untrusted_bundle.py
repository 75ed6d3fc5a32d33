"""Bundles of a stranger, whose checksums are right: refused, or a model that works and is small."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
import re
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from sbi_dist.bijection import SupportBijection
from sbi_dist.errors import InputError
from sbi_dist.estimation.bundle import (
    BUNDLE,
    OUT_OF_DISTRIBUTION,
    WEIGHTS,
    load_bundle,
    read_bundle,
    save_bundle,
)
from sbi_dist.estimation.density_estimator import DensityEstimator
from sbi_dist.estimation.ensemble import Ensemble, Estimator
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.estimation.out_of_distribution import OutOfDistribution
from sbi_dist.estimation.size import num_weights
from sbi_dist.estimation.standardize import Standardization
from sbi_dist.posterior import Posterior
from sbi_dist.priors import BoxUniform, Product, Truncated, prior_to_data
from sbi_dist.store import LocalStore

SMALL: dict[str, Any] = {"transforms": 2, "hidden_features": 8, "blocks": 1, "bins": 4}


def made(
    features: int = 2, x_shape: tuple[int, ...] = (3,), seed: int = 0, **options: Any
) -> DensityEstimator:
    """An untrained estimator with random weights."""
    x = torch.zeros(x_shape, dtype=torch.float64)
    theta = torch.zeros(features, dtype=torch.float64)
    standardization = Standardization(
        bijection=SupportBijection(np.full(features, -2.0), np.full(features, 2.0), 0.2),
        theta_mean=theta,
        theta_sd=theta + 0.5,
        x_scale="asinh",
        x_low=x + 1.0,
        x_centre=x,
        x_width=x + 1.0,
        x_mean=x,
        x_sd=x + 1.0,
    )
    estimator = DensityEstimator(TrainOptions(**{**SMALL, **options}), standardization, x_shape)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in estimator.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return estimator.eval()


Bundle = tuple[dict[str, Any], bytes]


@functools.cache
def bundle(kind: str) -> Bundle:
    """Content of ``bundle.json``, and weights: as the library writes them."""
    estimator: Estimator
    normal = torch.distributions.Normal(0.0, 1.0)
    prior = prior_to_data(Product([Truncated(normal, -2.0, 2.0), BoxUniform([-2.0], [2.0])]))
    if kind == "nsf":
        estimator, prior = made(), prior_to_data(BoxUniform([-2.0] * 2, [2.0] * 2))
    elif kind == "maf":
        estimator = made(estimator="maf", embedding="fully_connected", embedding_features=2)
    elif kind == "trials":
        estimator = made(
            x_shape=(5, 2),
            embedding="permutation_invariant",
            embedding_hidden=8,
            embedding_features=3,
        )
    elif kind == "series":
        estimator = made(x_shape=(20,), embedding="convolutional_1d", embedding_hidden=8)
    else:
        estimator = Ensemble([made(seed=1), made(seed=2, estimator="maf")])
    x = torch.randn(60, *estimator.x_shape, generator=torch.Generator().manual_seed(0))
    reference = OutOfDistribution.fit(estimator, x[:50], x[50:]).to_data()
    about = {
        "prior": prior,
        "parameter_names": ["a", "b"],
        "parameter_units": ["m", ""],
        "calibration": {"verdict": "pass", "summary": "as it should be"},
        OUT_OF_DISTRIBUTION: reference,
    }
    kept: dict[str, bytes] = {}

    class Kept:
        def put(self, key: str, data: bytes) -> None:
            kept[key] = data

    save_bundle(Kept(), estimator, about)  # type: ignore[arg-type]
    return json.loads(kept[BUNDLE]), kept[WEIGHTS]


KINDS = ("nsf", "maf", "trials", "series", "ensemble")


def posterior_of(text: bytes, weights: bytes) -> Posterior:
    """Through all that a loaded model goes through."""
    estimator, about = read_bundle(text, weights, "m")
    return Posterior.of_bundle(estimator, about, "m")


def works(posterior: Posterior) -> None:
    """It draws, inside the support, whatever the observation; numbers too large are NaN."""
    low, high = (bound.numpy() for bound in posterior.estimator.support)
    assert len(posterior.parameter_names) == posterior.estimator.num_parameters
    for scale in (0.0, 1.0, 1e30):
        x = torch.full((2, *posterior.x_shape), scale)
        theta, log_q = posterior.draws(x, 3, 0, with_log_prob=True)
        assert theta.shape == (2, 3, posterior.estimator.num_parameters)
        values = theta.double().numpy()
        assert (np.isnan(values) | ((values >= low) & (values <= high))).all()
        assert log_q is not None and log_q.shape == (2, 3)
        assert posterior.log_prob_batched(theta.transpose(0, 1), x).shape == (3, 2)
        score, p_value = posterior.out_of_distribution(x)
        assert score.shape == p_value.shape == (2,)


def refused_or_works(content: Any, weights: bytes, text: bytes | None = None) -> str:
    """What it is refused with, empty where it works; quickly, in little memory.

    Little is 60 MB and 40 times the files' bytes: a JSON number of two bytes is 32 in Python. It
    must not be refused because memory has run out.
    """
    if isinstance(content, dict) and "weights_sha256" in content:
        content = {**content, "weights_sha256": hashlib.sha256(weights).hexdigest()}
    text = json.dumps(content).encode() if text is None else text
    before = resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    began, message = time.monotonic(), ""
    try:
        works(posterior_of(text, weights))
    except InputError as error:
        message = str(error)
    assert time.monotonic() - began < 10
    assert resident("VmHWM") - before < 60e6 + 40 * (len(text) + len(weights))
    assert len(message) < 2000 and not re.search("MemoryError|allocate", message)
    return message


def resident(what: str) -> int:
    """Bytes."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(what))


@pytest.fixture(autouse=True)
def _machine_is_safe() -> Iterator[None]:
    """A test that fails for its memory does not take that of the machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        virtual = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (virtual + 6 * 10**9, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_library_writes_works(kind) -> None:
    assert not refused_or_works(*bundle(kind))


# ---- anything anywhere --------------------------------------------------------------------------

NASTY: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 2**31, 2**63, 10**9, 10**30, -(10**400)),
    *(0.5, -0.0, 1e-320, 1e-30, 1e30, 1e38, 3.5e38, 1e300, math.nan, math.inf, -math.inf),
    *("", "x", "3", "nan", "x" * 100_000, "\u0000", "\ud800", "../../etc/passwd", "{}{}%s"),
    *([], [[]], [1.0], [[1.0]], [0] * 5000, [[1.0, 2.0], [3.0]], ["a"], [None], [{}]),
    *({}, {"kind": "Normal"}, {"0": 1}, {"kind": "opaque"}),
]


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in nested JSON data."""
    if not isinstance(value, (dict, list)):
        return [at]
    items = value.items() if isinstance(value, dict) else list(enumerate(value))[:4]
    inner = [path for key, each in items for path in places(each, (*at, key))]
    return [at, *inner] if at else inner


@functools.cache
def targets(kind: str) -> list[tuple[Any, ...]]:
    """Paths in a bundle, fewer of those that nobody looks at than of the others."""
    content = bundle(kind)[0]
    every = {"options": [], "rest": []}
    used = {*SMALL, "estimator", "embedding", "embedding_hidden", "embedding_features", "ensemble"}
    for path in places(content):
        ignored = len(path) > 1 and path[-2] == "estimator" and path[-1] not in used
        every["options" if ignored else "rest"].append(path)
    return every["rest"] + every["options"][:3]


@st.composite
def changes(draw: Any) -> tuple[dict[str, Any], bytes, str]:
    kind = draw(st.sampled_from(KINDS))
    content, weights = copy.deepcopy(bundle(kind)[0]), bundle(kind)[1]
    said = [kind]
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(targets(kind)))
        act = draw(st.sampled_from(("set", "set", "set", "drop", "repeat", "swap")))
        if act == "repeat" and any(each.startswith(act) for each in said):
            act = "drop"  # repeats of repeats are of a size that others refuse
        owner: Any = content
        try:
            for key in path[:-1]:
                owner = owner[key]
            here = owner[path[-1]]
        except (LookupError, TypeError):
            continue  # an earlier change has removed it
        if not isinstance(owner, (dict, list)):
            continue
        if act == "set":
            owner[path[-1]] = draw(st.sampled_from(NASTY))
        elif act == "drop":
            del owner[path[-1]]
        elif act == "repeat":
            owner[path[-1]] = here * 300 if isinstance(here, list) else [here] * 300
        else:
            other = draw(st.sampled_from(targets(kind)))
            value: Any = bundle(kind)[0]
            for key in other:
                value = value[key]
            owner[path[-1]] = copy.deepcopy(value)
        said.append(f"{act} {path}")
    return content, weights, "; ".join(said)


@settings(deadline=None, max_examples=300)
@given(changes())
def test_changed_json(change) -> None:
    content, weights, _ = change
    refused_or_works(content, weights)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(KINDS), st.data())
def test_changed_text(kind, data) -> None:
    """Bytes that are cut out, doubled or flipped."""
    content, weights = bundle(kind)
    text = bytearray(json.dumps(content).encode())
    first = data.draw(st.integers(0, len(text) - 1))
    act = data.draw(st.sampled_from(("cut", "drop", "double", "flip")))
    last = first + data.draw(st.integers(1, 40))
    if act == "cut":
        del text[first:]
    elif act == "drop":
        del text[first:last]
    elif act == "double":
        text[first:first] = text[first:last]
    else:
        text[first] ^= 1 << data.draw(st.integers(0, 7))
    refused_or_works(content, weights, bytes(text))


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(KINDS), st.data())
def test_changed_weights(kind, data) -> None:
    """Bits of the weights, or of their header; the checksum is right again."""
    content, weights = bundle(kind)
    changed = bytearray(weights)
    header = 8 + int.from_bytes(weights[:8], "little")
    act = data.draw(st.sampled_from(("header", "header", "number", "number", "cut", "more")))
    if act == "cut":
        del changed[data.draw(st.integers(0, len(weights) - 1)) :]
    elif act == "more":
        changed += b"\0" * data.draw(st.integers(1, 100))
    else:
        area = (0, header - 1) if act == "header" else (header, len(weights) - 1)
        for place in data.draw(st.lists(st.integers(*area), min_size=1, max_size=4)):
            changed[place] ^= 1 << data.draw(st.integers(0, 7))
    refused_or_works(content, bytes(changed))


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(KINDS),
    st.sampled_from([math.nan, math.inf, -math.inf, 1e38, -1e38, 1e20, -1e20, 1e4, 0.0, 1e-40]),
    st.data(),
)
def test_extreme_weights(kind, value, data) -> None:
    content, weights = bundle(kind)
    tensors = load(weights)
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name].view(-1)
    wrong = value if tensor.is_floating_point() else 7
    if data.draw(st.booleans()):
        tensor[data.draw(st.integers(0, len(tensor) - 1))] = wrong
    else:
        tensor.fill_(wrong)
    refused = refused_or_works(content, save(tensors))
    assert refused or math.isfinite(value)


# ---- bombs --------------------------------------------------------------------------------------


def changed(kind: str, **values: Any) -> dict[str, Any]:
    """A bundle's content with values at paths, of which ``__`` parts the keys."""
    content = copy.deepcopy(bundle(kind)[0])
    for path, value in values.items():
        *keys, last = path.split("__")
        owner: Any = content
        for key in keys:
            owner = owner[int(key) if isinstance(owner, list) else key]
        owner[int(last) if isinstance(owner, list) else last] = value
    return content


def of_parameters(count: int, **options: Any) -> dict[str, Any]:
    """Of so many parameters; numbers are short, so that the file is small."""
    content = changed("nsf", prior={"kind": "opaque"}, parameter_names=[])
    del content["num_parameters"], content["num_weights"], content["parameter_units"]
    content["estimator"].update(options)
    content["standardization"]["bijection"] = {
        "low": [0] * count,
        "high": [1] * count,
        "softness": [1] * count,
    }
    content["standardization"].update(theta_mean=[0] * count, theta_sd=[1] * count)
    return content


def of_shape(kind: str, shape: list[int], **values: Any) -> dict[str, Any]:
    """Of x of that shape, with numbers for each."""
    content = changed(kind, **{"x_shape": shape, **values})
    del content["num_weights"], content[OUT_OF_DISTRIBUTION]
    for name in ("x_mean", "x_low", "x_width", "x_sd", "x_centre"):
        content["standardization"][name] = np.ones(shape, dtype=int).tolist()
    return content


LINE = [1] * 3000
MATRIX = [[0.0]] * 200_000
NORMAL = {"kind": "Normal", "loc": [0.0], "scale": [1.0]}
UNFIT = "the architecture does not fit the weights"
SHAPE = "the standardization is of another x_shape"
SUPPORT = "a lower bound of the support is not below"
NAMES = "parameter_names (holds what is no text|does not have 2 texts)"
WIDE = {"hidden_features": 4096}


def bijection(low: list[float], high: list[float], softness: list[float]) -> dict[str, Any]:
    return changed(
        "nsf", standardization__bijection={"low": low, "high": high, "softness": softness}
    )


def layers(**options: Any) -> dict[str, Any]:
    return changed("nsf", **{f"estimator__{name}": value for name, value in options.items()})


def prior(kind: str, **arguments: Any) -> dict[str, Any]:
    return changed("nsf", prior={"kind": kind, **arguments})


# What it is, of which weights, how it is made, and what it is refused with.
BOMBS: list[tuple[str, str, Callable[[], dict[str, Any]], str]] = [
    ("many layers", "nsf", lambda: layers(transforms=50, blocks=20), UNFIT),
    ("wide layers", "nsf", lambda: layers(**WIDE), UNFIT),
    ("many bins", "nsf", lambda: layers(bins=10**9), "bins is 1000000000; it must be at most"),
    ("as many bins as may be", "nsf", lambda: layers(bins=100), UNFIT),
    # A text or a list, times a number, is that many of them.
    ("text of layers", "nsf", lambda: layers(transforms="x" * 500, **WIDE), "transforms is of t"),
    ("list of layers", "nsf", lambda: layers(blocks=LINE, **WIDE), "blocks is of type list"),
    ("long choice", "nsf", lambda: layers(estimator="nsf " * 10**6), "has 4,000,000 characters"),
    ("embedding", "maf", lambda: changed("maf", estimator__embedding_hidden=4096), UNFIT),
    ("context", "maf", lambda: changed("maf", estimator__embedding_features=4096), UNFIT),
    ("large x", "nsf", lambda: changed("nsf", x_shape=[10**9]), SHAPE),
    ("many trials", "trials", lambda: changed("trials", x_shape=[10**9, 2]), SHAPE),
    ("one number for all", "trials", lambda: of_shape("trials", [], x_shape=[10**9]), SHAPE),
    (
        "wide embedding of many trials",
        "trials",
        lambda: of_shape("trials", [100_000, 2], estimator__embedding_hidden=4096),
        "too wide for so many trials",
    ),
    (
        "wide embedding of many channels",
        "series",
        lambda: of_shape("series", [3, 30_000], estimator__embedding_hidden=4096),
        UNFIT,
    ),
    ("many dimensions", "nsf", lambda: changed("nsf", x_shape=LINE), "no list of a few lengths"),
    ("negative lengths", "nsf", lambda: changed("nsf", x_shape=[-1, -3]), "what is no length"),
    ("parameters", "nsf", lambda: of_parameters(20_000), "it has 20,000 parameters"),
    ("parameters of little", "nsf", lambda: of_parameters(9000, transforms=1), UNFIT),
    ("autoregressive", "nsf", lambda: of_parameters(9000, estimator="maf", blocks=20), UNFIT),
    (
        "members",
        "ensemble",
        lambda: changed("ensemble", members=[{}] * 50_000, estimator__ensemble=50_000),
        "an ensemble of 50000 has other members",
    ),
    (
        "members without weights",
        "ensemble",
        lambda: changed(
            "ensemble", members=bundle("ensemble")[0]["members"] * 50, estimator__ensemble=100
        ),
        UNFIT,
    ),
    (
        "no members",
        "ensemble",
        lambda: changed("ensemble", members=[], estimator__ensemble=0),
        "an ensemble of 0",
    ),
    # torch makes all pairs of them, and then looks whether each fits.
    ("pairs", "nsf", lambda: prior("Normal", loc=MATRIX, scale=[LINE * 60]), "different shapes"),
    (
        "matrices",
        "nsf",
        lambda: prior("MultivariateNormal", loc=MATRIX, scale_tril=[[1.0]]),
        "no such shapes",
    ),
    ("blocks", "nsf", lambda: prior("Product", blocks=[NORMAL] * 90_000), "it has 90,001 parts"),
    (
        "no checks",
        "nsf",
        lambda: prior("Normal", loc=[0, 0], scale=[-1, -1], validate_args=[0, 0]),
        "multiple values for keyword argument 'validate_args'",
    ),
    (
        "prior of three",
        "nsf",
        lambda: prior("Normal", loc=[0] * 3, scale=[1] * 3),
        "it has 3 parameters, the model 2",
    ),
    ("softness", "nsf", lambda: bijection([0, 0], [1, 1], [1e-300, 0.1]), "a softness is not in"),
    ("no number inside", "nsf", lambda: bijection([1, 0], [1 + 1e-12, 1], [0.1, 0.1]), SUPPORT),
    ("not of float32", "nsf", lambda: bijection([1e300, 0], [1e301, 1], [0.1, 0.1]), SUPPORT),
    ("long names", "nsf", lambda: changed("nsf", parameter_names=["x" * 10**6, "b"]), NAMES),
    ("more names", "nsf", lambda: changed("nsf", parameter_names=["a"] * 10**5), NAMES),
    ("names that are none", "nsf", lambda: changed("nsf", parameter_names=[["a"], 1]), NAMES),
    ("half a letter", "nsf", lambda: changed("nsf", experiment="\ud800"), "surrogates not allowed"),
    ("weights", "nsf", lambda: changed("nsf", num_weights=10**9), "num_weights is not that of"),
    ("format", "nsf", lambda: changed("nsf", format=LINE), r"has format \[1, 1, .*this version"),
]


@pytest.mark.parametrize(
    ("kind", "content", "message"), [bomb[1:] for bomb in BOMBS], ids=[bomb[0] for bomb in BOMBS]
)
def test_bombs_are_refused(kind, content, message) -> None:
    assert re.search(message, refused_or_works(content(), bundle(kind)[1]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 100_000, "RecursionError"),
        (b'{"a":' * 90_000, "RecursionError"),
        (b"[" + b"{}," * 200_000 + b"{}]", "over 100,000 times {"),
        (b"[" + b"[]," * 6_000_000 + b"[]]", r"over 5,000,000 times \["),
        (b"[" + b'"",' * 3_000_000 + b'""]', 'over 5,000,000 times "'),
        (b'{"format": ' + b"9" * 100_000 + b"}", "ValueError: Exceeds the limit"),
        (b'{"format": 1, "format": 7}', "has format 7"),
        ('{"format": 1}'.encode("utf-16"), "UnicodeDecodeError"),
        (b'{"format": 1, "a": "\xed\xa0\x80"}', "UnicodeDecodeError"),
    ],
    ids=["arrays", "objects", "brackets", "braces", "texts", "digits", "twice", "utf-16", "half"],
)
def test_texts_that_are_no_bundle(text, message) -> None:
    assert re.search(message, refused_or_works({}, b"", text))


def test_a_prior_in_a_prior() -> None:
    content = changed("nsf")
    for _ in range(300):
        content["prior"] = {"kind": "Independent", "base": content["prior"]}
    assert "too deep in each other" in refused_or_works(content, bundle("nsf")[1])


def test_a_model_that_takes_long_to_load_is_refused() -> None:
    content, weights = bundle("nsf")
    text = json.dumps(content).encode()
    with pytest.raises(InputError, match=r"it would take over 0 s to load"):
        read_bundle(text, weights, "m", most_seconds=1e-3)
    read_bundle(text, weights, "m", most_seconds=1.0)


# ---- weights ------------------------------------------------------------------------------------


def raw(header: dict[str, Any] | bytes, data: bytes = b"") -> bytes:
    """A safetensors file of any content."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: list[int], first: int, last: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


@pytest.mark.parametrize(
    "header",
    [
        lambda: (2**63).to_bytes(8, "little") + b"{}",
        lambda: raw(b"{" + b" " * 20_000_000 + b"}"),
        lambda: raw({"a": entry("F32", [2**31, 2**31], 0, 4)}, b"\0" * 4),
        lambda: raw({"a": entry("F32", [0, 2**62, 2**62], 0, 0)}),
        lambda: raw({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)}, b"\0" * 4),
        lambda: raw({"a": entry("F32", [10**9], 0, 4 * 10**9)}),
        lambda: raw({"a": entry("F32", [-1], 0, 4)}, b"\0" * 4),
        lambda: raw({"a": entry("F4", [1], 0, 4)}, b"\0" * 4),
        lambda: raw(b"[" * 100_000),
        lambda: raw({str(number): entry("F32", [0], 0, 0) for number in range(100_000)}),
    ],
    ids=range(10),
)
def test_headers_that_are_none(header) -> None:
    assert refused_or_works(bundle("nsf")[0], header() + b"\0" * 100_000)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32, torch.bool])
def test_weights_of_another_type_are_refused(dtype) -> None:
    content, weights = bundle("nsf")
    tensors = {name: value.to(dtype) for name, value in load(weights).items()}
    padding = {"padding": torch.zeros(10_000)}
    message = refused_or_works(content, save({**tensors, **padding}))
    assert re.search(rf"is {dtype} of", message)


@pytest.mark.parametrize("kind", ["nsf", "maf", "ensemble"])
def test_buffers_are_those_of_the_architecture(kind) -> None:
    """Indices of features beyond the last would be read from beyond a tensor on a GPU."""
    content, weights = bundle(kind)
    tensors = load(weights)
    buffers = [name for name in tensors if not name.endswith(("weight", "bias", "entries", "diag"))]
    assert len(buffers) >= 4
    for name in buffers:
        wrong = {**tensors, name: tensors[name] + 1000}
        assert "is not that of the architecture" in refused_or_works(content, save(wrong))


# ---- files --------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path) -> LocalStore:
    content, weights = bundle("nsf")
    model = LocalStore(tmp_path / "model")
    model.put(WEIGHTS, weights)
    model.put(BUNDLE, json.dumps(content).encode())
    return model


def test_files_without_an_end(store) -> None:
    load_bundle(store)
    for key in (BUNDLE, WEIGHTS):
        kept = store.get(key)
        store.delete(key)
        (store.root / key).symlink_to("/dev/zero")
        with pytest.raises(InputError, match=rf"holds no model \({key} is missing\)"):
            load_bundle(store)
        store.delete(key)
        store.put(key, kept)


def test_a_secret_file_is_not_shown(store, tmp_path) -> None:
    secret = tmp_path / "secret"
    secret.write_text('{"format": "hunter2", "x": 1')
    store.delete(BUNDLE)
    (store.root / BUNDLE).symlink_to(secret)
    with pytest.raises(InputError) as refused:
        load_bundle(store)
    assert "hunter2" not in str(refused.value)


# ---- sizes --------------------------------------------------------------------------------------

SIZES = st.fixed_dictionaries(
    {
        "estimator": st.sampled_from(["nsf", "maf"]),
        "transforms": st.integers(1, 4),
        "hidden_features": st.integers(1, 9),
        "blocks": st.integers(1, 3),
        "bins": st.integers(2, 7),
        "embedding_features": st.integers(1, 5),
        "embedding_hidden": st.integers(1, 40),
    }
)
SHAPES = st.one_of(
    st.tuples(st.just("none"), st.lists(st.integers(1, 5), max_size=3)),
    st.tuples(st.just("fully_connected"), st.lists(st.integers(1, 5), max_size=3)),
    st.tuples(
        st.just("permutation_invariant"), st.lists(st.integers(1, 5), min_size=1, max_size=2)
    ),
    st.tuples(st.just("convolutional_1d"), st.lists(st.integers(1, 300), min_size=1, max_size=2)),
    st.tuples(st.just("convolutional_2d"), st.lists(st.integers(1, 30), min_size=2, max_size=3)),
)


@settings(deadline=None, max_examples=100)
@given(SIZES, SHAPES, st.integers(1, 6))
def test_number_of_weights(options, embedded, features) -> None:
    """By arithmetic, and of the flow that is made."""
    embedding, shape = embedded
    estimator = made(features, tuple(shape), embedding=embedding, **options)
    assert num_weights(estimator.options, features, tuple(shape)) == estimator.num_weights
