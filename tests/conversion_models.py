"""Models that the conversion tests share."""

import torch
from torch import nn


class GPT(nn.Module):
    """What a small language model looks like: embeddings, causal attention, an output that shares its weight."""

    def __init__(self, tied=True):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(11, 8), nn.Embedding(6, 8)
        block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, index):
        length = index.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        x = self.wte(index) + self.wpe(torch.arange(length))
        return self.head(self.blocks(x, mask, is_causal=True))


INDEX = torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(0))
LAYERS = {
    "conv1": (nn.Conv1d(4, 6, 3, padding="same"), torch.randn(2, 4, 9)),
    "conv2": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", groups=2), torch.randn(2, 4, 5, 5)),
    "conv3": (nn.Conv3d(4, 6, 2, dilation=2, bias=False), torch.randn(2, 4, 5, 5, 5)),
    "deconv1": (nn.ConvTranspose1d(4, 6, 3, stride=2), torch.randn(2, 4, 9)),
    "deconv2": (nn.ConvTranspose2d(4, 6, 3, output_padding=1, stride=2, groups=2), torch.randn(2, 4, 5, 5)),
    "deconv3": (nn.ConvTranspose3d(4, 6, 2), torch.randn(2, 4, 3, 3, 3)),
    "embedding": (nn.Embedding(9, 5, padding_idx=2), torch.tensor([[1, 2], [3, 8]])),
    "attention": (nn.MultiheadAttention(8, 2, add_bias_kv=True), torch.randn(3, 2, 8)),
}


def call(layer, x):
    return layer(x, x, x)[0] if isinstance(layer, nn.MultiheadAttention) else layer(x)
