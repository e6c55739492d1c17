"""A byte-level transformer of GPT's kind (Radford et al., 2019): plain torch, nothing in it knows of noise."""

import torch
from torch import nn
from torch.nn import functional as F

BYTES = 256


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [batch, time, width]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [batch, heads, time, size]
        return self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a perceptron, each behind its norm and beside the residual stream."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.expand, self.reduce = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.reduce(F.gelu(self.expand(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """tokens ``[batch, time]`` -> logits ``[batch, time, 256]``; the output layer shares the embedding's weight.

    Raises:
        ValueError: width is no multiple of 32, the size of a head.
    """

    def __init__(self, layers: int, width: int, context: int):
        super().__init__()
        if width < 32 or width % 32:
            raise ValueError(f"GPT: width must be a multiple of 32, got {width}")
        self.context = context
        self.embedding, self.positions = nn.Embedding(BYTES, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, width // 32) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, BYTES, bias=False)
        for table in (self.embedding, self.positions):
            nn.init.normal_(table.weight, std=0.02)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))

    @torch.no_grad()
    def continuation(self, prompt: bytes, length: int, temperature: float = 0.8) -> bytes:
        """``prompt`` and ``length`` bytes that the model writes behind it."""
        text = torch.tensor([list(prompt)], device=self.head.weight.device)
        for _ in range(length):
            logits = self(text[:, -self.context :])[:, -1].float()
            text = torch.cat([text, (logits / temperature).softmax(-1).multinomial(1)], 1)
        return bytes(text[0].tolist())
