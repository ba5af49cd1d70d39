"""Token losses in chunks: equal to plain autograd over all logits, for any weights and any chunk."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from loralab.models import token_loss
from loralab.models.token_loss import token_losses, token_statistics

N, D, V = 23, 8, 31
Tail = Callable[[Tensor], Tensor]
TAILS: dict[str, Tail] = {
    "plain": lambda logits: logits,
    "scaled": lambda logits: logits * 0.25,
    "capped": lambda logits: 3.0 * torch.tanh(logits / 3.0),
}


@pytest.fixture(params=[1, 4, 22, 23, 1000], ids=lambda rows: f"{rows} a chunk")
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(token_loss, "CHUNK_ELEMENTS", request.param * V)
    monkeypatch.setattr(token_loss, "_BLOCKED_FACTORS", {"in place": 1, "beside": 1})
    monkeypatch.setattr(token_loss, "_BLOCK_ELEMENTS", 3 * V)  # several blocks in most chunks, the last one short
    return int(request.param)


def parts(*, trained: bool, bias: bool = True) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """Return head, hidden states, labels and a weight for each loss."""
    torch.manual_seed(0)
    head = nn.Linear(D, V, bias=bias).requires_grad_(trained)
    return head, torch.randn(N, D, requires_grad=True), torch.randint(V, (N,)), torch.randn(N)


def expected(head: nn.Linear, hidden: Tensor, labels: Tensor, tail: Tail) -> Tensor:
    return functional.cross_entropy(tail(head(hidden)), labels, reduction="none")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("how", ["frozen", "frozen, logits spared", "trained"])
def test_losses_and_gradients_are_those_of_all_logits(chunk: int, how: str, tail: str, bias: bool) -> None:
    trained, spare = how == "trained", "spared" in how and tail != "capped"
    head, hidden, labels, weights = parts(trained=trained, bias=bias)
    seen: list[int] = []

    def chunked(states: Tensor, positions: slice) -> Tensor:
        assert torch.equal(states, hidden[positions])
        seen.append(len(states))
        return TAILS[tail](head(states))

    wanted = expected(head, hidden, labels, TAILS[tail])
    leaves = [hidden, *(weight for weight in head.parameters() if trained)]
    gradients = torch.autograd.grad((wanted * weights).sum(), leaves)
    result = token_losses(chunked, hidden, labels, vocabulary=V, trained_head=trained, spare=spare)
    torch.testing.assert_close(result.losses, wanted)
    assert max(seen) <= chunk
    assert sum(seen) == N
    found = torch.autograd.grad((result.losses * weights).sum(), leaves)
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other)
    assert (result.entropies, result.correct) == (None, None)


def test_logits_that_a_gradient_needs_are_never_written_over_in_silence() -> None:
    head, hidden, labels, _ = parts(trained=False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        token_losses(
            lambda h, _: TAILS["capped"](head(h)).tanh(), hidden, labels, vocabulary=V, trained_head=False, spare=True
        )


def test_frozen_head_is_done_when_the_forward_ends(chunk: int) -> None:
    """The backward sweep calls the head no more; with a trained head each chunk is computed again."""
    for trained, again in ((False, 0), (True, -(-N // chunk))):
        head, hidden, labels, _ = parts(trained=trained)
        calls: list[int] = []

        def counted(states: Tensor, _: slice, head: nn.Linear = head, calls: list[int] = calls) -> Tensor:
            calls.append(len(states))
            logits: Tensor = head(states)
            return logits

        losses = token_losses(counted, hidden, labels, vocabulary=V, trained_head=trained).losses
        before = len(calls)
        losses.sum().backward()
        assert len(calls) - before == again
        assert all(weight.grad is None for weight in head.parameters()) is not trained


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_half_precision_gives_float32_losses(chunk: int, trained: bool) -> None:
    head, hidden, labels, _ = parts(trained=trained)
    head, states = head.bfloat16(), hidden.detach().bfloat16().requires_grad_()
    losses = token_losses(lambda h, _: head(h), states, labels, vocabulary=V, trained_head=trained).losses
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, functional.cross_entropy(head(states).float(), labels, reduction="none"))
    losses.sum().backward()
    assert states.grad is not None
    assert states.grad.dtype == torch.bfloat16


def test_no_gradient_is_formed_where_none_is_wanted(chunk: int) -> None:
    head, hidden, labels, _ = parts(trained=False)
    with torch.no_grad():
        losses = token_losses(lambda h, _: head(h), hidden, labels, vocabulary=V, trained_head=False).losses
    assert not losses.requires_grad
    torch.testing.assert_close(losses, expected(head, hidden, labels, TAILS["plain"]))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_statistics_are_those_of_the_distribution(chunk: int, mode: Callable[[], torch.no_grad]) -> None:
    head, hidden, labels, _ = parts(trained=False)
    with mode():
        found = token_statistics(lambda h, _: head(h), hidden, labels, vocabulary=V)
        logits = head(hidden)
    likely = torch.distributions.Categorical(logits=logits.double())
    assert found.entropies is not None
    assert found.correct is not None
    torch.testing.assert_close(found.losses.double(), -likely.log_prob(labels), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.entropies.double(), likely.entropy(), rtol=1e-5, atol=1e-6)
    assert torch.equal(found.correct, logits.argmax(dim=-1) == labels)
    assert found.predicted is not None
    assert torch.equal(found.predicted, logits.argmax(dim=-1))
    assert [value.dtype for value in found] == [torch.float32, torch.float32, torch.bool, torch.int64]


def test_entropy_of_tokens_that_cannot_be_is_finite() -> None:
    def head(states: Tensor, _: slice) -> Tensor:
        logits = torch.zeros(len(states), V)
        logits[:, 3:] = -torch.inf
        return logits

    found = token_statistics(head, torch.zeros(N, D), torch.ones(N, dtype=torch.long), vocabulary=V)
    assert found.entropies is not None
    torch.testing.assert_close(found.entropies, torch.full((N,), 3.0).log())
    torch.testing.assert_close(found.losses, found.entropies)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("high", [1e4, "max", torch.inf])
@pytest.mark.parametrize("low", [-1e4, "min", -torch.inf])
def test_extreme_logits_give_numbers(dtype: torch.dtype, high: float | str, low: float | str) -> None:
    limits = torch.finfo(dtype)
    logits = torch.zeros(4, V, dtype=dtype)
    logits[:, 1:] = limits.min if low == "min" else low
    logits[:, 2] = limits.max if high == "max" else high
    logits[3] = limits.max if high == "max" else high  # all alike
    labels = torch.tensor([2, 0, 1, 2])
    found = token_statistics(lambda _, chunk: logits[chunk], torch.zeros(4, D), labels, vocabulary=V)
    assert found.entropies is not None
    assert found.correct is not None
    assert found.losses.isfinite().all()
    assert found.losses[0] == 0
    assert found.losses[2] >= found.losses[1] > 9000
    torch.testing.assert_close(found.losses[3:], torch.tensor([float(V)]).log())
    torch.testing.assert_close(found.entropies, torch.tensor([0.0, 0.0, 0.0, float(torch.tensor(V).log())]))
    assert found.correct[:3].tolist() == [True, False, False]
    assert (found.losses[1] - found.losses[2]).isfinite()


def test_a_model_that_gives_no_numbers_is_not_hidden() -> None:
    logits = torch.zeros(1, V)
    logits[0, 4] = torch.nan
    found = token_statistics(lambda _, chunk: logits[chunk], torch.zeros(1, D), torch.tensor([0]), vocabulary=V)
    assert found.entropies is not None
    assert found.losses.isnan().all()
    assert found.entropies.isnan().all()
