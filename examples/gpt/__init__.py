"""A small GPT whose weights are Gaussian: ``python -m examples.gpt``, in a checkout."""
