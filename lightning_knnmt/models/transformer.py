"""The Transformer (Vaswani et al., 2017, arXiv:1706.03762), in the variants of published models."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from lightning_knnmt.models.adapter import (
    BottleneckAdapter,
    check_adapters,
    check_low_rank,
    insert_low_rank,
    residuals,
)
from lightning_knnmt.models.layers import (
    DecoderCache,
    DecoderLayer,
    EncoderLayer,
    LayerSettings,
)
from lightning_knnmt.models.linear import Linear
from lightning_knnmt.models.positions import Positions, draw_normal
from lightning_knnmt.models.settings import check_settings

KeyLayer = Literal["opl_input", "ffn_input"]
KEY_LAYERS: tuple[KeyLayer, ...] = ("opl_input", "ffn_input")


class DecoderStates(NamedTuple):
    """The decoder's output for the next token of each row or position.

    Attributes:
        hidden: The output projection's input: the decoder's output after its last layer norm,
            [..., D].
        ffn_input: The input of the last decoder layer's feed-forward network, [..., D]; None where
            only `hidden` is known, as for a datastore's keys.
    """

    hidden: Tensor
    ffn_input: Tensor | None = None

    def select(self, index: Tensor | slice) -> "DecoderStates":
        """The states of some rows or, given a mask, of some positions."""
        ffn_input = None if self.ffn_input is None else self.ffn_input[index]
        return DecoderStates(self.hidden[index], ffn_input)

    def of(self, key_layer: KeyLayer) -> Tensor:
        """One layer's inputs, [..., D].

        Raises:
            ValueError: If they are not known.
        """
        states = self.hidden if key_layer == "opl_input" else self.ffn_input
        if states is None:
            raise ValueError(
                f"These decoder states have no {key_layer}: pass what the model's decoder returned."
            )
        return states


class Memory(NamedTuple):
    """The encoder's output."""

    states: Tensor  # [B, S, D]
    mask: Tensor  # [B, S], True at tokens


class Transformer(nn.Module):
    """Encoder and decoder up to the hidden states that the output projection layer sees.

    The output projection belongs to the model but is applied by the caller:
    `model.output_projection(states.hidden)` gives the logits.

    Attributes:
        config: The constructor's arguments, plain types: `Transformer(**model.config)` rebuilds the
            architecture, including what was untied or inserted since. It has an entry `adapters`
            only if there are some.
        output_projection: W_O, the OPL; its weight may be the embeddings' (see `tied_embeddings`).
        max_positions: The longest source or target, in tokens.
    """

    output_projection: nn.Linear

    def __init__(
        self,
        *,
        vocab_size: int,
        source_vocab_size: int | None = None,
        pad_id: int,
        start_id: int,
        eos_id: int,
        model_dim: int = 512,
        num_heads: int = 8,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        encoder_ffn_dim: int = 2048,
        decoder_ffn_dim: int = 2048,
        dropout: float = 0.1,
        attention_dropout: float = 0.0,
        activation_dropout: float = 0.0,
        activation: Literal["relu", "gelu", "silu"] = "relu",
        norm: Literal["post", "pre"] = "post",
        layer_norm_eps: float = 1e-5,
        positions: Literal["sinusoidal", "sinusoidal_paper", "learned"] = "sinusoidal",
        position_offset: int = 0,
        max_positions: int = 1024,
        decoder_cell: Literal["attention", "ssru"] = "attention",
        tied_embeddings: Literal["all", "decoder", "embeddings", "none"] = "all",
        output_bias: bool = False,
        scale_embedding: bool = True,
        adapters: dict[str, Any] | None = None,
    ) -> None:
        """
        Args:
            source_vocab_size: Rows of a source embedding with its own ids; None if source and
                target share the vocabulary. Padding has the same id on both sides.
            pad_id: Its embedding is zero and gets no gradient from the inputs.
            start_id: The decoder's first input; the model only stores it, for decoding.
            eos_id: The token that ends a sentence; stored for decoding.
            attention_dropout: Dropout of attention weights.
            activation_dropout: Dropout inside the feed-forward layers, after the activation.
            norm: Layer norm after each residual connection ("post"), or before each sub-layer and
                at the end ("pre").
            positions: Sinusoids with the wavelengths of fairseq and Marian ("sinusoidal") or of the
                paper's formula ("sinusoidal_paper"), or a table to train ("learned").
            position_offset: The table's row for the first token: 0 in Marian, pad_id + 1 in
                fairseq.
            decoder_cell: The first sub-layer of a decoder layer: causal self-attention or an SSRU.
            tied_embeddings: Which matrices are the same: both embeddings and the output projection
                ("all"), target embedding and output projection ("decoder"), both embeddings
                ("embeddings"), or none ("none").
            scale_embedding: Multiply embeddings by sqrt(model_dim).
            adapters: The arguments of `insert_adapters` (without `init`) or `insert_lora`.
        """
        config = {k: v for k, v in locals().items() if k not in ("self", "__class__", "adapters")}
        super().__init__()
        self.config: dict[str, Any] = config
        check_settings(config)
        self.pad_id, self.start_id, self.eos_id = pad_id, start_id, eos_id
        self.max_positions = max_positions
        self._scale = model_dim**0.5 if scale_embedding else 1.0

        self.source_embedding = _embedding(source_vocab_size or vocab_size, model_dim, pad_id)
        self.target_embedding = (
            self.source_embedding
            if tied_embeddings in ("all", "embeddings")
            else _embedding(vocab_size, model_dim, pad_id)
        )
        self.source_positions = Positions(positions, max_positions, model_dim, position_offset)
        self.target_positions = Positions(positions, max_positions, model_dim, position_offset)
        self.embedding_dropout = nn.Dropout(dropout)

        def settings(ffn_dim: int) -> LayerSettings:
            return LayerSettings(
                model_dim=model_dim,
                num_heads=num_heads,
                ffn_dim=ffn_dim,
                activation=activation,
                norm=norm,
                layer_norm_eps=layer_norm_eps,
                dropout=dropout,
                attention_dropout=attention_dropout,
                activation_dropout=activation_dropout,
            )

        def final_norm() -> nn.Module:
            return nn.LayerNorm(model_dim, eps=layer_norm_eps) if norm == "pre" else nn.Identity()

        self.encoder_layers = nn.ModuleList(
            EncoderLayer(settings(encoder_ffn_dim)) for _ in range(encoder_layers)
        )
        self.encoder_norm = final_norm()
        self.decoder_layers = nn.ModuleList(
            DecoderLayer(settings(decoder_ffn_dim), decoder_cell) for _ in range(decoder_layers)
        )
        self.decoder_norm = final_norm()

        self.output_projection = Linear(model_dim, vocab_size, bias=output_bias)
        if tied_embeddings in ("embeddings", "none"):
            draw_normal(self.output_projection.weight, model_dim**-0.5)
        self.tie_weights()
        if output_bias:
            nn.init.zeros_(self.output_projection.bias)
        if adapters is not None:
            self.insert(adapters)

    @classmethod
    def assemble(cls, architecture: Mapping[str, Any], state: dict[str, Tensor]) -> Self:
        """A model, in evaluation mode, that uses the given tensors without copying them.

        Args:
            architecture: The constructor's arguments.
            state: Its state dict; tied matrices are the same tensor.

        Raises:
            ValueError: If the settings contradict each other, or a tensor has another shape.
            RuntimeError: If tensors are missing or left over.
        """
        with torch.device("meta"):  # its tensors are replaced anyway
            model = cls(**architecture)
        for name, expected in model.state_dict().items():
            if name in state and state[name].shape != expected.shape:
                raise ValueError(
                    f"the weights of {name} have shape {list(state[name].shape)}, but the settings "
                    f"and the other weights need {list(expected.shape)}."
                )
        model.load_state_dict(state, assign=True)
        model.tie_weights()
        return model.eval()

    def tie_weights(self) -> None:
        """Makes tied matrices the same parameter again.

        `load_state_dict(assign=True)` creates a separate parameter for each of them.
        """
        if self.config["tied_embeddings"] in ("all", "decoder"):
            self.output_projection.weight = self.target_embedding.weight

    def forward(self, source_ids: Tensor, decoder_input: Tensor) -> DecoderStates:
        """Teacher forcing: every target position at once.

        Args:
            source_ids: Padded on either side, [B, S].
            decoder_input: The start id, then the target, padded on the right, [B, T].

        Returns:
            The states from which each next target token is predicted, [B, T, D] each.
        """
        return self.decode(decoder_input, self.encode(source_ids))

    def encode(self, source_ids: Tensor) -> Memory:
        """Encodes sentences, [B, S], padded on either side."""
        self._check_length(source_ids.shape[1], "source")
        mask = source_ids != self.pad_id  # [B, S]
        x = self.source_embedding(source_ids) * self._scale + self.source_positions.of_tokens(mask)
        x = self.embedding_dropout(x)
        attention_mask = mask[:, None, None]  # [B, 1, 1, S]
        for layer in self.encoder_layers:
            x = layer(x, attention_mask)
        return Memory(self.encoder_norm(x), mask)

    def decode(self, decoder_input: Tensor, memory: Memory) -> DecoderStates:
        """Decodes whole targets, padded on the right: [B, T] -> [B, T, D] each."""
        length = decoder_input.shape[1]
        self._check_length(length, "target")
        x = self.target_embedding(decoder_input) * self._scale + self.target_positions.first(length)
        x = self.embedding_dropout(x)
        attention_mask = memory.mask[:, None, None]  # [B, 1, 1, S]
        for layer in self.decoder_layers:
            x, ffn_input = layer(x, memory.states, attention_mask)
        return DecoderStates(self.decoder_norm(x), ffn_input)

    def start(self, memory: Memory, beam_size: int) -> DecoderCache:
        """Starts step-by-step decoding of N = B * beam_size rows, a sentence's beams adjacent."""
        attention_mask = memory.mask[:, None, None]  # [B, 1, 1, S]
        layers = (layer for layer in self.decoder_layers if isinstance(layer, DecoderLayer))
        return DecoderCache(
            [each.start(memory.states, attention_mask, beam_size) for each in layers]
        )

    def decode_step(self, tokens: Tensor, cache: DecoderCache) -> DecoderStates:
        """Reads one more token of each row, [N]; returns the states for the next, [N, D] each."""
        self._check_length(cache.position + 1, "target")
        position = self.target_positions.at(cache.position)  # [D]
        x = torch.add(position, self.target_embedding(tokens), alpha=self._scale)
        for layer, layer_cache in zip(self._decoder, cache.layers, strict=True):
            x, ffn_input = layer.step(x, layer_cache)
        cache.position += 1
        return DecoderStates(self.decoder_norm(x), ffn_input)

    def untie_output_projection(self) -> None:
        """Gives the output projection its own copy of the weight that it shares."""
        untied = {"all": "embeddings", "decoder": "none"}
        tied = self.config["tied_embeddings"]
        if tied in untied:
            weight = self.output_projection.weight
            self.output_projection.weight = nn.Parameter(weight.detach().clone())
            self.config = self.config | {"tied_embeddings": untied[tied]}

    def insert_adapters(
        self,
        bottleneck_dim: int,
        placement: Literal["all", "ffn"] = "all",
        stacks: Literal["both", "encoder", "decoder"] = "both",
        init: Literal["identity", "plain"] = "identity",
    ) -> None:
        """Inserts an adapter at the end of residual branches.

        Args:
            bottleneck_dim: r, the inner dimension.
            placement: After every sub-layer, or after the feed-forward layers only.
            stacks: In the encoder, the decoder, or both.
            init: See `BottleneckAdapter`.

        Raises:
            ValueError: If the model already has adapters, or an argument is impossible.
        """
        check_adapters(self.config, bottleneck_dim, placement=placement, stacks=stacks, init=init)
        layers = [
            *(self.encoder_layers if stacks != "decoder" else ()),
            *(self.decoder_layers if stacks != "encoder" else ()),
        ]
        for residual in residuals(layers, placement):
            adapter = BottleneckAdapter(
                self.config["model_dim"],
                bottleneck_dim,
                dropout=self.config["dropout"],
                activation_dropout=self.config["activation_dropout"],
                zero_init=init == "identity",
            )
            residual.adapter = adapter.to(residual.norm.weight).train(self.training)
        settings = {"bottleneck_dim": bottleneck_dim, "placement": placement, "stacks": stacks}
        self.config = self.config | {"adapters": settings}

    def insert_lora(self, rank: int, alpha: float) -> None:
        """Adds low-rank updates to the attentions' and SSRUs' projections (see `adapter.py`).

        Raises:
            ValueError: If the model already has adapters, or an argument is impossible.
        """
        check_low_rank(self.config, rank, alpha)
        insert_low_rank(self, rank, alpha)
        self.config = self.config | {"adapters": {"rank": rank, "alpha": float(alpha)}}

    def insert(self, adapters: dict[str, Any]) -> None:
        """Inserts adapters of either kind, from another model's `config["adapters"]`."""
        (self.insert_lora if "rank" in adapters else self.insert_adapters)(**adapters)

    @property
    def _decoder(self) -> Iterable[DecoderLayer]:
        return cast(Iterable[DecoderLayer], self.decoder_layers)

    def _check_length(self, length: int, side: str) -> None:
        if length > self.max_positions:
            raise ValueError(
                f"A {side} of {length} tokens is longer than the model's {self.max_positions} "
                "positions: cut or skip long lines, or decode with a smaller max_length."
            )


def _embedding(vocab_size: int, model_dim: int, pad_id: int) -> nn.Embedding:
    # Without numbers of its own on the meta device: drawing some there would import torch's
    # compiler, which takes longer than all else that loading a model does.
    meta = torch.get_default_device().type == "meta"
    weight = torch.empty(vocab_size, model_dim) if meta else None
    embedding = nn.Embedding(vocab_size, model_dim, padding_idx=pad_id, _weight=weight)
    draw_normal(embedding.weight, model_dim**-0.5)
    with torch.no_grad():
        embedding.weight[pad_id].zero_()
    return embedding
