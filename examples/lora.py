"""T-GRPO with LoRA adapters, which are then added to the weights that they were trained on.

    pip install 'video-r1[lora]'
    python examples/lora.py Qwen/Qwen2.5-VL-7B-Instruct my.json runs/lora runs/merged

The KL term needs no second model: its reference is the model with the adapters as they were at the start.
"""

import sys
from typing import Any

from peft import LoraConfig

from video_r1 import TGRPOConfig, TGRPOTrainer
from video_r1.models.loading import merge_adapter

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def main(model: str, manifest: str, out: str, merged: str, **settings: Any) -> None:
    trainer = TGRPOTrainer(
        model,
        args=TGRPOConfig(output_dir=out, **{"learning_rate": 1e-5, **settings}),
        train_dataset=manifest,
        peft_config=LoraConfig(r=64, lora_alpha=128, target_modules=ATTENTION, task_type="CAUSAL_LM"),
    )
    trainer.train()
    merge_adapter(out, merged)  # a plain checkpoint, which from_pretrained and vllm serve load


if __name__ == "__main__":
    main(*sys.argv[1:5])
