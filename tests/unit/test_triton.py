"""The fused kernels without a GPU: in Triton's interpreter, and compiled for an H100."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from nflows import transforms

from sbi_dist.estimation.density_estimator import DensityEstimator
from sbi_dist.estimation.flow import ConditionalFlow
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.estimation.standardize import Standardization
from sbi_dist.posterior.sampler.compiled import CompiledEstimator
from sbi_dist.posterior.sampler.program import FlowProgram, compile_flow
from sbi_dist.posterior.sampler.step import Unknown
from sbi_dist.posterior.sampler.triton_choice import fused_flow
from sbi_dist.posterior.sampler.triton_pack import pack

LAUNCH = "sbi_dist.posterior.sampler.triton_launch"
ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def made(features: int, **options: Any) -> tuple[FlowProgram, Any]:
    transform = ConditionalFlow(TrainOptions(**options), features, (4,)).flow._transform
    return compile_flow(transform, features).to(torch.zeros(())), transform


@needs_triton
def test_in_the_interpreter() -> None:
    """In a process of its own: Triton interprets from its import on, or not at all."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
    }
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
         "tests/unit/interpreted_triton.py"],
        cwd=ROOT, env={**environment, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr


@needs_triton
@pytest.mark.parametrize(
    ("estimator", "one", "log_q"), [("nsf", True, False), ("maf", False, True)]
)
def test_they_compile_for_an_h100(estimator, one, log_q, tmp_path, monkeypatch) -> None:
    """The interpreter takes what the compiler does not."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sbi_dist.posterior.sampler.triton_launch import FusedFlow

    program, transform = made(3, estimator=estimator)
    fused = FusedFlow(program, transform, torch.device("cpu"))
    kernel: Any = fused._kernel
    chosen = {"BLOCK": 64, "ONE": one, "WHICH": False, "GIVEN": not one, "LOG_Q": log_q}
    chosen |= fused._packed.sizes
    types = dict.fromkeys(kernel.arg_names, "*fp32") | dict.fromkeys(chosen, "constexpr")
    types |= {"keys": "*i64", "which": "*i32", "halves": "*fp16", "table": "*i32"}
    types |= {"draws": "i32", "observations": "i32", "first": "i64"}
    types |= {"apart": "i64", "by_draw": "i32", "by_row": "i32"}
    constants = {(kernel.arg_names.index(name),): value for name, value in chosen.items()}
    # Tensors begin at multiples of 16 bytes, and Triton is told so.
    names = [name for name in kernel.arg_names if types[name].startswith("*")]
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in names}
    compiled = triton.compile(
        ASTSource(kernel, types, constants, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": fused._warps, "num_stages": fused._stages},
    )
    assert "wgmma" in compiled.asm["ptx"]
    # Three at once on a multiprocessor, which has 228 KB.
    assert compiled.metadata.shared < 75_000


@pytest.mark.parametrize(
    ("features", "options", "why"),
    [
        (33, {}, "32 parameters"),
        (2, {"hidden_features": 129}, "128 units"),
        (2, {"bins": 33}, "32 bins"),
        (2, {"estimator": "maf", "blocks": 4}, "3 blocks"),
    ],
)
def test_what_is_too_large_for_a_kernel(features, options, why) -> None:
    with pytest.raises(Unknown, match=why):
        pack(*made(features, transforms=1, **options))


def test_flows_of_another_form() -> None:
    nsf, maf = (made(2, estimator=kind, transforms=1)[1]._transforms for kind in ("nsf", "maf"))
    for layers, why in (([*nsf, *maf[1:]], "different kinds"), (nsf[1:], "another order")):
        flow = transforms.CompositeTransform(layers)
        with pytest.raises(Unknown, match=why):
            pack(compile_flow(flow, 2).to(torch.zeros(())), flow)


def test_weights_out_of_range() -> None:
    program, transform = made(2)
    with torch.no_grad():
        for weight in transform.parameters():
            weight.mul_(1e6)
    with pytest.raises(Unknown, match="range"):
        pack(program, transform)


def test_it_is_said_which_way_is_taken(monkeypatch) -> None:
    program, transform = made(2)
    assert fused_flow(program, transform, torch.zeros(())) == (None, "compiled")
    like: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float64)
    fused, how = fused_flow(program, transform, like)
    assert fused is None and "not torch.float64" in how
    like.dtype = torch.float32
    monkeypatch.setitem(sys.modules, LAUNCH, None)
    fused, how = fused_flow(program, transform, like)
    assert fused is None and "install triton" in how

    class Fused:
        def __init__(self, *given: Any) -> None:
            raise RuntimeError("no C compiler")

    monkeypatch.setitem(sys.modules, LAUNCH, SimpleNamespace(FusedFlow=Fused))
    fused, how = fused_flow(program, transform, like)
    assert fused is None and "no C compiler" in how


@pytest.mark.parametrize("kind", ["nsf", "maf"])
@torch.inference_mode()
def test_all_of_it_is_on_one_device(kind) -> None:
    """The steps' way, on a device that has no numbers but tells when another one's are mixed in."""
    rng, box = np.random.default_rng(0), (np.full(3, -2.0), np.full(3, 2.0))
    theta, x = rng.uniform(-2, 2, (50, 3)), rng.normal(size=(50, 4))
    scales = Standardization.fit(theta, x, *box, "asinh")
    with torch.inference_mode(False):
        estimator = DensityEstimator(TrainOptions(estimator=kind, transforms=2), scales, (4,))
        member = CompiledEstimator(estimator.eval(), torch.device("meta"))
    conditions = member.conditions(torch.zeros(30, 4))
    keys = torch.zeros((30, 2), dtype=torch.int64, device="meta")
    draws, log_q = member.draw(keys, 0, 20, conditions, with_log_prob=True)
    assert draws.shape == (3, 20, 30) and log_q is not None
    assert member.log_prob(draws.permute(1, 2, 0), conditions).shape == log_q.shape
    noise, which = draws[:, 0], torch.zeros(30, dtype=torch.int64, device="meta")
    assert member.sample_columns(noise, conditions, which, apart=False).device.type == "meta"
    assert estimator.standardization.theta_sd.device.type == "cpu"
