"""Every setting of the commands, as plain dataclasses. Importing these modules does not import torch.

A field carries its own help text. Building a settings object checks it; one ConfigError names all problems.
The trainers' configs mix these classes with `transformers.TrainingArguments`, whose fields are settings too.
Settings that TRL's `GRPOConfig` has keep its names. Defaults are those of the paper (arXiv 2503.21776).
"""
