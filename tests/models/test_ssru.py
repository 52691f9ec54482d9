import torch

from lightning_knnmt.models.ssru import SSRU


def random_cell(dim: int) -> SSRU:
    torch.manual_seed(0)
    cell = SSRU(dim)
    torch.nn.init.normal_(cell.forget_bias)
    return cell


def test_forward_is_the_published_recurrence() -> None:
    cell = random_cell(4).double()
    x = torch.randn(2, 6, 4, dtype=torch.double)
    w, w_forget = cell.candidate_forget.weight.chunk(2)
    c = torch.zeros(2, 4, dtype=torch.double)
    expected = []
    for t in range(6):
        f = 1 / (1 + torch.exp(-(x[:, t] @ w_forget.T + cell.forget_bias)))
        c = f * c + (1 - f) * (x[:, t] @ w.T)
        expected.append(c.clamp(min=0))
    # The cell works in float32.
    torch.testing.assert_close(cell(x), torch.stack(expected, 1), rtol=1e-5, atol=1e-6)


def test_steps_have_the_states_of_the_whole_sequence() -> None:
    cell = random_cell(8)
    x = torch.randn(3, 20, 8)
    state = cell.start(3, x)
    steps = torch.stack([cell.step(x[:, t], state) for t in range(20)], dim=1)
    torch.testing.assert_close(steps, cell(x), rtol=1e-6, atol=1e-6)


def test_reordered_rows_continue_what_their_source_began() -> None:
    cell = random_cell(8)
    x = torch.randn(2, 8)
    state = cell.start(2, x)
    cell.step(x, state)
    state.reorder(torch.tensor([1, 1, 0]))
    torch.testing.assert_close(
        cell.step(x[[1, 1, 0]], state), cell(x[[1, 1, 0], None].repeat(1, 2, 1))[:, 1]
    )


def test_gradients_reach_every_weight_from_the_last_step() -> None:
    cell = random_cell(8)
    x = torch.randn(2, 5, 8, requires_grad=True)
    cell(x)[:, -1].sum().backward()
    assert x.grad is not None
    assert x.grad[:, 0].abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in cell.parameters())


def test_bfloat16_weights_keep_a_float32_state() -> None:
    cell = random_cell(8).bfloat16()
    x = torch.randn(2, 8).bfloat16()
    state = cell.start(2, x)
    assert cell.step(x, state).dtype == torch.bfloat16
    assert state.value.dtype == torch.float32
