"""Every setting of the commands, as plain dataclasses. Importing these modules does not import torch.

A field carries its own help text; the command line reads it from here. Building a settings object checks it:
types first, then values and contradictions, and one ConfigError names all problems.

The trainers' configs mix these classes with `transformers.TrainingArguments`:

    class TGRPOConfig(TGRPOSettings, VLLMSettings, PromptSettings, TrainingArguments)

so every field of `TrainingArguments` is a setting too, with this project's default where one is named here.
Settings that TRL's `GRPOConfig` has keep its names. Defaults are those of the paper (arXiv 2503.21776).
"""
