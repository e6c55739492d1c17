"""The text: this repository's own documentation, byte by byte."""

import ast
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def documentation(root: Path = ROOT) -> bytes:
    """README.md, CONTRIBUTING.md, docs/*.md and the docstrings of the package."""
    pages = [*(root / name for name in ("README.md", "CONTRIBUTING.md")), *sorted((root / "docs").glob("*.md"))]
    texts = [page.read_text(encoding="utf-8") for page in pages if page.is_file()]
    for source in sorted((root / "losssurf_fast").rglob("*.py")):
        nodes = ast.walk(ast.parse(source.read_text(encoding="utf-8")))
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        texts += filter(None, (ast.get_docstring(node) for node in nodes if isinstance(node, documented)))
    return "\n\n".join(texts).encode()


class Corpus:
    """``train`` and ``held_out`` (the last tenth) of a text, int64 ``[bytes]``, and random windows of them.

    Raises:
        ValueError: the text is too short for windows of ``context`` bytes.
    """

    def __init__(self, text: bytes, context: int, device: torch.device):
        need = 20 * (context + 1)
        if len(text) < need:
            raise ValueError(
                f"Corpus: a context of {context} bytes needs at least {need} bytes of text, got {len(text)}; the "
                "documentation is read from a checkout of the repository"
            )
        tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        cut = len(tokens) * 9 // 10
        self.context, self.device, self.train, self.held_out = context, device, tokens[:cut], tokens[cut:]

    def windows(
        self, tokens: torch.Tensor, batch: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Random inputs and targets, the inputs one byte later, each ``[batch, context]`` on the device."""
        starts = torch.randint(len(tokens) - self.context, (batch, 1), generator=generator)
        windows = tokens[starts + torch.arange(self.context + 1)].to(self.device)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
