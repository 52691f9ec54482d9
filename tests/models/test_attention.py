import torch

from lightning_knnmt.models.attention import CrossAttention, KeyValueCache, SelfAttention


def test_self_attention_steps_give_what_the_whole_sequence_gives() -> None:
    torch.manual_seed(0)
    attention = SelfAttention(model_dim=16, num_heads=4, dropout=0.0).eval()
    x = torch.randn(3, 40, 16)  # longer than the cache's first room, twice
    cache = attention.start(3, x)
    steps = torch.stack([attention.step(x[:, i], cache) for i in range(40)], dim=1)
    torch.testing.assert_close(steps, attention(x), rtol=1e-5, atol=1e-5)


def test_key_value_cache_keeps_what_was_appended_after_growing_and_reordering() -> None:
    cache = KeyValueCache(num_rows=2, num_heads=1, head_dim=1, like=torch.zeros(1))
    for position in range(20):
        cache.append(torch.tensor([position, 100.0 + position]).view(1, 2, 1, 1).expand(2, 2, 1, 1))
        if position == 4:
            cache.reorder(torch.tensor([1, 0, 1]))
            cache.reorder(torch.tensor([0, 1]))
    keys, values = cache.append(torch.zeros(2, 2, 1, 1))
    first = [100.0 + i for i in range(5)] + [float(i) for i in range(5, 20)] + [0.0]
    second = [float(i) for i in range(5)] + [100.0 + i for i in range(5, 20)] + [0.0]
    room = [0.0] * (-21 % KeyValueCache.ROOM)
    assert cache.length == 21
    assert keys.flatten(1).tolist() == [first + room, second + room]
    assert values.flatten(1).tolist() == [first + room, second + room]


def test_cross_attention_of_all_beams_together_is_that_of_each_alone() -> None:
    torch.manual_seed(0)
    attention = CrossAttention(model_dim=16, num_heads=4, dropout=0.0).eval()
    states = torch.randn(2, 5, 16)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])[:, None, None]
    x = torch.randn(6, 16)  # 2 sentences, 3 beams each
    together = attention.step(x, attention.start(states, mask))
    alone = attention(
        x.view(6, 1, 16), states.repeat_interleave(3, 0), mask.repeat_interleave(3, 0)
    )
    torch.testing.assert_close(together, alone.squeeze(1), rtol=1e-5, atol=1e-5)


def test_attention_dropout_works_in_training_only() -> None:
    torch.manual_seed(0)
    attention = SelfAttention(model_dim=16, num_heads=4, dropout=0.5)
    x = torch.randn(2, 6, 16)
    assert not torch.equal(attention(x), attention(x))
    attention.eval()
    assert torch.equal(attention(x), attention(x))
