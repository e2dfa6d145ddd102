"""What a model's own chat template makes of a chat: where the assistant's turn begins and ends.

Templates of models that think by default (Qwen3.5) begin the assistant's turn themselves: with `<think>`, or
with an empty pair of the tags where thinking is off, which some turn with the variable `enable_thinking`.
Here a completion holds its own `<think>…</think>`, which the rewards read and SFT teaches:

    template           the template gives          a prompt that reasons ends     a direct one ends
    Qwen3-VL           assistant↵                  assistant↵                     assistant↵
    Qwen3.5, 4B up     assistant↵<think>↵          assistant↵                     assistant↵<think></think>
    Qwen3.5, smaller   assistant↵<think></think>   assistant↵                     assistant↵<think></think>
"""

import re
from typing import Any

SWITCH = "enable_thinking"
_BEGUN = re.compile(r"<think>\s*(</think>\s*)?\Z")
_OPEN = re.compile(r"<think>\s*\Z")
NO_THOUGHT = "<think>\n\n</think>\n\n"


def prompt_text(processor: Any, messages: list[dict[str, Any]], thinks: bool = True) -> str:
    """The chat up to where the completion begins, placeholders not expanded. thinks: the completion begins
    with its reasoning; else that is empty and done, where the template says anything of it.
    """
    switch = {SWITCH: False} if not thinks and SWITCH in str(processor.chat_template) else {}
    text = chat_text(processor, messages, add_generation_prompt=True, **switch)
    return _BEGUN.sub("", text) if thinks else _OPEN.sub(NO_THOUGHT, text)


def chat_text(
    processor: Any, messages: list[dict[str, Any]], add_generation_prompt: bool = False, **variables: Any
) -> str:
    """The chat by the processor's template, placeholders not expanded. variables: of the template."""
    return processor.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        processor_kwargs={"do_sample_frames": False},  # without any, SmolVLM's warns at each call
        **variables,
    )


def special_tokens(tokenizer: Any) -> set[str]:
    """The tokens that stand for no text: of chats, visuals, sounds and ends."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | set(tokenizer.all_special_tokens)


def end_token_id(processor: Any) -> int:
    """The token that ends the assistant's turn: the special one that the chat template writes behind it, else
    `<|im_end|>` where the tokenizer has it, else EOS. processor: or a tokenizer.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    vocabulary = tokenizer.get_vocab()
    if processor is not tokenizer and processor.chat_template:
        said = {role: [{"type": "text", "text": f"{role} speaks"}] for role in ("user", "assistant")}
        chat = chat_text(processor, [{"role": role, "content": content} for role, content in said.items()])
        behind = chat.rpartition("assistant speaks")[2].strip()
        ends = [token for token in special_tokens(tokenizer) if behind.startswith(token)]
        return vocabulary[max(ends, key=len)] if ends else tokenizer.eos_token_id
    return vocabulary.get("<|im_end|>", tokenizer.eos_token_id)
