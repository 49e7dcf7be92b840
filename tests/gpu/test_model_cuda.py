"""The mathematics of tests/model once more, on CUDA and its kernels: `make gpu-check`."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2lab.model.activation import ACTIVATIONS
from gpt2lab.model.attend import attend
from gpt2lab.model.borders import Borders
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.model.moe import GroupedLinear, MoE, Routing
from tests.model import test_borders, test_moe
from tests.model.test_attention import LENGTHS_AND_WINDOWS, attend_with_a_mask, with_gradients
from tests.model.test_variants import (
    LONG,
    SHAPE,
    SHORT,
    VARIANTS,
    assert_bf16_is_near,
    assert_causal,
    build,
    each,
    each_variant,
    greedy,
    looks_back,
    tokens,
)
from tests.reference import assert_differ, assert_same, difference

DEVICE = "cuda"
A_FEW = {name: VARIANTS[name] for name in ["learned-mha-full", "rope-gqa-windows-3-7", "rope-mqa-window-4-full"]}
"""For what takes long: each idea is in one of them."""

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: `make gpu-check` needs one")


@pytest.fixture(autouse=True)
def _exact_products() -> None:
    assert torch.get_float32_matmul_precision() == "highest", "TF32 is on, so fp32 is not what is compared"


def on_both(variant: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[GPT2, GPT2]:
    """One model on the CPU in float64, and the same weights on the GPU."""
    cpu, gpu = build(variant).double(), build(variant).to(DEVICE, dtype)
    assert (cpu.device.type, gpu.device.type) == ("cpu", DEVICE)
    return cpu, gpu


def gradients(model: GPT2, token_ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    token_ids = token_ids.to(model.device)
    model(token_ids[:, :-1], token_ids[:, 1:]).mean().backward()
    return {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}


@each_variant
@pytest.mark.parametrize("time", [SHORT, LONG])
def test_logits_and_gradients_are_the_cpu_s(variant: dict[str, Any], time: int) -> None:
    (cpu, gpu), token_ids = on_both(variant), tokens(2, time)
    logits = gpu(token_ids.to(DEVICE)).cpu()
    assert_same(logits, cpu(token_ids), within=1e-4)
    other = GPT2(**variant | {"windows": [2]}).double()
    other.load_state_dict(cpu.state_dict())
    assert_differ(logits, other(token_ids), by=1e-2, what="another window")
    truth = gradients(cpu, token_ids)
    for name, gradient in gradients(gpu, token_ids).items():
        assert_same(gradient, truth[name], within=1e-3 * truth[name].abs().max().item(), what=name)


@each_variant
@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bf16_is_near(variant: dict[str, Any], how: str) -> None:
    assert_bf16_is_near(variant, how, DEVICE)


@each_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_logit_depends_on_exactly_the_tokens_in_reach(variant: dict[str, Any], dtype: torch.dtype) -> None:
    """The fused kernels differ by type, and each has a mask of its own."""
    model = build(variant).to(DEVICE, dtype)
    assert_causal(model, tokens(2, SHORT).to(DEVICE), range(SHORT))
    assert_causal(model, tokens(1, LONG).to(DEVICE), [0, 5, 63, 64, 65, 127, 128, LONG - 1])


@each_variant
@torch.no_grad()
def test_decoding_with_a_cache_is_one_forward_pass(variant: dict[str, Any]) -> None:
    model, token_ids = build(variant).to(DEVICE, torch.float64), tokens(2, LONG).to(DEVICE)
    truth, cache = model(token_ids), model.new_cache(2, LONG)
    assert {layer.keys.device.type for layer in cache} == {DEVICE}
    pieces = [model(chunk, cache=cache) for chunk in token_ids.split([40, *[1] * 60, LONG - 100], dim=1)]
    assert_same(torch.cat(pieces, dim=1), truth, within=1e-11)
    cache.truncate(LONG - 20)
    assert_same(model(token_ids[:, -20:], cache=cache), truth[:, -20:], within=1e-11)
    assert_differ(pieces[0], truth[:, 1:41], by=1e-3, what="one token late")


@each_variant
def test_greedy_text_is_the_cpu_s(variant: dict[str, Any]) -> None:
    (cpu, gpu), prompts = on_both(variant, torch.float64), tokens(4, 50)
    text = greedy(gpu, prompts.to(DEVICE), 30, gpu.new_cache(4, 80))
    assert torch.equal(text, greedy(gpu, prompts.to(DEVICE), 30))
    assert torch.equal(text.cpu(), greedy(cpu, prompts, 30))
    assert not torch.equal(text.cpu(), greedy(cpu, prompts.flip(0), 30))


@each(A_FEW)
@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.filterwarnings("default")  # the compiler warns of itself
def test_the_compiled_model_is_the_model(variant: dict[str, Any]) -> None:
    cpu, gpu = on_both(variant)
    compiled = torch.compile(gpu)
    for time in [SHORT, LONG]:
        token_ids = tokens(2, time)
        assert_same(compiled(token_ids.to(DEVICE)).cpu(), cpu(token_ids), within=1e-4)
        assert_differ(compiled(token_ids.to(DEVICE)).cpu(), cpu(token_ids.flip(1)), by=1e-2, what="another text")
    gpu.zero_grad()
    ids = tokens(2, LONG)
    compiled(ids[:, :-1].to(DEVICE), ids[:, 1:].to(DEVICE)).mean().backward()
    truth = gradients(cpu, ids)
    for name, parameter in gpu.named_parameters():
        assert_same(parameter.grad.cpu(), truth[name], within=1e-3 * truth[name].abs().max().item(), what=name)
    torch._dynamo.reset()


@pytest.mark.parametrize(("time", "window"), LENGTHS_AND_WINDOWS)
@pytest.mark.parametrize("group", [1, 3])
def test_blocks_are_the_masked_square(time: int, window: int, group: int, in_blocks: list[int]) -> None:
    q, k, v = (torch.randn(2, heads, time, 8, dtype=torch.float64, device=DEVICE) for heads in (2 * group, 2, 2))
    direction = torch.randn_like(q)
    ours = with_gradients(attend, q, k, v, window, direction)
    assert in_blocks == [window]
    truth = with_gradients(attend_with_a_mask, q, k, v, window, direction)
    wrong = with_gradients(attend_with_a_mask, q, k, v, window + 1, direction)
    for name, ours_, truth_, wrong_ in zip(["out", "dq", "dk", "dv"], ours, truth, wrong, strict=True):
        assert_same(ours_.cpu(), truth_.cpu(), within=1e-12, what=name)
        assert_differ(ours_.cpu(), wrong_.cpu(), by=1e-2, what=f"{name}, window one too wide")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_window_does_not_pay_for_the_square(dtype: torch.dtype) -> None:
    """Peak memory of forward and backward: in proportion to the length, and far below that of one masked square."""

    def peak(function: Any, time: int) -> int:
        q, k, v = (
            torch.randn(1, heads, time, 64, dtype=dtype, device=DEVICE, requires_grad=True) for heads in (4, 2, 2)
        )
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function(q, k, v, window=64).float().sum().backward()
        return torch.cuda.max_memory_allocated() - before

    peak(attend, 1024)  # the libraries take their workspace once
    blocks, twice, square = peak(attend, 16_384), peak(attend, 32_768), peak(attend_with_a_mask, 16_384)
    print(
        f"{blocks / 2**20:.0f} MiB in blocks, {twice / 2**20:.0f} at twice the length, {square / 2**20:.0f} for the square"
    )
    assert twice < 2.2 * blocks and 4 * blocks < square


def test_first_weights_are_drawn_on_the_device() -> None:
    with torch.device(DEVICE):
        models = [GPT2(**SHAPE, generator=torch.Generator(DEVICE).manual_seed(seed)) for seed in (0, 0, 1)]
    first, again, other = (model.token_embedding.weight for model in models)
    assert first.device.type == DEVICE and first.std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(first, again) and not torch.equal(first, other)


# --- Experts: in fp32 a loop, in bf16 one kernel for all --------------------------------------------------------------

ROUTED = {"as they like": None, "all to the second": 1}
"""To which expert every token is sent; the others have nothing to do, which kernels must bear."""
each_routed = pytest.mark.parametrize("first", ROUTED.values(), ids=ROUTED)


def experts(activation: str, bias: bool, first: int | None, embed: int = 32) -> tuple[MoE, Tensor]:
    """In float64 on the CPU: two of four experts a token, and 90 tokens of which each begins with 1."""
    torch.manual_seed(0)
    moe, x = test_moe.experts(embed, 24, 4, 2, activation, bias=bias), torch.randn(2, 45, embed, dtype=torch.float64)
    x[..., 0] = 1
    return (moe if first is None else test_moe.all_to(first, moe)), x


def outcome(moe: MoE, x: Tensor) -> tuple[dict[str, Tensor], Routing]:
    """What comes out, and the gradients of everything along a fixed direction, on the CPU."""
    x, routing = x.to(moe.router.weight).requires_grad_(), Routing()
    out = moe(x, routing)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    inputs = {"x": x, **dict(moe.named_parameters())}
    found = torch.autograd.grad(out, list(inputs.values()), direction)
    return {"out": out.detach().cpu()} | {name: g.cpu() for name, g in zip(inputs, found, strict=True)}, routing


@each_routed
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_experts_are_the_cpu_s(activation: str, bias: bool, first: int | None) -> None:
    moe, x = experts(activation, bias, first)
    truth, routing = outcome(moe, x)
    ours, routing_there = outcome(moe.to(DEVICE, torch.float32), x)
    for name, tensor in ours.items():
        assert_same(tensor, truth[name], within=1e-5 * truth[name].abs().max().item(), what=name)
    assert routing_there.counts[0].tolist() == routing.counts[0].tolist()
    assert_same(routing_there.balance_loss.cpu(), routing.balance_loss, within=1e-5)
    assert_same(routing_there.z_loss.cpu(), routing.z_loss, within=1e-4)
    with torch.no_grad():
        moe.up_proj.weight.copy_(moe.up_proj.weight.roll(1, 0))
    other, _ = outcome(moe, x)
    assert_differ(other["out"], truth["out"], by=1e-2, what="experts in another order")


@each_routed
@pytest.mark.parametrize("embed", [32, 20])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_one_kernel_for_all_experts_is_the_loop(
    how: str, bias: bool, embed: int, first: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes widths that are multiples of 8; others go through the loop."""
    exact, x = experts("swiglu", bias, first, embed)
    exact, x = exact.bfloat16().double(), x.bfloat16().double()  # what bf16 can hold, so that all choose the same
    truth, routing = outcome(exact, x)
    moe = exact.to(DEVICE, torch.bfloat16 if how == "weights" else torch.float32)
    calls: list[int] = []
    kernel = F.grouped_mm

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return kernel(*args, **kwargs)

    def run() -> dict[str, Tensor]:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=how == "autocast"):
            found, decided = outcome(moe, x)
        assert found["out"].dtype == torch.bfloat16
        assert decided.counts[0].tolist() == routing.counts[0].tolist()
        return found

    monkeypatch.setattr(F, "grouped_mm", counted)
    fused = run()
    assert len(calls) == (2 if embed % 8 == 0 else 0)
    monkeypatch.delattr(F, "grouped_mm")
    loop = run()
    assert len(calls) == (2 if embed % 8 == 0 else 0)
    for name, exactly in truth.items():
        scale = exactly.abs().mean().item()
        far = {what: difference(found[name], exactly) for what, found in (("fused", fused), ("loop", loop))}
        print(f"{name}: fused {far['fused'] / scale:.3g}, loop {far['loop'] / scale:.3g} of the mean")
        assert (fused[name].double() - exactly).abs().mean() <= 0.02 * scale, name
        assert (fused[name].double() - loop[name].double()).abs().mean() <= 0.02 * scale, name
        idle = exactly == 0
        assert not fused[name][idle].any(), f"{name} of experts without tokens"
    assert (fused["out"] - truth["out"].roll(1, 1)).abs().mean() > 0.5 * truth["out"].abs().mean()


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_the_gradient_of_a_bias_is_a_sum_over_many_rows(how: str) -> None:
    """In bf16, 256 + 1 is 256: whoever adds up thousands of rows one by one stops there."""
    layer = GroupedLinear(3, 16, 16).to(DEVICE, torch.bfloat16 if how == "weights" else torch.float32)
    counts = torch.tensor([1000, 0, 7192], device=DEVICE)
    x = torch.randn(8192, 16, device=DEVICE).to(layer.weight.dtype)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=how == "autocast"):
        out = layer(x, counts)
    out.backward(torch.ones_like(out))
    expected = counts[:, None].double().expand(3, 16).cpu()
    assert_same(layer.bias.grad.cpu(), expected, within=40)  # bf16 knows 7192 to within 32
    assert_differ(layer.bias.grad.cpu(), expected.clamp(max=256), by=500, what="as if it stopped at 256")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_do_the_same_twice_to_the_bit(dtype: torch.dtype) -> None:
    moe, x = experts("gelu_tanh", True, None)
    moe = moe.to(DEVICE, dtype)
    (first, _), (second, _) = outcome(moe, x), outcome(moe, x)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert not torch.equal(first["out"], outcome(moe, x.flip(1))[0]["out"])


@each_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_documents_that_share_a_sequence_are_each_alone(variant: dict[str, Any], dtype: torch.dtype) -> None:
    """The losses and one gradient of the CPU, in float64; rough in bf16, where a mask chooses another kernel."""
    (cpu, gpu), (token_ids, _) = on_both(variant, dtype), test_borders.packed()
    rough = 1.0 if dtype == torch.float32 else 100.0

    def losses(model: GPT2, borders: Borders) -> Tensor:
        model.zero_grad()
        ids = token_ids.to(model.device)
        found = model(ids, ids.roll(-1, 1), **borders(ids))
        found.mean().backward()
        return found.detach().double().cpu()

    ours, truth = losses(gpu, test_borders.ALONE), losses(cpu, test_borders.ALONE)
    assert ((ours - truth).abs().mean() / truth.std()).item() < 1e-3 * rough
    name = "token_embedding.weight"
    gradient, true_gradient = (model.get_parameter(name).grad.double().cpu() for model in (gpu, cpu))
    assert (gradient - true_gradient).norm() < 3e-3 * rough * true_gradient.norm()
    if looks_back(cpu.config):
        assert ((losses(cpu, Borders(test_borders.END)) - truth).abs().mean() / truth.std()).item() > 3e-3
