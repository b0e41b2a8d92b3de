"""Operations past the dispatcher: who traces meets the registered one, versions count, no compiler is imported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from protnest.kernels.extension import load, missing_reason
from protnest.kernels.operator import Operator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

_calls: list[str] = []


def _double(x_N: torch.Tensor, out: Sequence[torch.Tensor]) -> None:
    _calls.append(type(x_N).__name__)
    for each in out:
        each.copy_(2 * x_N)


def _negate(x_N: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(-x_N.numpy())


double = Operator("protnest_test::double", _double, mutates={"out"})
negate = Operator("protnest_test::negate", _negate)
double.register_fake(lambda x_N, out: None)
negate.register_fake(torch.empty_like)


def test_writes_and_counts_versions() -> None:
    x_N, out_N = torch.arange(3.0), torch.zeros(3)
    before = out_N._version, x_N._version
    double(x_N, [out_N])
    assert out_N.tolist() == [0, 2, 4]
    assert out_N._version > before[0]
    assert x_N._version == before[1]
    with torch.inference_mode():
        double(x_N, [torch.zeros(3)])


def test_who_traces_meets_the_operation() -> None:
    graph = make_fx(lambda x_N: negate(x_N) + 1)(torch.ones(3))
    assert any("protnest_test.negate" in str(node.target) for node in graph.graph.nodes)
    assert torch.equal(graph(torch.arange(3.0)), 1 - torch.arange(3.0))
    with FakeTensorMode():
        assert negate(torch.ones(4)).shape == (4,)
    traced = torch.jit.trace(lambda x_N: negate(x_N), torch.ones(3))
    assert torch.equal(traced(torch.arange(3.0)), -torch.arange(3.0)), "numbers of the trace must not be kept"


def test_a_parameter_is_plain() -> None:
    _calls.clear()
    double(torch.nn.Parameter(torch.ones(2), requires_grad=False), [torch.zeros(2)])
    assert _calls == ["Parameter"]


@pytest.mark.skipif(load() is None, reason=f"cpu: {missing_reason()}")
def test_embedding_brings_no_compiler() -> None:
    """It takes 1.7 s to import, which is most of a short command."""
    program = (
        "import sys; from protnest.engine import load_model; "
        "[load_model('nano-xs', device='cpu', precision=p).encode(['MKT']) for p in ('fp32', 'int8')]; "
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
